"""`ffr-verl inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffr_verl.cli import options as shared
from ffr_verl.cli.console import console


def inspect(
    file: Annotated[
        Path, typer.Argument(help="A parquet file of `ffr-verl prepare`, a source of it, or predictions.")
    ],
    row: Annotated[int, typer.Option(min=0, help="Number of the row, from 0.")] = 0,
    images_root: Annotated[
        Path | None, typer.Option(help="Folder of the images; by default the one recorded in a parquet file.")
    ] = None,
    source_format: shared.SourceFormat = "auto",
    tokenizer: Annotated[
        str | None, typer.Option(help="The model's folder, tokenizer.json or hub name, to count prompt tokens.")
    ] = None,
    model_family: Annotated[
        str | None,
        typer.Option(help="The model's, for sizes of images; by default --tokenizer's, or that of a parquet file."),
    ] = None,
) -> None:
    """Show a row: turns, images, the query, the gold fragment marked.

    Images are shown with their sizes; of predictions the answer is marked, too.

    Example: ffr-verl inspect data/train.rl.parquet --row 7
    """
    from ffr_verl.data.inspection import render_row

    row_shown = render_row(
        file, row, root=images_root, tokenizer=tokenizer, source_format=source_format, model_family=model_family
    )
    console.print(row_shown)
