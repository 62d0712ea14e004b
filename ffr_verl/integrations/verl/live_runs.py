"""GRPO runs of verl that are alive on this machine, and whether one is in the way of another.

verl's trainer and its vLLM hand weights over through a socket in /tmp that is named by the Ray job id, and the first
job of every Ray cluster has the same id: two runs, each with a local Ray of its own, wait for ever at the next sync.
The socket is there only while weights travel, and a run that was killed may leave its file, so it is the processes
that are looked at.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from ffr_verl.errors import FFRError, one_line

FIRST_JOB = "01000000"  # Ray's id of the first job of a cluster
_DRIVER = ("-m", "verl.trainer.main_ppo")
_ACTORS = ("ray::TaskRunner", "ray::vLLMHttpServer")  # verl's, as Ray names their processes
_SECONDS_TO_END = 5.0  # that the processes of a run which has ended may take


class Run(NamedTuple):
    """A process of a run."""

    pid: int
    since: float  # seconds of the epoch
    command: str

    def __str__(self) -> str:
        since = datetime.datetime.fromtimestamp(self.since)
        return f"pid {self.pid}, since {since:%Y-%m-%d %H:%M:%S}: {one_line(self.command, longest=100)}"


def live_runs() -> list[Run]:
    """Processes of runs, other than this one, whose Ray job is or may be the first of its cluster; the oldest first.

    Of another user's process the job is not known, so it counts.
    """
    me = psutil.Process()
    own = {me.pid, *[parent.pid for parent in me.parents()]}
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        command = process.info["cmdline"] or [""]
        if process.pid in own or not (command[0].startswith(_ACTORS) or _DRIVER in itertools.pairwise(command)):
            continue
        environment: dict[str, str] = {}
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
        is_elsewhere = environment.get("RAY_JOB_ID", FIRST_JOB) != FIRST_JOB or (
            "RAY_JOB_ID" not in environment and environment.get("RAY_ADDRESS", "") not in ("", "local")
        )
        if not is_elsewhere:
            found.append(Run(process.pid, process.info["create_time"] or 0.0, " ".join(command)))
    return sorted(found, key=lambda run: run.since)


def joined_cluster(address: str | None) -> str | None:
    """The cluster that `ray.init(address=address)` joins, as Ray 2.60 decides it: `auto` where it looks for one of
    `ray start` on this machine, `None` where it starts one of its own."""
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    if address is None:
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
        return "auto" if Path(folder, "ray", "ray_current_cluster").exists() else None
    return None if address == "local" else address


def check_no_other_run(address: str | None) -> None:
    """An `FFRError` that names the run beside which one with this address of Ray would hang."""
    if joined_cluster(address) is not None:
        return
    deadline = time.monotonic() + _SECONDS_TO_END
    while runs := live_runs():
        is_ending = not any(_DRIVER[1] in run.command for run in runs)
        if not is_ending or time.monotonic() > deadline:
            raise FFRError(
                f"another GRPO run is alive on this machine ({runs[0]}); each has a local Ray, whose jobs have the "
                "same id, so both would wait for ever at one weight-sync socket of verl: wait for its end, or run "
                "both in one Ray cluster, where job ids differ (`ray start --head`, see docs/pipeline.md)"
            )
        time.sleep(0.5)
