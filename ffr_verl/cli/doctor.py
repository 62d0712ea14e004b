"""`ffr-verl doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ffr_verl.cli.console import console
from ffr_verl.errors import printable, printable_lines


def doctor(
    data: Annotated[
        list[Path] | None, typer.Option(help="A parquet file of `ffr-verl prepare` to check; may be repeated.")
    ] = None,
) -> None:
    """Prove that this environment can train: versions, plugin, recipes through both trainers, platform, vLLM, memory,
    disk.

    Exits with status 1 when a check fails; each failed line says how to mend it.
    """
    from ffr_verl.integrations.verl.doctor import run_checks

    checks = run_checks(data or [])
    table = Table(title="ffr-verl doctor")
    for column in ("", "check", "found"):
        table.add_column(column)
    for check in checks:
        found = escape(printable_lines(check.found))
        found += "" if check.ok else f"\n[bold]mend:[/bold] {escape(printable_lines(check.mend))}"
        table.add_row("[green]ok[/green]" if check.ok else "[red]FAIL[/red]", escape(printable(check.name)), found)
    console.print(table)
    failed = sum(not check.ok for check in checks)
    if failed:
        console.print(f"{failed} of {len(checks)} checks failed")
        raise typer.Exit(1)
