"""A run without progress ends with one line.

verl alone waits for ever for an engine that has died, a reward that hangs, a weight sync whose other side is gone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Hashable

from ffr_verl.errors import FFRError, error_lines
from ffr_verl.settings import SamplerConfig

_REMEDY = (
    "look above for the process that died or hangs; the same command resumes from the newest checkpoint. Where this "
    f"is how long it takes, raise {SamplerConfig.node}.stall_timeout, or give null for no limit"
)


class StallWatch:
    """What the replay buffer sees of a run, which verl's task runner asks once a step.

    Between `left` and `waits_for` the task runner trains, hands over weights and saves; the end of `seconds` there
    ends its process, since nothing can be raised in the thread that hangs. `None` watches nothing.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._timer: threading.Timer | None = None
        self._seen: Hashable = None
        self._since = time.monotonic()

    def waits_for(self, answers: Hashable) -> None:
        """Called while answers are waited for, with what changes when there are more of them.

        Raises `FFRError` when that has been the same for too long.
        """
        self._cancel()
        now = time.monotonic()
        if answers != self._seen:
            self._seen, self._since = answers, now
        elif self._seconds is not None and now - self._since > self._seconds:
            raise FFRError(f"no answer has been finished for {now - self._since:.0f} s: {_REMEDY}")

    def left(self) -> None:
        """Called when the step has its answers."""
        self._cancel()
        self._seen = None
        if self._seconds is not None:
            self._timer = threading.Timer(self._seconds, self._end)
            self._timer.daemon = True
            self._timer.start()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        where = "after its answers were there (update, weight sync, checkpoint)"
        sys.stderr.write(error_lines(f"no step has ended {self._seconds:.0f} s {where}: {_REMEDY}"))
        sys.stderr.flush()
        os._exit(1)
