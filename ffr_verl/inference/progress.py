"""How far a run is, on the console: rows done, rate, remaining time."""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_LINE_SECONDS = 30.0


def describe(done: int, total: int, *, first: int, seconds: float) -> str:
    """Rate and remaining time, when `first` of the rows were done before the clock started.

    Example:
        >>> describe(50, 100, first=20, seconds=10.0), describe(20, 100, first=20, seconds=0.0)
        ('3.0 rows/s, 0:00:17 left', '')
    """
    if done <= first or seconds <= 0:
        return ""
    rate = (done - first) / seconds
    return f"{rate:.1f} rows/s, {datetime.timedelta(seconds=round((total - done) / rate))} left"


class RowProgress:
    """A bar on a terminal; a line now and then elsewhere, such as in the log of a cluster's job.

    For commands: until the first `update`, while a model is loaded, Ctrl-C ends the process at once, with status 130.
    The verb says what is done to the rows, `resumes` whether a run that is stopped can be resumed, `loading` what is
    loaded before.
    """

    def __init__(self, verb: str, console: Console, *, resumes: bool = True, loading: str = "") -> None:
        self._verb, self._console, self._resumes, self._loading = verb, console, resumes, loading
        rate = TextColumn("{task.fields[rate]}")
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), rate)
        # A bar on stderr leaves stdout alone: it may go to a file.
        self._bar = Progress(
            *columns,
            console=console,
            disable=not console.is_terminal,
            transient=True,
            redirect_stdout=not console.stderr,
        )
        self._task = self._bar.add_task(f"loading {loading}" if loading else verb, total=None, rate="")
        self._start: tuple[float, int] | None = None
        self._last_line = time.monotonic()
        self._done: tuple[int, int] | None = None
        self._handler: Any = None

    def __enter__(self) -> RowProgress:
        self._bar.__enter__()
        if self._loading and not self._console.is_terminal:
            self._console.print(f"loading {self._loading}", highlight=False, markup=False, soft_wrap=True)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, in the background
            self._handler = signal.signal(signal.SIGINT, self._end_at_once)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)
        self._give_ctrl_c_back()
        if self._done and isinstance(error, (KeyboardInterrupt, SystemExit)):
            done, total = self._done
            kept = " and kept; the same command resumes there" if self._resumes else ""
            self._console.print(
                f"stopped: {done:,} of {total:,} rows are done{kept}",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )

    def update(self, done: int, total: int) -> None:
        """Show it; the clock starts with the first call, when the model is ready."""
        now = time.monotonic()
        self._give_ctrl_c_back()
        self._done = done, total
        self._start = self._start or (now, done)
        started, first = self._start
        rate = describe(done, total, first=first, seconds=now - started)
        self._bar.update(self._task, description=self._verb, completed=done, total=total, rate=rate)
        if not self._console.is_terminal and (now - self._last_line > _LINE_SECONDS or done == total):
            self._last_line = now
            self._console.print(f"{self._verb}: {done:,} of {total:,} rows {rate}", highlight=False, soft_wrap=True)

    def _end_at_once(self, _number: int, _frame: object) -> None:
        """On Ctrl-C while the model is loaded: vLLM's engine ends, and the one that waits for it would wait on."""
        self._bar.stop()
        sys.stderr.write("ffr-verl: interrupted\n")
        sys.stderr.flush()
        os._exit(130)  # nothing is lost: answers are on the disk, and vLLM's processes end with this one

    def _give_ctrl_c_back(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None
