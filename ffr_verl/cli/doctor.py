"""`ffr-verl doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ffr_verl.cli.console import console, say
from ffr_verl.errors import printable


def doctor(
    data: Annotated[
        list[Path] | None, typer.Option(help="A parquet file of `ffr-verl prepare` to check; may be repeated.")
    ] = None,
    images_root: Annotated[
        Path | None, typer.Option(help="Folder of the images of --data, by default as recorded.")
    ] = None,
) -> None:
    """Prove that this environment can train.

    Checks versions, the plugin, the recipes through both trainers, platform, vLLM, memory and disk, and shows each
    line as soon as it is known. Exits with status 1 when a check fails; each failed line says how to mend it.
    """
    from ffr_verl.integrations.verl.doctor import run_checks

    checks = failed = 0
    for check in run_checks(data or [], images_root):
        checks += 1
        failed += not check.ok
        mark = ("ok    ", "green") if check.ok else ("FAIL  ", "bold red")
        console.print(Text.assemble(mark, printable(f"{check.name}: {check.found}")), soft_wrap=True)
        if not check.ok:
            say(f"      mend: {check.mend}", style="bold")
    say(f"{failed} of {checks} checks failed" if failed else f"all {checks} checks passed")
    if failed:
        raise typer.Exit(1)
