"""`ffr-verl prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ffr_verl.cli import options as shared
from ffr_verl.cli.console import (
    Language,
    WindowIds,
    bar,
    clean_up_when_terminated,
    console,
    refuse_options,
    say,
    warn,
    wrote,
)
from ffr_verl.errors import FFRError, printable
from ffr_verl.files import check_output


def prepare(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(help="A file of rows, or an exported chat; --format list shows the formats.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the parquet files; made when missing.")],
    split: Annotated[str, typer.Option(help="Name of the split: writes NAME.rl.parquet and NAME.sft.parquet.")],
    images_root: shared.ChatImagesRoot = None,
    source_format: shared.SourceFormat = "auto",
    unlabelled: Annotated[
        bool,
        typer.Option("--unlabelled", help="Rows without gold answers, for `infer` only; with --query where needed."),
    ] = False,
    query: Annotated[
        list[str] | None, typer.Option(help="What to ask of every dialogue, with --unlabelled; may be repeated.")
    ] = None,
    query_file: Annotated[Path | None, typer.Option(help="The same from a file, one query a line.")] = None,
    gap_hours: shared.GapHours = 8.0,
    image_map: shared.ImageMap = None,
    skip_invalid: Annotated[
        bool, typer.Option("--skip-invalid", help="Write the good rows; the others go to NAME.rejected.jsonl.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write a JSON report there, also when rows are refused.")] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="A parquet file of another split, whose dialogues must not occur; may be repeated."),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image, instead of reading its header and end.")
    ] = False,
    embed_images: Annotated[
        bool, typer.Option("--embed-images", help="Store the images in the files: for clusters without a shared disk.")
    ] = False,
    max_images: Annotated[int, typer.Option(min=0, help="Most images of a row; rollout.limit_images of a run.")] = 8,
    max_pixels: Annotated[
        int, typer.Option(min=3136, help="Bound to which the model shrinks an image; data.ffr.max_pixels of a run.")
    ] = 602_112,
    tokenizer: Annotated[
        str | None, typer.Option(help="The model's folder, tokenizer.json or hub name, to count prompt tokens.")
    ] = None,
    model_family: Annotated[
        str | None,
        typer.Option(help="The model's, such as qwen3_vl: sizes of images, chat format. By default --tokenizer's."),
    ] = None,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens of a prompt; data.max_prompt_length of a run. Needs --tokenizer.")
    ] = 14_512,
    window: Annotated[int | None, typer.Option(min=1, help="Cut dialogues that have more turns into windows.")] = None,
    stride: shared.Stride = None,
    window_ids: Annotated[
        WindowIds | None,
        typer.Option(
            help="global: ids of the whole dialogue; published: images count from 0 in each window. With --window."
        ),
    ] = None,
    language: Annotated[
        Language | None,
        typer.Option(help="Of the instructions around raw dialogues; by default that of each dialogue."),
    ] = None,
    template: Annotated[
        Path | None,
        typer.Option(help="YAML with the instructions around raw dialogues: user ({query}, {dialogue}), system."),
    ] = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Write the captions of raw dialogues into the prompt.")
    ] = False,
    force: shared.Force = False,
) -> None:
    """Check rows and write them as parquet for both training stages.

    Every row is checked (fields, ids, images, gold answer, repetitions). With any error nothing is written, and a
    table of the problems by kind says which rows, what was found and how to mend it. docs/data.md lists the checks.
    The format is told from the file's start where --format does not say it.

    Example: ffr-verl prepare train.json --images-root . --output data --split train

    Example: ffr-verl prepare wechat.jsonl --format dialogue --window 40 --window-ids global --images-root photos
    --output data --split test

    Example: ffr-verl prepare result.json --unlabelled --query "the garden" --images-root . --output data --split chat
    """
    from rich.progress import DownloadColumn

    from ffr_verl.data.parquet_files import is_own_root
    from ffr_verl.data.prepare import prepare as prepare_rows
    from ffr_verl.data.sources.rows import read_queries
    from ffr_verl.data.statistics import table_rows
    from ffr_verl.data.windows import WindowSettings

    clean_up_when_terminated()
    windows = None
    if tokenizer is None:
        refuse_options(context, ("max_prompt_tokens",), "needs --tokenizer, which counts them")
    if window is None:
        refuse_options(context, ("stride", "window_ids"), "goes with --window TURNS")
    else:
        if window_ids is None:
            what = "global (ids of the whole dialogue) or published (docs/data.md)"
            raise FFRError(f"--window needs --window-ids: {what}")
        windows = WindowSettings.of(window, stride, window_ids)
    if report is not None:
        check_output(report, force=True, example="report.json", inputs=[query_file], option="--report")
    root = images_root or (source if source.is_dir() else source.parent)
    size = source.stat().st_size if source.is_file() else None
    with bar(DownloadColumn()) as progress:
        task = progress.add_task(f"preparing {split}", total=size)
        summary = prepare_rows(
            source,
            images_root=root,
            output=output,
            split=split,
            source_format=source_format,
            unlabelled=unlabelled,
            queries=[*(query or ()), *(() if query_file is None else read_queries(query_file))],
            gap_hours=gap_hours,
            image_map=image_map,
            skip_invalid=skip_invalid,
            decode=decode,
            embed_images=embed_images,
            max_images=max_images,
            max_pixels=max_pixels,
            tokenizer=tokenizer,
            model_family=model_family,
            max_prompt_tokens=max_prompt_tokens,
            against=against or (),
            window=windows,
            language=language,
            template=template,
            captions=captions,
            report=report,
            force=force,
            on_position=lambda position: progress.update(task, completed=position),
        )
    for errors, title in ((True, "left out"), (False, "warnings")):
        if problems := summary.problems.table(errors=errors):
            console.print(f"{title}:\n{problems}", style="yellow", highlight=False, soft_wrap=True, markup=False)
    if summary.left_out:
        told = "; ".join([f"{what}: {count:,}" for what, count in summary.left_out.items()])
        warn(f"in no row: {told}")
    table = Table("", title=escape(printable(f"{split}: {summary.source_format} rows, {summary.seconds:.1f} s")))
    for name in ("mean", "p95"):
        table.add_column(name, justify="right")
    for line in table_rows(summary.statistics):
        table.add_row(*line)
    if summary.rejected:
        table.add_row("rows left out", f"{summary.rejected:,}", "")
    console.print(table)
    for path in (summary.rl_path, summary.sft_path, summary.rejected_path, report):
        if path is not None:
            wrote(path)
    if not embed_images and not is_own_root(summary.rl_path, root):
        folder = printable(str(root.resolve()))
        say(f"the images are elsewhere, so name their folder in training: data.ffr.images_root={folder}")
