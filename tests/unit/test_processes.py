"""A command with its whole family: its output in a file, its end reported, nothing of it left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ffr_verl.demo.processes import StageFailed, alone_on_the_machine, run_logged
from ffr_verl.errors import FFRError

# Starts a daemon that leaves the session of its parent, as Ray does, and writes its id to a file.
FAMILY = """
import os, subprocess, sys, time
daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
open(sys.argv[1], "w").write(str(daemon.pid))
print("started", flush=True)
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


def family(tmp_path: Path, seconds: float, status: int = 0) -> tuple[list[str], Path]:
    pid_file = tmp_path / "daemon.pid"
    return [sys.executable, "-c", FAMILY, str(pid_file), str(seconds), str(status)], pid_file


def is_gone(pid_file: Path) -> bool:
    pid = int(pid_file.read_text())
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_output_goes_to_the_log_and_lines_to_the_callback(tmp_path: Path) -> None:
    lines: list[str] = []
    code = r"import sys; sys.stdout.write('one\rtwo\nthree\n'); sys.stderr.write('four\n')"
    run_logged([sys.executable, "-c", code], log=tmp_path / "logs" / "a.log", on_line=lines.append, time_limit=60)
    assert {"one", "two", "three", "four"} <= set(lines)
    assert "three\n" in (tmp_path / "logs" / "a.log").read_text()


@pytest.mark.parametrize("status", [0, 3])
def test_nothing_is_left_when_a_command_ends(tmp_path: Path, status: int) -> None:
    command, pid_file = family(tmp_path, 0.1, status)
    if status:
        with pytest.raises(StageFailed, match=r"ended with status 3; its output is in .*a\.log"):
            run_logged(command, log=tmp_path / "a.log", on_line=str, time_limit=60)
    else:
        run_logged(command, log=tmp_path / "a.log", on_line=str, time_limit=60)
    assert is_gone(pid_file)


def test_the_time_limit_ends_everything(tmp_path: Path) -> None:
    command, pid_file = family(tmp_path, 300)
    with pytest.raises(StageFailed, match="stopped after 2 s without an end"):
        run_logged(command, log=tmp_path / "a.log", on_line=str, time_limit=2)
    assert is_gone(pid_file)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process(tmp_path: Path, by: signal.Signals) -> None:
    command, pid_file = family(tmp_path, 300)
    code = (
        "import sys; from pathlib import Path; from ffr_verl.demo.processes import run_logged; "
        f"run_logged({command!r}, log=Path({str(tmp_path / 'a.log')!r}), on_line=str, time_limit=300)"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        # A job in the background of a shell inherits SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = psutil.Process(runner.pid).children(recursive=True)
    assert children
    os.kill(runner.pid, by)
    assert runner.wait(timeout=30) != 0
    assert is_gone(pid_file)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_a_failure_shows_the_lines_that_matter(tmp_path: Path) -> None:
    code = "print('noise\\n' * 50); raise RuntimeError('no space for the engine')"
    with pytest.raises(StageFailed, match="RuntimeError: no space for the engine"):
        run_logged([sys.executable, "-c", code], log=tmp_path / "a.log", on_line=str, time_limit=60)


def test_one_holds_the_machine_and_the_next_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")  # so another run of this machine does not matter
    lock, said = tmp_path / "lock", list[str]()
    with alone_on_the_machine(said.append, lock=lock):
        assert not said
        with (
            pytest.raises(FFRError, match="waited 0 s for another demo or end-to-end test"),
            alone_on_the_machine(said.append, lock=lock, time_limit=0.1),
        ):
            pytest.fail("two at once")
        assert said == [
            f"waiting for another demo or end-to-end test on this machine, which holds {lock}, for 0 s at most"
        ]
    with alone_on_the_machine(pytest.fail, lock=lock):
        pass


def test_a_run_that_is_alive_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said = list[str]()
    alive = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "-m", "verl.trainer.main_ppo"])
    try:
        with (
            pytest.raises(FFRError, match=r"another GRPO run on this machine \(pid \d+, since "),
            alone_on_the_machine(said.append, lock=tmp_path / "lock", time_limit=0.1),
        ):
            pytest.fail("two at once")
    finally:
        alive.kill()
        alive.wait()
