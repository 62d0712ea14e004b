"""What the commands share: the console, choices of options, how they end."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Literal

import typer
from rich.console import Console

from ffr_verl.errors import FFRError, printable, printable_lines

console = Console()

StoredDtype = Literal["float16", "float32"]
WindowIds = Literal["global", "published"]
Language = Literal["en", "zh"]
PredictionFormat = Literal["ffr", "verl"]
AnswerStyle = Literal["plain", "reasoning"]
Layout = Literal["blocks", "interleaved", "mixed"]
CoherenceMode = Literal["continuous", "published", "gold_anchored"]


def say(text: str, *, style: str | None = None) -> None:
    """A line as it stands, with control characters as codes."""
    console.print(printable_lines(text), style=style, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """A line that the user should not miss."""
    say(text, style="yellow")


def wrote(path: object) -> None:
    """Say that a file is there."""
    say(f"wrote {printable(str(path))}")


def _end(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def clean_up_when_terminated() -> None:
    """Let SIGTERM end the command as Ctrl-C does, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, _end)


def refuse_options(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Refuse options that the user gave and that would do nothing."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise FFRError(f"--{name.replace('_', '-')} {reason}")
