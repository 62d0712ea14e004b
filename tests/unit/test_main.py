"""The command as a whole: what it refuses to read, and what it does where the terminal takes little or nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from drawn_predictions import drawn

from ffr_verl.cli import main

ASCII = {"PYTHONIOENCODING": "ascii:strict", "COLUMNS": "100"}


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    path = tmp_path / "pred.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in drawn(3)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "PIPE"),
        ("evaluate", "FILE", "--compare", "PIPE"),
        ("evaluate", "FILE", "--reward-kwargs", "PIPE"),
        ("report", "PIPE", "--output", "r.html"),
        ("report", "FILE", "--training", "PIPE", "--output", "r.html"),
        ("prepare", "PIPE", "--images-root", ".", "--output", "out", "--split", "t"),
        ("prepare", "FILE", "--images-root", ".", "--output", "out", "--split", "t", "--against", "PIPE"),
        (
            "prepare",
            "FILE",
            "--images-root",
            ".",
            "--output",
            "out",
            "--split",
            "t",
            "--format",
            "dialogue",
            "--template",
            "PIPE",
        ),
        ("prepare", "PIPE", "--unlabelled", "--query", "x", "--format", "wechat", "--output", "out", "--split", "t"),
        ("prepare", "FILE", "--images-root", ".", "--output", "out", "--split", "t", "--image-map", "PIPE"),
        ("prepare", "FILE", "--unlabelled", "--output", "out", "--split", "t", "--query-file", "PIPE"),
        ("inspect", "PIPE"),
        ("build", "PIPE", "b.jsonl", "--dialogues", "3"),
        ("score", "--predictions", "FILE", "--data", "PIPE", "--output", "d.parquet"),
        ("infer", "--model", "m", "--data", "PIPE", "--output", "p.jsonl"),
        ("embed", "PIPE", "--model", "m", "--output", "e"),
    ],
    ids=" ".join,
)
def test_a_pipe_is_refused_and_not_waited_for(
    predictions: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
) -> None:
    monkeypatch.chdir(predictions.parent)
    os.mkfifo("pipe")
    names = {"PIPE": "pipe", "FILE": predictions.name}
    monkeypatch.setattr(sys, "argv", ["ffr-verl", *[names.get(one, one) for one in arguments]])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1), error
    assert "pipe: a pipe or a device, which is not read; save it as a file first" in error


def test_messages_have_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ffr-verl", "evaluate", "no\x1b[31m\u202efile.jsonl"])
    with pytest.raises(SystemExit):
        main()
    error = capsys.readouterr().err
    assert error.startswith(r"ffr-verl: error: no\x1b[31m\u202efile.jsonl: no such file")


def command(redirection: str, *arguments: str | Path, environment: Mapping[str, str] = ASCII) -> tuple[int, str]:
    """Exit status and stderr of `ffr-verl` in a shell with a redirection of its stdout."""
    run = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}', "bash", sys.executable, "-m", "ffr_verl", *map(str, arguments)],
        capture_output=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )
    return run.returncode, run.stderr.decode()


@pytest.mark.parametrize(("redirection", "why"), [(">&-", errno.EBADF), ("> /dev/full", errno.ENOSPC)])
def test_a_stdout_that_takes_nothing_is_one_line(
    predictions: Path, tmp_path: Path, redirection: str, why: int
) -> None:
    """What was asked for as a file is there, and has nothing else in it."""
    file = tmp_path / "r.json"
    status, error = command(redirection, "evaluate", predictions, "--bootstrap", "0", "--json", file)
    assert (status, error) == (2, f"ffr-verl: error: the output cannot be written: {os.strerror(why)}\n")
    assert json.loads(file.read_text())["micro"]


def test_a_terminal_that_has_only_ascii(predictions: Path, tmp_path: Path) -> None:
    named = tmp_path / "预测.jsonl"
    predictions.rename(named)
    assert command("> /dev/null", "evaluate", named, "--bootstrap", "0") == (0, "")
    status, error = command("", "evaluate", tmp_path / "没有.jsonl")
    assert (status, r"\u6ca1\u6709.jsonl: no such file" in error) == (2, True), error
