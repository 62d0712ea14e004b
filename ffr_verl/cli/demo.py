"""`ffr-verl demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ffr_verl.cli.console import console


def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    quick: Annotated[bool, typer.Option(help="Less of everything, in about half of the time.")] = False,
    restart: Annotated[bool, typer.Option(help="Forget what an earlier call made.")] = False,
    stack: Annotated[
        Literal["cpu", "gpu"] | None,
        typer.Option(
            help="Train with the *_cpu recipes or with the GPU ones; default: what the installed vLLM is for."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and run none of them.")] = False,
) -> None:
    """Run both training stages on a small scale, with a tiny model.

    The data set is drawn, the model is a Qwen2-VL; it runs on the CPU or on one GPU. Prints and runs the commands that
    a user would type: prepare, SFT, merge, score, GRPO, infer, evaluate, report. A second call resumes where the first
    one ended. `make demo` installs what it needs.
    """
    from ffr_verl.demo.pipeline import print_commands, run_demo
    from ffr_verl.demo.stages import DemoSettings, installed_stack

    chosen = stack or installed_stack()
    settings = DemoSettings.quick(chosen) if quick else DemoSettings(stack=chosen)
    if dry_run:
        print_commands(output, settings, console)
    else:
        run_demo(output, settings, restart=restart, console=console)
