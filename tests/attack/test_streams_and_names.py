"""What terminals, pipes and names of files do to a command: one message, nothing that moves the cursor."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

WITHOUT_HOME = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
ASCII = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}


def shell(script: str, *arguments: Any, environment: Mapping[str, str] = os.environ) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a line of bash, in which `$0` is ffr-verl's interpreter."""
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, sys.executable, *map(str, arguments)],
        capture_output=True,
        timeout=120,
        env=dict(environment),
    )
    return run.returncode, run.stdout.decode(), run.stderr.decode()


def test_a_reader_that_goes_is_no_failure_and_takes_no_file_away(small: Path, tmp_path: Path) -> None:
    script = '"$0" -m ffr_verl evaluate "$1" --bootstrap 0 --json "$2" | true'
    assert shell(script, small / "pred.jsonl", tmp_path / "r.json")[0::2] == (141, "")
    assert (tmp_path / "r.json").is_file()


def test_stdin_is_read_where_it_is_a_file(small: Path) -> None:
    script = '"$0" -m ffr_verl evaluate /dev/stdin --bootstrap 0 < "$1"'
    assert shell(script, small / "pred.jsonl")[0::2] == (0, "")
    status, _, error = shell('cat "$1" | "$0" -m ffr_verl evaluate /dev/stdin', small / "pred.jsonl")
    assert (status, error.count("\n")) == (2, 1)
    assert "/dev/stdin: a pipe or a device, which is not read; save it as a file first" in error


@pytest.mark.parametrize("environment", [WITHOUT_HOME, ASCII], ids=["no home", "ascii"])
def test_without_a_home_and_with_ascii_only(small: Path, tmp_path: Path, environment: Mapping[str, str]) -> None:
    named = tmp_path / "预测.jsonl"
    shutil.copy(small / "pred.jsonl", named)
    script = '"$0" -m ffr_verl evaluate "$1" --bootstrap 0 && "$0" -m ffr_verl report "$1" --output "$2"'
    assert shell(script, named, tmp_path / "r.html", environment=environment)[0::2] == (0, "")


@pytest.mark.parametrize("name", ["a\nffr-verl: error: b", "a\x1b[31mb", "[red]a[bold][link=x]", "a\rb"])
def test_names_are_shown_as_they_stand(small: Path, tmp_path: Path, name: str, command: Callable[..., int]) -> None:
    file = tmp_path / f"{name}.jsonl"
    shutil.copy(small / "pred.jsonl", file)
    for arguments in (
        ("evaluate", file, "--bootstrap", 0),
        ("evaluate", tmp_path / name),
        ("inspect", tmp_path / name),
        ("report", file, "--output", tmp_path / name),
        ("prepare", tmp_path / name, "--images-root", tmp_path, "--output", tmp_path / "o", "--split", "t"),
        ("prepare", file, "--images-root", tmp_path, "--output", tmp_path / name, "--split", "t"),
    ):
        told: list[str] = []
        command(*arguments, said=told)
        assert not {"\x1b", "\r"} & {*"".join(told)}, told
        assert "\nffr-verl: error: b" not in "".join(told)
        assert "[red]" not in name or "[red]" in "".join(told)
