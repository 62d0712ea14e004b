"""What the commands share: the console, choices of options, how they end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from ffr_verl.errors import FFRError, printable, printable_lines

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Who reads the output, such as `head`, has gone: end as other programs do."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left in the buffer
        raise SystemExit(128 + signal.SIGPIPE)


console = _Console(emoji=False)  # `:a:` in a name stays what it is

SOURCE_FORMATS = (
    "Format of the source: auto (told from its start), mldr, dialogue, telegram, slack, wechat, locomo, photochat, "
    "dialogcc, mmdialog, mmdd, a plugin's, pkg://module:name or FILE.py:name; list describes them and ends."
)

VectorDtype = Literal["float16", "float32"]
WindowIds = Literal["global", "published"]
Language = Literal["en", "zh"]
PredictionFormat = Literal["ffr", "verl"]
AnswerStyle = Literal["plain", "reasoning"]
Layout = Literal["blocks", "interleaved", "mixed"]
CoherenceMode = Literal["continuous", "published", "gold_anchored"]


def with_names_on_a_line(text: str) -> str:
    """A message with control characters as codes: a line end is one of the message, but not in what was given to the
    command, such as the name of a file."""
    for given in sys.argv[1:]:
        text = text.replace(given, printable(given))
    return printable_lines(text)


def say(text: str, *, style: str | None = None, to: Console | None = None) -> None:
    """A line as it stands, with control characters as codes."""
    (to or console).print(with_names_on_a_line(text), style=style, markup=False, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    """A line that the user should not miss."""
    say(text, style="yellow")


def wrote(path: object) -> None:
    """Say that a file is there."""
    say(f"wrote {printable(str(path))}")


def bar(*columns: ProgressColumn) -> Progress:
    """What is done, a bar, `columns` and the remaining time, on a terminal; it goes when the work is done."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    shown = (TextColumn("{task.description}", markup=False), BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*shown, console=console, disable=not console.is_terminal, transient=True)


def figures(title: str, values: Mapping[str, str | int]) -> None:
    """A table of numbers under a title."""
    from rich.table import Table

    table = Table(title=escape(printable(title)), show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in values.items():
        table.add_row(name, value if isinstance(value, str) else f"{value:,}")
    console.print(table)


def show_formats(value: str) -> str:
    """Of `--format list`: a table of the formats, and the end of the command."""
    if value != "list":
        return value
    from rich.table import Table

    from ffr_verl.data.sources import all_sources

    sources = all_sources(on_broken=warn)
    table = Table("format", "what it is, what of it no row holds", "an example row", show_lines=True)
    for name, source in sources.items():
        gold = "" if source.has_gold else " For --unlabelled."
        leaves = f" Left out: {source.leaves}." if source.leaves else ""
        table.add_row(name, Text(f"{source.about}.{leaves}{gold}"), Text(source.example))
    console.print(table)
    raise typer.Exit


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
