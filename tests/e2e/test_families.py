"""Each model family through both stages on the CPU, with a tiny random model; `test_both_stages` has Qwen2-VL."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from stages import run_stage

from ffr_verl.demo.base_model import write_base_model
from ffr_verl.demo.processes import run_logged
from ffr_verl.integrations.verl.merge import merge_checkpoint
from ffr_verl.model_families import FAMILIES

pytestmark = [pytest.mark.timeout(1000), pytest.mark.rotating]

STEPS = 2


def changed(before: Path, after: Path) -> list[str]:
    """Names of the weights that differ; verl's merger writes bf16."""
    first, second = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert first.keys() == second.keys()
    return [name for name in first if not first[name].bfloat16().equal(second[name].bfloat16())]


def answers(model: Path, data: Path, output: Path) -> list[str]:
    """Of `ffr-verl infer`, as a user calls it."""
    command = [sys.executable, "-m", "ffr_verl", "infer", "--model", str(model), "--data", str(data)]
    run_logged(
        [*command, "--output", str(output), "--max-model-len", "1024", "--max-new-tokens", "16"],
        log=output.with_suffix(".log"),
        on_line=lambda _line: None,
        time_limit=300,
        environment={"HF_HUB_OFFLINE": "1"},
    )
    return [json.loads(line)["response"] for line in output.read_text().splitlines()]


# Not Qwen3.5: vLLM 0.24's CPU build tells nan for the probabilities of its rollout (docs/recipes.md).
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_a_family_goes_through_both_stages(folder: Path, small_train: Path, name: str) -> None:
    place, heldout = folder / name, folder / "heldout.rl.parquet"
    place.mkdir()
    base = write_base_model(place / "base", family=FAMILIES[name], seed=0)
    sft = run_stage(
        "sft",
        place,
        [
            "verl.trainer.sft_trainer",
            "+recipe=ffr_sft_cpu",
            f"model.path={base}",
            "model.lora_rank=0",
            f"data.train_files={folder / 'train.sft.parquet'}",
            "data.max_length=1024",
            "data.train_batch_size=8",
            "data.micro_batch_size_per_gpu=1",  # some without an image
            "optim.lr=2e-3",
            f"trainer.total_training_steps={STEPS}",
            f"trainer.save_freq={STEPS}",
        ],
        seconds=300,
    )
    assert all(math.isfinite(value) for value in sft.values("train/loss"))
    model = merge_checkpoint(sft.checkpoints, place / "sft_model")
    trained = changed(base, model)
    assert trained
    assert not [key for key in trained if FAMILIES[name].vision_tower in key.split(".")]
    assert any(answers(model, heldout, place / "sft_answers.jsonl"))
    grpo = run_stage(
        "grpo",
        place,
        [
            "verl.trainer.main_ppo",
            "+recipe=ffr_grpo_cpu",
            f"actor_rollout_ref.model.path={model}",
            f"data.train_files={small_train}",
            f"data.val_files={heldout}",
            "data.max_prompt_length=960",
            "data.max_response_length=24",
            "data.train_batch_size=4",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
            "actor_rollout_ref.actor.optim.lr=1e-3",
            "trainer.val_before_train=false",
            "trainer.test_freq=-1",
            f"trainer.total_training_steps={STEPS}",
            f"trainer.save_freq={STEPS}",
        ],
        seconds=600,
    )
    correlations = grpo.values("training/rollout_actor_probs_pearson_corr")
    assert len(correlations) == STEPS
    assert min(correlations) >= 0.98
    last = merge_checkpoint(grpo.checkpoints, place / "grpo_model")
    assert not [key for key in changed(model, last) if FAMILIES[name].vision_tower in key.split(".")]
    assert any(answers(last, heldout, place / "grpo_answers.jsonl"))
