"""Options that several commands have, each described once; and settings made of options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ffr_verl.cli.console import AnswerStyle, PredictionFormat

Settings = TypeVar("Settings")

# Of a model that answers.
RecordedImagesRoot = Annotated[
    Path | None, typer.Option(help="Folder of the images; by default the one recorded in the files.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
MaxModelLen = Annotated[int, typer.Option(min=2, help="Most tokens of prompt and answer.")]
MaxImages = Annotated[int, typer.Option(min=0, help="Most images of a prompt.")]
TensorParallelSize = Annotated[int, typer.Option(min=1, help="GPUs that share the model.")]
GpuMemoryUtilization = Annotated[float, typer.Option(min=0.1, max=1.0, help="Share of a GPU's memory.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model's repository brings.")
]
Restart = Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run left.")]

# Of predictions that are evaluated.
RowFormat = Annotated[
    PredictionFormat,
    typer.Option("--format", help="ffr: as ffr-verl infer writes; verl: a file of trainer.validation_data_dir."),
]
RewardedStyle = Annotated[
    AnswerStyle | None,
    typer.Option(help="plain, or reasoning for <think>…</think><answer>…</answer>; as the rewards by default."),
]
RewardKwargs = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Recipe, .hydra/config.yaml or YAML with the run's settings of rewards."),
]
Compare = Annotated[
    Path | None, typer.Option(help="Predictions of another model for the same rows: show the difference.")
]


def settings_of(kind: type[Settings], options: Mapping[str, Any], **others: Any) -> Settings:
    """Settings of a dataclass: the options that are named like its fields, and others."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in options.items() if name in names} | others)
