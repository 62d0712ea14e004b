"""Run a command with its output in a file and nothing left behind.

Ray and vLLM start daemons that outlive a killed trainer. This process makes itself the reaper of its orphaned
descendants, so that at the end of a command, however it ended, everything that it started can be found and ended too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from ffr_verl.errors import FFRError

__all__ = ["StageFailed", "run_logged"]

_PR_SET_CHILD_SUBREAPER = 36
_ERROR_LINE = re.compile(r"^(?!.*Traceback).*\b(ffr-verl: error|\w*Error\b|\w*Exception\b|error:)")


class StageFailed(FFRError):
    """A command of the demo ended badly; the message names its log file and shows the lines that matter."""


def _end_descendants() -> None:
    """End every process that this one started, directly or not: SIGTERM, then SIGKILL after 5 seconds."""
    alive = psutil.Process().children(recursive=True)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, alive = psutil.wait_procs(alive, timeout=5.0)


@contextlib.contextmanager
def _nothing_left_behind() -> Iterator[None]:
    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_descendants()
        signal.signal(signal.SIGTERM, previous)


def _failure(how: str, log: Path) -> StageFailed:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    errors = [line for line in lines if _ERROR_LINE.search(line)]
    shown = "\n".join((errors or lines)[-12:])
    return StageFailed(f"{how}; its output is in {log}, the lines that matter:\n{shown}")


def run_logged(
    command: Sequence[str],
    *,
    log: Path,
    on_line: Callable[[str], None],
    time_limit: float,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> float:
    """Run `command`, append its output to `log`, and leave no process behind; returns the seconds it took.

    `on_line` gets each finished line (also those that end in a carriage return, as progress bars do) and, at least
    twice a second, the empty string. For a non-zero status or at the time limit (an engine that dies can leave a
    trainer waiting for ever) `StageFailed` names the log and shows its lines that matter.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with _nothing_left_behind(), log.open("ab") as sink, log.open("rb") as source:
        sink.write(f"$ {' '.join(command)}\n".encode())
        sink.flush()
        source.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            cwd=cwd,
            start_new_session=True,
        )
        pending = b""
        while True:
            status = process.poll()
            pending += source.read()
            *complete, pending = re.split(rb"[\r\n]+", pending)
            for line in complete:
                on_line(line.decode("utf-8", errors="replace"))
            if status is not None:
                break
            if time.monotonic() - started > time_limit:
                raise _failure(f"stopped after {time_limit:.0f} s without an end", log)
            on_line("")
            time.sleep(0.4)
    if status != 0:
        raise _failure(f"ended with status {status}", log)
    return time.monotonic() - started
