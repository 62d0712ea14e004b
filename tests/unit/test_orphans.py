"""What an engine starts ends with the process that started it, however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# Starts a daemon inside the block and one behind it, each in a session of its own; then waits.
PROGRAM = """
import subprocess, sys, time
from ffr_verl.inference.orphans import ends_with_us
def daemon():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True).pid
with ends_with_us():
    inside = daemon()
print(inside, daemon(), flush=True)
time.sleep(float(sys.argv[1]))
"""


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "ended"])
def test_only_what_was_started_in_the_block_ends(tmp_path: Path, is_killed: bool) -> None:
    seconds = "60" if is_killed else "0"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, seconds], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    inside, behind = map(int, process.stdout.readline().split())
    try:
        if is_killed:
            assert not is_gone(inside)
            process.send_signal(signal.SIGKILL)
        process.wait()
        for _ in range(200):
            if is_gone(inside):
                break
            time.sleep(0.05)
        assert is_gone(inside)
        assert not is_gone(behind)
    finally:
        process.stdout.close()
        for pid in (inside, behind):
            if not is_gone(pid):
                psutil.Process(pid).kill()
