"""GRPO stopped by SIGTERM and by kill -9 in the middle of a checkpoint, and resumed: the same rows in the same order
as a run that nobody stopped.

The uninterrupted run is played by the sampler alone, which is told the rewards that the real run wrote down.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from doc_examples import written_example
from stages import (
    ONLINE_ANSWERS,
    ONLINE_BATCH,
    ONLINE_SEED,
    ONLINE_STEPS,
    answers_by_row,
    check_steps,
    is_written,
    latest,
    online_sampler,
    run_stage,
    stop_when,
)

from ffr_verl.demo.processes import StageFailed
from ffr_verl.integrations.verl.checkpoint_folders import missing_in_step
from ffr_verl.integrations.verl.training_rows import TrainingRows
from ffr_verl.samplers import CurriculumConfig, CurriculumSampler

pytestmark = pytest.mark.timeout(1000)

KILLS = int(os.environ.get("FFR_ATTACKS", "0")) // 100


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(
    folder: Path, online_arguments: list[str], small_train: Path, difficulty: Path
) -> None:
    checkpoints, rollouts = folder / "resume", folder / "resume_rollouts"

    after_first_step = stop_when(lambda: is_written(rollouts), signal.SIGTERM)
    arguments = [*online_arguments, f"trainer.rollout_data_dir={rollouts}"]
    with pytest.raises(StageFailed):
        run_stage("resume", folder, arguments, seconds=400)
    assert after_first_step.is_set()
    assert latest(checkpoints) == "1"

    # The last file of the checkpoint is a pipe that nobody reads: verl waits in it, before the step is named, for the
    # kill.
    last = checkpoints / "global_step_2" / "data.pt"
    last.parent.mkdir()
    os.mkfifo(last)
    in_a_checkpoint = stop_when(lambda: missing_in_step(last.parent, "grpo") == [last.name], signal.SIGKILL)
    with pytest.raises(StageFailed):
        run_stage("resume", folder, arguments, seconds=400)
    assert in_a_checkpoint.is_set()
    last.unlink()
    assert latest(checkpoints) == "1", "killed before the checkpoint was complete"
    assert missing_in_step(last.parent, "grpo") == [last.name]

    stage = run_stage("resume", folder, arguments, seconds=400)
    assert [entry["step"] for entry in stage.metrics if "actor/loss" in entry["data"]][-3:] == [2, 3, 4]

    uninterrupted = online_sampler(small_train, difficulty)
    has_images = [bool(images) for images in pq.read_table(small_train).column("images").to_pylist()]
    trained = check_steps(stage, uninterrupted, rollouts, small_train, logged_from=2)
    assert {has_images[row] for row in trained} == {True, False}, "rows without images were trained on too"

    saved: dict[str, Any] = torch.load(checkpoints / f"global_step_{ONLINE_STEPS}" / "data.pt", weights_only=False)
    state, expected = saved["dataset_state"], uninterrupted.state_dict()
    assert state["draws"].tolist() == expected["draws"].tolist()
    for found, wanted in zip(state["online"]["parts"], expected["online"]["parts"], strict=True):
        assert found["spreads"].tolist() == pytest.approx(wanted["spreads"].tolist(), abs=1e-5)
        assert found["random"] == wanted["random"]
    assert state["micro"]["weight"] > 0, "where the policy stands is saved, too"


@pytest.mark.skipif(not KILLS, reason="one kill for 100 of FFR_ATTACKS (make attack), of two minutes each")
@pytest.mark.timeout(150 * KILLS + 1000)
def test_killed_in_checkpoint_after_checkpoint(
    folder: Path, online_arguments: list[str], small_train: Path, difficulty: Path
) -> None:
    """kill -9 of every process at a random moment from the first file of a checkpoint on, half of them while it is
    written (a tenth of a second): the newest one that is named is whole each time, the run resumes from it, and in the
    end no row is lost or met twice."""
    checkpoints, rollouts, steps = folder / "killed", folder / "killed_rollouts", KILLS + 2
    arguments = [*online_arguments, f"trainer.rollout_data_dir={rollouts}", f"trainer.total_training_steps={steps}"]
    source, left = random.Random(0), Counter[str]()
    for number in range(KILLS):
        before, started = int(latest(checkpoints) or 0), time.time()
        place, delay = checkpoints / f"global_step_{before + 1}", source.choice((0.1, 3.0)) * source.random()

        def in_a_checkpoint(place: Path = place, started: float = started, delay: float = delay) -> bool:
            with contextlib.suppress(FileNotFoundError):  # a temporary file that has its name by now
                if any(file.stat().st_mtime > started for file in place.rglob("*")):
                    time.sleep(delay)
                    return True
            return False

        killed = stop_when(in_a_checkpoint, signal.SIGKILL)
        with pytest.raises(StageFailed):
            run_stage("killed", folder, arguments, seconds=400)
        assert killed.is_set(), f"kill {number}"
        now = int(latest(checkpoints) or 0)
        assert now in (before, before + 1)
        assert not now or not missing_in_step(checkpoints / f"global_step_{now}", "grpo")
        left["after a checkpoint" if now > before else "in a checkpoint"] += 1
    run_stage("killed", folder, arguments, seconds=400 + 20 * KILLS)
    check_chain(checkpoints, rollouts, small_train, difficulty, steps=steps)
    sys.stdout.write(f"kill -9 of GRPO: {dict(left)}\n")


def check_chain(checkpoints: Path, rollouts: Path, data: Path, difficulty: Path, *, steps: int) -> None:
    """The rows of each step are those that the curriculum draws from the state in the checkpoint before it.

    verl writes a step's rollouts behind its checkpoint, so a kill may leave a step without.
    """
    state: dict[str, Any] | None = None
    draws = 0
    for step in range(1, steps + 1):
        alone = online_sampler(data, difficulty)
        if state is not None:
            alone.load_state_dict(state)
        drawn = Counter(alone.row_at((step - 1) * ONLINE_BATCH + place) for place in range(ONLINE_BATCH))
        saved = torch.load(checkpoints / f"global_step_{step}" / "data.pt", weights_only=False)
        state = saved["dataset_state"]
        added = np.asarray(state["draws"], dtype=int) - draws
        assert dict(enumerate(added)) == {row: drawn[row] for row in range(len(added))}, f"rows of step {step}"
        draws = draws + added
        if (rollouts / f"{step}.jsonl").is_file():
            found = answers_by_row(rollouts / f"{step}.jsonl", data)
            assert {row: len(group) for row, group in found.items()} == {
                row: ONLINE_ANSWERS * count for row, count in drawn.items()
            }


def test_an_order_of_ones_own_is_resumed(
    folder: Path, online_arguments: list[str], small_train: Path, tmp_path: Path
) -> None:
    """The order of docs/curriculum.md, stopped after its first step: the rows of a run that nobody stopped."""
    file = written_example("curriculum.md", "shortest_first.py", tmp_path)
    checkpoints, rollouts = folder / "own_order", folder / "own_order_rollouts"
    weights = {"with_images": 3, "utterances_only": 1}
    own = [
        *[one for one in online_arguments if not one.startswith("data.ffr.curriculum.")],
        f"data.ffr.curriculum.order={file}:ShortestFirst",
        "+data.ffr.curriculum.settings={weights: {with_images: 3, utterances_only: 1}}",
        f"data.ffr.curriculum.seed={ONLINE_SEED}",
        f"trainer.rollout_data_dir={rollouts}",
    ]
    after_first_step = stop_when(lambda: is_written(rollouts), signal.SIGTERM)
    with pytest.raises(StageFailed):
        run_stage("own_order", folder, own, seconds=400)
    assert after_first_step.is_set()
    assert latest(checkpoints) == "1"
    stage = run_stage("own_order", folder, own, seconds=400)
    assert [entry["step"] for entry in stage.metrics if "actor/loss" in entry["data"]][-3:] == [2, 3, 4]

    config = CurriculumConfig(order=f"{file}:ShortestFirst", seed=ONLINE_SEED, settings={"weights": weights})
    rows = TrainingRows.of(datasets.Dataset.from_parquet(str(small_train)), config, [str(small_train)])
    uninterrupted = CurriculumSampler(rows.difficulty, config)
    check_steps(stage, uninterrupted, rollouts, small_train, logged_from=2)
