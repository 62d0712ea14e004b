"""`ffr-verl score`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ffr_verl.cli import options as shared
from ffr_verl.cli.console import (
    AnswerStyle,
    PredictionFormat,
    clean_up_when_terminated,
    console,
    refuse_options,
    warn,
    wrote,
)
from ffr_verl.files import check_output

# What does nothing where the answers are there.
_OF_MODEL = (
    "samples",
    "images_root",
    "max_new_tokens",
    "max_model_len",
    "max_images",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "trust_remote_code",
)


def score(
    context: typer.Context,
    data: Annotated[
        list[Path],
        typer.Option(help="NAME.rl.parquet of `ffr-verl prepare`; may be repeated, in the order of training."),
    ],
    output: Annotated[Path, typer.Option(help="The difficulty file to write.")],
    model: Annotated[str | None, typer.Option(help="The SFT model: a Hugging Face folder, or hub name.")] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="JSONL of answers by any tool instead of a model (docs/curriculum.md).")
    ] = None,
    row_format: Annotated[
        PredictionFormat,
        typer.Option("--format", help="Format of --predictions: ffr, or verl for one of trainer.validation_data_dir."),
    ] = "ffr",
    answer_style: Annotated[
        AnswerStyle, typer.Option(help="plain, or reasoning for <think>…</think><answer>…</answer>.")
    ] = "plain",
    samples: Annotated[
        int, typer.Option(min=0, help="Answers drawn at temperature 1 beside the greedy one, for a pass rate.")
    ] = 0,
    images_root: shared.RecordedImagesRoot = None,
    max_new_tokens: shared.MaxNewTokens = 1024,
    max_model_len: shared.MaxModelLen = 15_536,
    max_images: shared.MaxImages = 8,
    tensor_parallel_size: shared.TensorParallelSize = 1,
    gpu_memory_utilization: shared.GpuMemoryUtilization = 0.9,
    trust_remote_code: shared.TrustRemoteCode = False,
    chart: Annotated[
        Path | None, typer.Option(help="PNG to draw; beside the difficulty file, with its name, by default.")
    ] = None,
    force: shared.Force = False,
    restart: shared.Restart = False,
) -> None:
    """Score how hard each row is, by the SFT model's own answer.

    The answer is greedy. Writes f1, entropy, mean log-probability, dispersion and the level (easy, middle, confusing,
    hard) of each row. A run that was interrupted is resumed when it is started again.

    Use the file with data.ffr.curriculum.difficulty=OUTPUT.

    Example: ffr-verl score --model models/sft --data data/train.rl.parquet --output data/difficulty.parquet
    """
    options = dict(locals())
    from ffr_verl.inference.generate import GeneratorSettings
    from ffr_verl.inference.progress import RowProgress
    from ffr_verl.inference.rows import images_root_of
    from ffr_verl.inference.score import draw_difficulty
    from ffr_verl.inference.score import score as score_rows

    clean_up_when_terminated()
    picture = chart or output.with_suffix(".png")
    inputs = [*data, output, predictions]
    check_output(picture, force=force, example="difficulty.png", inputs=inputs, option="--chart")
    if predictions is not None:
        refuse_options(context, _OF_MODEL, "is of answers by --model; it does not go with --predictions")
    settings = None
    if model is not None:
        settings = shared.settings_of(GeneratorSettings, options, images_root=images_root_of(data, images_root))
    with RowProgress("scoring", console, loading="" if model is None else f"{model} into vLLM") as progress:
        summary = score_rows(
            data,
            output,
            settings=settings,
            predictions=predictions,
            row_format=row_format,
            style=answer_style,
            force=force,
            restart=restart,
            say=warn,
            on_rows=progress.update,
        )
    rows = summary.table.num_rows
    table = Table(title=f"{rows:,} rows, {summary.seconds:.0f} s")
    for name in ("level", "rows", "", "f1", "dispersion"):
        table.add_column(name, justify="left" if name in ("level", "") else "right")
    for level, count, f1, spread in summary.levels():
        table.add_row(level, f"{count:,}", "#" * round(30 * count / rows), f"{f1:.3f}", f"{spread:.2f}")
    console.print(table)
    by_dispersion = Table(title="f1 against dispersion of the gold fragment")
    for name in ("dispersion", "rows", "f1", ""):
        by_dispersion.add_column(name, justify="left" if name in ("dispersion", "") else "right")
    for name, count, f1 in summary.f1_by_dispersion():
        by_dispersion.add_row(name, f"{count:,}", f"{f1:.3f}", "#" * round(30 * f1))
    console.print(by_dispersion)
    draw_difficulty(summary.table, picture)
    for path in (output, picture):
        wrote(path)
