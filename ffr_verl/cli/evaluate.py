"""`ffr-verl evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffr_verl.cli.console import AnswerStyle, PredictionFormat, console


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="JSONL of predictions, gzipped or not; or a JSON list.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number there, as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the metrics there, break-downs too.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Predictions of another model for the same rows: show the difference.")
    ] = None,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Leave out lines that cannot be used, and count them.")
    ] = False,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for the 95 % intervals; 0 for none.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    row_format: Annotated[
        PredictionFormat,
        typer.Option("--format", help="ffr: as ffr-verl infer writes; verl: a file of trainer.validation_data_dir."),
    ] = "ffr",
    answer_style: Annotated[
        AnswerStyle | None,
        typer.Option(help="plain, or reasoning for <think>…</think><answer>…</answer>; as the rewards by default."),
    ] = None,
    reward_kwargs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Recipe, .hydra/config.yaml or YAML with the run's settings of rewards."),
    ] = None,
) -> None:
    """Say how good predictions are: precision, recall, F1 and MCC, faults of the answers, where they fail.

    Micro averages are the published ones; docs/evaluation.md defines every number. With --compare the difference is
    shown too, on the rows that both files have (dialogue_id, query and gold answer are the same).

    Example: ffr-verl evaluate pred.jsonl --compare baseline.jsonl --json result.json
    """
    from ffr_verl.evaluation.command import evaluate_command

    evaluate_command(
        predictions,
        compare=compare,
        json_file=json_file,
        csv_file=csv_file,
        lenient=lenient,
        resamples=bootstrap,
        seed=seed,
        row_format=row_format,
        style=answer_style,
        reward_kwargs=reward_kwargs,
        console=console,
    )
