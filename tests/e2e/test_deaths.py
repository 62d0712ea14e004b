"""One process of a GRPO run is killed in the middle of a step: the run ends, says why, and leaves nothing running."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from stages import is_written, latest, run_stage, stop_when

from ffr_verl.demo.processes import StageFailed

pytestmark = [pytest.mark.timeout(600), pytest.mark.rotating]

SECONDS = 60.0


FAILED = r"ffr_verl\.errors\.FFRError: step \d+: no group has an answer, each of them failed: a process .* has died"
DIED = r"ray\.exceptions\.ActorDiedError: The actor died unexpectedly before finishing this task\.(?s:.){0,200}"


@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("RewardLoopWorker", FAILED),
        ("VLLM::EngineCore", FAILED),
        ("WorkerDict", rf"{DIED}WorkerDict"),
        ("TaskRunner", rf"{DIED}TaskRunner"),
    ],
)
def test_a_death_ends_the_run(folder: Path, online_arguments: list[str], victim: str, message: str) -> None:
    name = f"death_{victim.replace(':', '')}"
    rollouts = folder / f"{name}_rollouts"
    killed_at: list[float] = []

    def after_the_first_step() -> bool:
        ready = is_written(rollouts) and latest(folder / name) == "1"
        killed_at.extend([time.monotonic()] if ready else [])
        return ready

    killed = stop_when(after_the_first_step, signal.SIGKILL, named=victim)
    arguments = [
        *online_arguments,
        f"trainer.rollout_data_dir={rollouts}",
        f"trainer.v1.sampler.sampler_kwargs.stall_timeout={SECONDS}",
        "trainer.total_training_steps=20",
    ]
    with pytest.raises(StageFailed) as caught:
        run_stage(name, folder, arguments, seconds=400)
    assert killed.is_set()
    assert "without an end" not in str(caught.value), "it hung"
    assert re.search(message, (folder / f"{name}.log").read_text()), str(caught.value)
    assert time.monotonic() - killed_at[0] < 2 * SECONDS
    left = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in left if str(rollouts) in command]
