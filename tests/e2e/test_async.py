"""GRPO with verl's colocated asynchronous trainer: answers are made ahead of the step that trains on them.

The separate one (`separate_async`) is not run: it wants an accelerator's checkpoint engine and a pool of its own.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stages import Stage, answers_by_row, run_stage

pytestmark = pytest.mark.timeout(1000)

BATCH, GROUP, STEPS = 8, 4, 3


@pytest.fixture(scope="module")
def runs(folder: Path, sft_model: Path, small_train: Path, difficulty: Path) -> list[Stage]:
    """Two steps of the online curriculum, then a third by the same command, with the group filter."""
    arguments = [
        "verl.trainer.main_ppo",
        "+recipe=ffr_grpo_online_cpu",
        "trainer.v1.trainer_mode=colocate_async",
        "trainer.v1.sampler.custom_sampler.name=FFRReplayBufferAsync",
        f"actor_rollout_ref.model.path={sft_model}",
        f"data.train_files={small_train}",
        f"data.val_files={folder / 'heldout.rl.parquet'}",
        f"data.ffr.curriculum.difficulty={difficulty}",
        "data.max_prompt_length=1024",
        "data.max_response_length=48",
        f"data.train_batch_size={BATCH}",
        f"actor_rollout_ref.rollout.n={GROUP}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={BATCH}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "trainer.val_before_train=false",
        "trainer.save_freq=1",
        "trainer.test_freq=-1",
        f"trainer.rollout_data_dir={folder / 'async_rollouts'}",
    ]
    return [
        run_stage(
            "async",
            folder,
            [
                *arguments,
                f"trainer.total_training_steps={steps}",
                f"algorithm.filter_groups.enable={str(is_filtered).lower()}",
            ],
            seconds=400,
        )
        for steps, is_filtered in ((STEPS - 1, False), (STEPS, True))
    ]


def test_steps_are_trained_on_what_the_curriculum_drew(folder: Path, runs: list[Stage], small_train: Path) -> None:
    """Also when a run is gone on with: what was made ahead is neither lost nor made again."""
    logged = [entry["data"] for run in runs for entry in run.metrics if "actor/loss" in entry["data"]]
    assert len(logged) == STEPS
    assert all(math.isfinite(data["actor/loss"]) for data in logged)
    assert all("ffr/reward/f1/mean" in data for data in logged)
    assert f"Restored {BATCH} training prompt groups" in runs[1].log
    evicted = logged[-1].get("training/filter_groups/evicted_samples", 0)
    trained: list[int] = []
    for step in range(1, STEPS + 1):
        answers = answers_by_row(folder / "async_rollouts" / f"{step}.jsonl", small_train)
        # A row that was made ahead may have been drawn again, and both groups may be in one batch.
        trained += [row for row, group in answers.items() for _ in range(len(group) // GROUP)]
        assert len(trained) == step * BATCH
        path = runs[0].checkpoints / f"global_step_{step}" / "data.pt"
        if not path.is_file():  # verl keeps the newest ones
            continue
        saved: dict[str, Any] = torch.load(path, weights_only=False)
        draws = saved["dataset_state"]["draws"]
        assert np.all(np.bincount(trained, minlength=len(draws)) <= draws)
        ahead = int(draws.sum()) - len(trained) - (evicted if step == STEPS else 0)
        assert ahead == BATCH, "one batch is made ahead (num_warmup_batches)"
        assert logged[step - 1]["ffr/curriculum/coverage"] == pytest.approx((draws > 0).mean())
