"""vLLM's processes end with ours, also when ours is killed.

vLLM's engine waits for requests for ever when the process that started it is gone (kill -9, out of memory), and keeps
the GPU's memory: the next run would not fit beside it. A small process, run from this module, watches ours and ends
what is left.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator

import psutil

_SECONDS = 0.5


@contextlib.contextmanager
def ends_with_us() -> Iterator[None]:
    """Processes that are started in this block, directly or not, are killed when this process is gone."""
    me = psutil.Process()
    guard = subprocess.Popen(
        [sys.executable, "-m", __name__, str(me.pid), str(me.create_time())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us
    )
    assert guard.stdin is not None
    assert guard.stdout is not None
    guard.stdout.readline()  # it looks from now on
    try:
        yield
    finally:
        with guard.stdout, contextlib.suppress(BrokenPipeError), guard.stdin:
            guard.stdin.write(b"\n")
            guard.stdin.flush()
            guard.stdout.readline()  # it has seen all


def watch(parent: int, created: float) -> None:
    """Remember the processes that `parent` starts until the standard input has something; when it is gone, kill them.

    When it was created tells it from a later process with its id.
    """
    started: set[psutil.Process] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(parent)
        if process.create_time() != created:
            return
        before = {*process.children(recursive=True), psutil.Process()}
        _tell()
        is_collecting = True
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if is_collecting:
                is_collecting = not select.select([sys.stdin], [], [], _SECONDS)[0]
                started |= {*process.children(recursive=True)} - before
                if not is_collecting:
                    _tell()
                continue
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(_SECONDS)
    for one in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def _tell() -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), b"\n")


if __name__ == "__main__":
    os.chdir("/")
    watch(int(sys.argv[1]), float(sys.argv[2]))
