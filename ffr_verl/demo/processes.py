"""Run a command with its output in a file and nothing left behind, and GRPO alone on the machine.

Ray and vLLM start daemons that outlive a killed trainer. This process makes itself the reaper of its orphaned
descendants, so that at the end of a command, however it ended, everything that it started can be found and ended too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl.live_runs import joined_cluster, live_runs

# In /tmp as verl's weight-sync socket, so that whoever shares the one shares the other.
_LOCK = Path("/tmp/ffr_verl-grpo.lock")

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


@contextlib.contextmanager
def alone_on_the_machine(
    say: Callable[[str], None], *, time_limit: float = 3600.0, lock: Path = _LOCK
) -> Iterator[None]:
    """Hold the lock that demos and end-to-end tests of this machine share, once it is free and no GRPO run is alive.

    Two runs would hang (see `live_runs`). `say` is told what is waited for; an `FFRError` says it after `time_limit`
    seconds. The lock goes with the process, however that ends.
    """
    try:
        place = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)  # of whichever user; the content does not matter
    except FileNotFoundError:
        place = os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        deadline, said = time.monotonic() + time_limit, False
        while (found := _in_the_way(place, lock)) is not None:
            if time.monotonic() > deadline:
                raise FFRError(f"waited {time_limit:.0f} s for {found}; give the command again when that has ended")
            if not said:
                say(f"waiting for {found}, for {time_limit:.0f} s at most")
                said = True
            time.sleep(min(2.0, time_limit))
        yield
    finally:
        os.close(place)


def _in_the_way(place: int, lock: Path) -> str | None:
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f"another demo or end-to-end test on this machine, which holds {lock}"
    runs = live_runs() if joined_cluster(None) is None else []
    return f"another GRPO run on this machine ({runs[0]})" if runs else None


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
