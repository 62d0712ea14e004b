"""`ffr-verl report`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ffr_verl.cli.console import CoherenceMode, bar, refuse_options, say, warn
from ffr_verl.cli.options import Compare, Force, RewardedStyle, RewardKwargs, RowFormat, settings_of
from ffr_verl.errors import FFRError, counted

_OF_PREDICTIONS = ("data", "embeddings", "reward_kwargs", "coherence_mode", "row_format", "compare", "lenient")
_OF_RUNS = ("rollouts", "follow")


def report(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="The HTML file to write.")],
    predictions: Annotated[
        Path | None, typer.Argument(help="JSONL of predictions, gzipped or not; none for the page of a run.")
    ] = None,
    images_root: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the images; by default the one recorded in --data, or that of the predictions; for the "
            "page of a run the current one."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="NAME.rl.parquet of `ffr-verl prepare`, for the images root recorded there.")
    ] = None,
    embeddings: Annotated[Path | None, typer.Option(help="An embedding store, for the coherence reward.")] = None,
    reward_kwargs: RewardKwargs = None,
    coherence_mode: Annotated[
        CoherenceMode | None, typer.Option(help="See docs/rewards.md. With --embeddings.")
    ] = None,
    answer_style: RewardedStyle = None,
    row_format: RowFormat = "ffr",
    compare: Compare = None,
    training: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="A verl run's log (JSONL or event files), or a folder with such; may be repeated, to overlay runs.",
        ),
    ] = None,
    rollouts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER",
            help="With answers that verl wrote (trainer.rollout_data_dir, validation_data_dir) or our replay buffer "
            "(dump_dir); may be repeated. By default those below --training.",
        ),
    ] = None,
    follow: Annotated[
        int | None,
        typer.Option(min=1, metavar="SECONDS", help="Write the run's page again so often, until Ctrl-C."),
    ] = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="Leave out lines that cannot be used.")] = False,
    most_rows: Annotated[
        int,
        typer.Option(min=1, help="Most rows in the file; of more those of least F1 are shown, of a run some steps."),
    ] = 5_000,
    thumbnail_size: Annotated[
        int, typer.Option(min=16, max=1024, help="Most pixels of a picture's longer side.")
    ] = 240,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
    force: Force = False,
) -> None:
    """Write predictions, or a run, as one HTML file to look at.

    Predictions: metrics, charts and every dialogue with its fragments. A run (--training alone): its curves, and the
    answers that it wrote down. The file holds small copies of the images and needs neither network nor another file.

    Example: ffr-verl report pred.jsonl --output report.html --images-root data

    Example: ffr-verl report --training logs/run.jsonl --output run.html --follow 30
    """
    options = {name: value for name, value in locals().items() if value is not None}
    options |= {name: tuple(options[name]) for name in ("training", "rollouts") if name in options}
    if predictions is None:
        if not training:
            raise FFRError("give a file of predictions, or --training RUN for the page of a run")
        refuse_options(context, _OF_PREDICTIONS, "is of predictions; a run's page (--training alone) does not read it")
        _run_page(output, options, force=force)
    else:
        refuse_options(context, _OF_RUNS, "is of a run's page, which --training makes without predictions")
        _report(predictions, output, options, force=force)


def _report(predictions: Path, output: Path, options: dict[str, Any], *, force: bool) -> None:
    from rich.progress import MofNCompleteColumn

    from ffr_verl.evaluation.report import ReportSettings, write_report

    with bar(MofNCompleteColumn()) as progress:
        task = progress.add_task("evaluating", total=None)
        summary = write_report(
            predictions,
            output,
            settings_of(ReportSettings, options),
            force=force,
            say=warn,
            on_progress=lambda phase, done, total: progress.update(
                task, description=phase, completed=done, total=total
            ),
        )
    if summary.skipped:
        warn(f"{counted(summary.skipped, 'line')} left out")
    if summary.shown < summary.rows:
        warn(f"{summary.shown:,} of {summary.rows:,} rows are shown, those of least F1 (--most-rows)")
    for problem, count in summary.missing.most_common():
        warn(f"{count:,} images not shown: {problem}")
    say(
        f"wrote {output}: {counted(summary.shown, 'row')}, {counted(summary.pictures, 'picture')}, "
        f"{summary.size / 1e6:.1f} MB, {summary.seconds:.1f} s"
    )


def _run_page(output: Path, options: dict[str, Any], *, force: bool) -> None:
    from ffr_verl.evaluation.report import RunPageSettings, write_run_page

    settings = settings_of(RunPageSettings, options)
    summary = write_run_page(output, settings, force=force, say=warn)
    runs = "1 run" if summary.runs == 1 else f"{summary.runs:,} runs"
    say(
        f"wrote {output}: {runs}, {summary.charts:,} charts, {summary.groups:,} groups of answers, "
        f"{summary.size / 1e6:.1f} MB, {summary.seconds:.1f} s"
    )
    if not settings.follow:
        return
    say(f"following; open {output} in a browser, which loads it again every {settings.follow} s; Ctrl-C ends it")
    try:
        while True:
            time.sleep(settings.follow)
            try:
                write_run_page(output, settings, force=True)
            except FFRError as error:  # as while a resumed run empties its log; the page stays as it was
                warn(str(error))
    except KeyboardInterrupt:
        write_run_page(output, dataclasses.replace(settings, follow=0), force=True)
        say(f"wrote {output} for the last time")
