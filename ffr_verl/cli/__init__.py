"""The command `ffr-verl`, a file a command. Each imports what it needs when it runs, so `--help` needs no torch."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from typing import Annotated

import typer

from ffr_verl import __version__
from ffr_verl.cli import (
    ask,
    build,
    check,
    demo,
    doctor,
    embed,
    evaluate,
    infer,
    inspect,
    label,
    merge,
    plan,
    prepare,
    report,
    score,
)
from ffr_verl.cli.console import with_names_on_a_line
from ffr_verl.cli.recipe import app as recipe_app
from ffr_verl.errors import FFRError, error_lines

__all__ = ["app", "main"]

app = typer.Typer(
    name="ffr-verl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-grained fragment retrieval training on verl.\n\n"
    "The order of a project: prepare the data (inspect shows a row), embed it for the coherence reward, train stage 1 "
    "(verl.trainer.sft_trainer +recipe=ffr_sft), merge its checkpoint, score how hard the rows are, train stage 2 "
    "(verl.trainer.main_ppo +recipe=ffr_grpo), merge, infer, evaluate, report. `ffr-verl demo` does it on a small "
    "scale, without the embeddings.",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"ffr-verl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the command itself."""


for _command in (
    prepare.prepare,
    inspect.inspect,
    build.build,
    label.label,
    embed.embed,
    score.score,
    infer.infer,
    ask.ask,
    evaluate.evaluate,
    report.report,
    merge.merge,
    demo.demo,
    doctor.doctor,
    check.check,
    plan.plan,
):
    app.command()(_command)
app.add_typer(recipe_app, name="recipe")


def _usable_streams() -> None:
    """A letter that the terminal's encoding lacks is written as a code. A closed stdout fails when something is
    written to it, as a full one does, and no file that is opened takes its place."""
    for number, name, mode in ((1, "stdout", os.O_RDONLY), (2, "stderr", os.O_WRONLY)):
        stream = getattr(sys, name)
        if stream is None:
            os.dup2(os.open(os.devnull, mode), number)
            setattr(sys, name, open(number, "w", errors="backslashreplace", closefd=False))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command; what a user can mend is one message on stderr and exit status 2."""
    _usable_streams()
    try:
        app()
    except FFRError as error:
        with contextlib.suppress(OSError):  # what is wrong may be wrong with stderr's file, too
            sys.stderr.write(error_lines(with_names_on_a_line(str(error))))
        raise SystemExit(2) from None
    except OSError as error:  # of the output: files have their names in the message
        if error.filename is not None or error.errno not in (errno.EBADF, errno.EIO, errno.ENOSPC):
            raise
        sys.stderr.write(error_lines(f"the output cannot be written: {error.strerror}"))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left in the buffer
        raise SystemExit(2) from None
    except SystemExit as error:  # so Typer ends on Ctrl-C
        if error.code == 130:
            sys.stderr.write("ffr-verl: interrupted\n")
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # Typer's, when who reads, such as `head`, has gone
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise
