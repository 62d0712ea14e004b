"""GRPO stopped by SIGTERM and by kill -9 in the middle of a checkpoint, and gone on with: the same rows in the same
order as a run that nobody stopped.

The uninterrupted run is played by the sampler alone, which is told the rewards that the real run wrote down.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from doc_examples import written_example
from stages import answers_by_row, run_stage

from ffr_verl.demo.processes import StageFailed
from ffr_verl.integrations.verl.checkpoint_folders import missing_in_step
from ffr_verl.integrations.verl.training_rows import TrainingRows
from ffr_verl.samplers import CurriculumConfig, CurriculumSampler
from ffr_verl.settings import OnlineConfig

pytestmark = pytest.mark.timeout(1000)

STEPS, BATCH, SEED = 4, 8, 5


@pytest.fixture(scope="module")
def arguments(folder: Path, sft_model: Path, small_train: Path, difficulty: Path) -> list[str]:
    return [
        "verl.trainer.main_ppo",
        "+recipe=ffr_grpo_online_cpu",
        f"actor_rollout_ref.model.path={sft_model}",
        f"data.train_files={small_train}",
        f"data.val_files={folder / 'heldout.rl.parquet'}",
        f"data.ffr.curriculum.difficulty={difficulty}",
        "data.ffr.curriculum.online.metric=reward",
        f"data.ffr.curriculum.seed={SEED}",
        "data.max_prompt_length=1024",
        "data.max_response_length=48",
        f"data.train_batch_size={BATCH}",
        "algorithm.filter_groups.enable=false",
        "actor_rollout_ref.rollout.n=4",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={BATCH}",
        # Of one row each: a row without images is a micro-batch without any, which verl's forward does not take.
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        f"trainer.total_training_steps={STEPS}",
        "trainer.val_before_train=false",
        "trainer.save_freq=1",
        "trainer.test_freq=-1",
        f"trainer.rollout_data_dir={folder / 'resume_rollouts'}",
    ]


def stop_when(condition: Callable[[], bool], signal_number: int) -> threading.Event:
    """Signal every process that this one starts, as soon as the condition holds; the event tells that it was done."""
    done = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if condition():
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.send_signal(signal_number)
                done.set()
                return
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    return done


def latest(checkpoints: Path) -> str:
    file = checkpoints / "latest_checkpointed_iteration.txt"
    return file.read_text() if file.is_file() else ""


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(
    folder: Path, arguments: list[str], small_train: Path, difficulty: Path
) -> None:
    checkpoints, rollouts = folder / "resume", folder / "resume_rollouts"

    after_first_step = stop_when(lambda: (rollouts / "1.jsonl").is_file(), signal.SIGTERM)
    with pytest.raises(StageFailed):
        run_stage("resume", folder, arguments, seconds=400)
    assert after_first_step.is_set()
    assert latest(checkpoints) == "1"

    in_a_checkpoint = stop_when(
        lambda: (checkpoints / "global_step_2" / "actor").is_dir() and latest(checkpoints) == "1", signal.SIGKILL
    )
    with pytest.raises(StageFailed):
        run_stage("resume", folder, arguments, seconds=400)
    assert in_a_checkpoint.is_set()
    assert latest(checkpoints) == "1", "killed before the checkpoint was complete"
    assert missing_in_step(checkpoints / "global_step_2", "grpo")

    stage = run_stage("resume", folder, arguments, seconds=400)
    assert [entry["step"] for entry in stage.metrics if "actor/loss" in entry["data"]][-3:] == [2, 3, 4]

    config = CurriculumConfig(
        order="online", seed=SEED, difficulty=str(difficulty), online=OnlineConfig(metric="reward")
    )
    rows = TrainingRows.of(datasets.Dataset.from_parquet(str(small_train)), config, [str(small_train)])
    uninterrupted = CurriculumSampler(rows.difficulty, config)
    has_images = [bool(images) for images in pq.read_table(small_train).column("images").to_pylist()]
    trained_with_images = set()
    for step in range(1, STEPS + 1):
        drawn = [uninterrupted.row_at((step - 1) * BATCH + place) for place in range(BATCH)]
        answers = answers_by_row(rollouts / f"{step}.jsonl", small_train)
        assert {len(group) for group in answers.values()} == {4}
        deviations = {row: float(np.std([answer["score"] for answer in group])) for row, group in answers.items()}
        assert sorted(deviations) == sorted(drawn), f"rows of step {step}"
        trained_with_images |= {has_images[row] for row in drawn}
        metrics = uninterrupted.update(deviations)
        if step > 1:  # verl's file logger begins anew with every start
            logged = next(
                entry["data"] for entry in stage.metrics if entry["step"] == step and "actor/loss" in entry["data"]
            )
            assert {name: logged[name] for name in metrics} == pytest.approx(metrics)

    assert trained_with_images == {True, False}, "rows without images were trained on too"

    saved: dict[str, Any] = torch.load(checkpoints / f"global_step_{STEPS}" / "data.pt", weights_only=False)
    state, expected = saved["dataset_state"], uninterrupted.state_dict()
    assert state["draws"].tolist() == expected["draws"].tolist()
    for found, wanted in zip(state["online"]["parts"], expected["online"]["parts"], strict=True):
        assert found["spreads"].tolist() == pytest.approx(wanted["spreads"].tolist(), abs=1e-5)
        assert found["random"] == wanted["random"]
    assert state["micro"]["weight"] > 0, "where the policy stands is saved, too"


def test_an_order_of_ones_own_is_resumed(
    folder: Path, arguments: list[str], small_train: Path, tmp_path: Path
) -> None:
    """The order of docs/curriculum.md, stopped after its first step: the rows of a run that nobody stopped."""
    file = written_example("curriculum.md", "shortest_first.py", tmp_path)
    checkpoints, rollouts = folder / "own_order", folder / "own_order_rollouts"
    weights = {"with_images": 3, "utterances_only": 1}
    own = [
        *[one for one in arguments if not one.startswith(("data.ffr.curriculum.", "trainer.rollout_data_dir="))],
        f"data.ffr.curriculum.order={file}:ShortestFirst",
        "+data.ffr.curriculum.settings={weights: {with_images: 3, utterances_only: 1}}",
        f"data.ffr.curriculum.seed={SEED}",
        f"trainer.rollout_data_dir={rollouts}",
    ]
    after_first_step = stop_when(lambda: (rollouts / "1.jsonl").is_file(), signal.SIGTERM)
    with pytest.raises(StageFailed):
        run_stage("own_order", folder, own, seconds=400)
    assert after_first_step.is_set()
    assert latest(checkpoints) == "1"
    stage = run_stage("own_order", folder, own, seconds=400)
    assert [entry["step"] for entry in stage.metrics if "actor/loss" in entry["data"]][-3:] == [2, 3, 4]

    config = CurriculumConfig(order=f"{file}:ShortestFirst", seed=SEED, settings={"weights": weights})
    rows = TrainingRows.of(datasets.Dataset.from_parquet(str(small_train)), config, [str(small_train)])
    uninterrupted = CurriculumSampler(rows.difficulty, config)
    for step in range(1, STEPS + 1):
        drawn = [uninterrupted.row_at((step - 1) * BATCH + place) for place in range(BATCH)]
        assert sorted(answers_by_row(rollouts / f"{step}.jsonl", small_train)) == sorted(set(drawn)), f"step {step}"
        metrics = uninterrupted.update({})
        if step > 1:
            logged = next(
                entry["data"] for entry in stage.metrics if entry["step"] == step and "actor/loss" in entry["data"]
            )
            assert {name: logged[name] for name in metrics} == pytest.approx(metrics)
