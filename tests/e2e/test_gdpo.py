"""GDPO on verl's trainer v1, and the best checkpoint of a run."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from stages import Stage, run_stage
from typer.testing import CliRunner

from ffr_verl.cli import app
from ffr_verl.integrations.verl.checkpoint_folders import read_results
from ffr_verl.rewards import compute_score

pytestmark = pytest.mark.timeout(1000)

STEPS, BATCH, GROUP = 3, 8, 4


@pytest.fixture(scope="module")
def gdpo(folder: Path, sft_model: Path, small_train: Path) -> Stage:
    """Three steps, each saved and validated; without a difficulty file."""
    return run_stage(
        "gdpo",
        folder,
        [
            "verl.trainer.main_ppo",
            "+recipe=ffr_gdpo_cpu",
            f"actor_rollout_ref.model.path={sft_model}",
            f"data.train_files={small_train}",
            f"data.val_files={folder / 'heldout.rl.parquet'}",
            "data.max_prompt_length=1024",
            "data.max_response_length=48",
            f"data.train_batch_size={BATCH}",
            f"actor_rollout_ref.rollout.n={GROUP}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={BATCH}",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
            "actor_rollout_ref.actor.optim.lr=1e-3",
            "trainer.val_before_train=false",
            f"trainer.total_training_steps={STEPS}",
            "trainer.save_freq=1",
            "trainer.test_freq=1",
            f"trainer.rollout_data_dir={folder / 'gdpo_rollouts'}",
        ],
        seconds=600,
    )


def test_every_step_trained_on_whitened_advantages(gdpo: Stage) -> None:
    assert all(math.isfinite(value) for value in gdpo.values("actor/loss"))
    assert all(value > 0 for value in gdpo.values("actor/grad_norm"))
    means, most, least = (gdpo.values(f"critic/advantages/{name}") for name in ("mean", "max", "min"))
    assert len(means) == STEPS
    assert means == pytest.approx([0.0] * STEPS, abs=1e-4), "less their mean over the tokens of the batch"
    pairs = list(zip(most, least, strict=True))
    assert all(high > 0 > low and max(high, -low) > 1 for high, low in pairs), "of deviation 1, however lopsided"
    assert min(gdpo.values("training/rollout_actor_probs_pearson_corr")) >= 0.98


def test_score_metrics_and_dumps_keep_the_rewards(folder: Path, gdpo: Stage) -> None:
    for step in range(1, STEPS + 1):
        lines = (folder / "gdpo_rollouts" / f"{step}.jsonl").read_text().splitlines()
        answers = [json.loads(line) for line in lines]
        groups = defaultdict(list)
        for answer in answers:
            assert answer["score"] == pytest.approx(compute_score("", answer["output"], answer["gts"])["score"])
            groups[answer["uid"].split("_")[0]].append(answer["score"])
        assert {len(group) for group in groups.values()} == {GROUP}
        data = next(entry["data"] for entry in gdpo.metrics if entry["step"] == step)
        assert data["critic/score/mean"] == pytest.approx(np.mean([answer["score"] for answer in answers]), abs=1e-5)


def test_the_best_checkpoint_is_kept_and_merged(folder: Path, gdpo: Stage) -> None:
    results = read_results(gdpo.checkpoints)
    assert sorted(results) == [1, 2, 3]
    for step, found in results.items():
        data = next(entry["data"] for entry in gdpo.metrics if entry["step"] == step)
        assert found["micro_joint_f1"] == pytest.approx(data["val-aux/ffr/mldr/micro_joint_f1/mean@1"])
    kept = max((1, 2), key=lambda step: (results[step]["micro_joint_f1"], -step))
    assert [path.name for path in (gdpo.checkpoints / "best").iterdir()] == [f"global_step_{kept}"], "at the last save"
    best = max(results, key=lambda step: (results[step]["micro_joint_f1"], -step))
    output = folder / "models" / "gdpo_best"
    command = ["merge", str(gdpo.checkpoints), "--best", "micro_joint_f1", "--output", str(output)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert f"step {best} is the best: micro_joint_f1 {results[best]['micro_joint_f1']:.4f}" in result.output
    assert load_file(output / "model.safetensors")
