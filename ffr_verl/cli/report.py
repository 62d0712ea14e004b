"""`ffr-verl report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffr_verl.cli.console import CoherenceMode, console, say, warn
from ffr_verl.cli.options import Compare, Force, RewardedStyle, RewardKwargs, RowFormat, settings_of


def report(
    predictions: Annotated[Path, typer.Argument(help="JSONL of predictions, gzipped or not.")],
    output: Annotated[Path, typer.Option(help="The HTML file to write.")],
    images_root: Annotated[
        Path | None,
        typer.Option(help="Folder that the rows' image paths are relative to; by default that of the predictions."),
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
        Path | None, typer.Option(help="Folder with a verl run's metrics (JSONL or event files), for its curves.")
    ] = None,
    lenient: Annotated[bool, typer.Option("--lenient", help="Leave out lines that cannot be used.")] = False,
    most_rows: Annotated[
        int, typer.Option(min=1, help="Most rows in the file; of more those of least F1 are shown.")
    ] = 5_000,
    thumbnail_size: Annotated[
        int, typer.Option(min=16, max=1024, help="Most pixels of a picture's longer side.")
    ] = 240,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Fragment retrieval report",
    force: Force = False,
) -> None:
    """Write predictions as one HTML file to look at.

    It has metrics, charts and every dialogue with its fragments. The file holds small copies of the images and needs
    neither the network nor another file.

    Example: ffr-verl report pred.jsonl --output report.html --images-root data
    """
    options = dict(locals())
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ffr_verl.evaluation.report import ReportSettings, write_report

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
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
        warn(f"{summary.skipped:,} lines left out")
    if summary.shown < summary.rows:
        warn(f"{summary.shown:,} of {summary.rows:,} rows are shown, those of least F1 (--most-rows)")
    for problem, count in summary.missing.most_common():
        warn(f"{count:,} images not shown: {problem}")
    say(
        f"wrote {output}: {summary.shown:,} rows, {summary.pictures:,} pictures, {summary.size / 1e6:.1f} MB, "
        f"{summary.seconds:.1f} s"
    )
