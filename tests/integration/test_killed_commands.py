"""Commands that are killed, ended or interrupted: what is left, and that the same command goes on."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_server import FakeServer, completion, failure, fake_server, user_text

from ffr_verl.data.demo import demo_rows
from ffr_verl.data.prepare import prepare
from ffr_verl.inference.journal import journal_folder

KEY = "sk-secret-0123456789"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place for `train.json` and its images."""
    return tmp_path


KILLED = """
import sys, pathlib
from ffr_verl.data.prepare import prepare
folder = pathlib.Path(sys.argv[1])
print("started", flush=True)
prepare(folder / "train.json", images_root=folder, output=folder / "out", split="train")
"""


def test_killed_at_any_moment_it_leaves_nothing_or_whole_files(folder: Path) -> None:
    (folder / "train.json").write_text(json.dumps(list(demo_rows(folder / "images", rows=800, seed=3))))
    source = random.Random(0)
    command = [sys.executable, "-c", KILLED, str(folder)]
    # The moments are spread over what an undisturbed run takes here and now.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as undisturbed:
        assert undisturbed.stdout is not None
        undisturbed.stdout.readline()
        started = time.monotonic()
        assert undisturbed.wait() == 0
        taken = time.monotonic() - started
    for path in (folder / "out").iterdir():
        path.unlink()
    started = time.monotonic()
    whole = interrupted = 0
    while (whole < 2 or interrupted < 3) and time.monotonic() - started < 60:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(source.uniform(0.0, 2.0 * taken))
        process.kill()
        process.wait()
        process.stdout.close()
        visible = [path for path in (folder / "out").glob("*") if not path.name.startswith(".")]
        assert len(visible) in (0, 2), "both files or none"
        for path in visible:
            assert pq.read_table(path).num_rows == 800
            path.unlink()
        whole += len(visible)
        interrupted += not visible
    assert whole >= 2
    assert interrupted >= 3
    summary = prepare(folder / "train.json", images_root=folder, output=folder / "out", split="train")
    assert sorted((folder / "out").iterdir()) == sorted((summary.rl_path, summary.sft_path)), "what was left is gone"


@pytest.mark.parametrize(("by", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_end_on_request_leaves_nothing_at_all(folder: Path, by: signal.Signals, status: int) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in demo_rows(folder / "images", rows=400, seed=3))
    with (folder / "train.jsonl").open("w") as file:
        file.writelines([lines] * 100)
    command = [sys.executable, "-m", "ffr_verl", "prepare", str(folder / "train.jsonl"), "--images-root", str(folder)]
    process = subprocess.Popen(
        [*command, "--output", str(folder / "out"), "--split", "train", "--report", str(folder / "r.json")],
        stderr=subprocess.PIPE,
        # A job in the background of a shell inherits SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not list((folder / "out").glob(".train.rl.parquet.*.partial")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(by)
    _, error = process.communicate(timeout=30)
    assert process.returncode == status, error
    assert not (folder / "out").exists()
    assert json.loads((folder / "r.json").read_text())["error"].startswith("interrupted")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("FFR_TEST_KEY", KEY)
    with fake_server() as fake:
        yield fake


@pytest.fixture
def data(parquet: Path) -> Path:
    """16 rows, some without images."""
    return parquet / "heldout.rl.parquet"


def position(body: dict[str, Any], data: Path) -> int:
    """The row that a request asks for."""
    rows = pq.read_table(data, columns=["prompt"]).to_pylist()
    return [row["prompt"][-1]["content"].replace("<image>", "") for row in rows].index(user_text(body))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def command(server: FakeServer, data: Path, output: Path, *more: str) -> list[str]:
    options = {"data": data, "output": output, "model": "m", "endpoint": server.url, "api-key-env": "FFR_TEST_KEY"}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [sys.executable, "-m", "ffr_verl", "infer", *given, *more]


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=60)


def test_a_kill_costs_only_the_requests_in_flight(server: FakeServer, data: Path, tmp_path: Path) -> None:
    """As a user sees it: kill -9 in the middle, the same command again; the key is in no file and on no screen."""
    hang = threading.Event()

    def reply(body: dict[str, Any], number: int) -> Any:
        if number >= 9:
            hang.wait(30)
        return completion(f"answer {position(body, data)}")

    server.reply = reply
    output = tmp_path / "pred.jsonl"
    log = tmp_path / "first.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command(server, data, output, "--concurrency", "3"), stdout=sink, stderr=sink)
        for _ in range(300):
            if len(server.bodies) == 12:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(server.bodies) == 12
    assert not output.exists()
    work = journal_folder(output)
    assert KEY not in "".join(file.read_text() for file in work.iterdir()) + log.read_text()
    hang.set()
    server.bodies.clear()
    server.reply = lambda body, number: completion(f"answer {position(body, data)}")
    finished = run(server, data, output, "--concurrency", "3")
    assert finished.returncode == 0, finished.stderr
    assert "resumed: 9 of 16 rows have their answer from an interrupted run" in finished.stdout
    assert len(server.bodies) == 7, "the three in flight, and the four that had not been asked"
    assert [line["response"] for line in lines(output)] == [f"answer {number}" for number in range(16)]
    assert KEY not in finished.stdout + finished.stderr + output.read_text()
    assert {file.name for file in tmp_path.iterdir()} == {"pred.jsonl", "first.log"}


def test_ctrl_c_says_what_is_kept(server: FakeServer, data: Path, tmp_path: Path) -> None:
    hang = threading.Event()

    def reply(body: dict[str, Any], number: int) -> Any:
        if number >= 5:
            hang.wait(30)
        return completion("yes")

    server.reply = reply
    output = tmp_path / "pred.jsonl"
    process = subprocess.Popen(
        command(server, data, output, "--concurrency", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(300):
        if len(server.bodies) == 7:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    told, error = process.communicate(timeout=30)
    hang.set()
    assert (process.returncode, error) == (130, "ffr-verl: interrupted\n")
    assert "stopped: 5 of 16 rows are done and kept; the same command resumes there" in told
    assert not output.exists()


def test_the_command_tells_what_failed(server: FakeServer, data: Path, tmp_path: Path) -> None:
    server.reply = lambda body, number: failure(400, "too long") if number in (3, 7) else completion("yes")
    finished = run(server, data, tmp_path / "pred.jsonl")
    assert finished.returncode == 0, finished.stderr
    assert "2 without an answer: 400: too long" in finished.stdout
    assert "answering: 16 of 16 rows" in finished.stdout
