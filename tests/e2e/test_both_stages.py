"""Real SFT, merge and GRPO on the CPU: verl's trainers, FSDP2, Ray, TransferQueue and vLLM, as a user starts them.

One SFT model and one GRPO run of two steps serve all tests; what is asserted is read from verl's own logs, rollouts
and checkpoints.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from stages import SFT_STEPS, Stage, answers_by_row, run_stage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ffr_verl.evaluation import evaluate_file
from ffr_verl.fragments import MalformedReason
from ffr_verl.integrations.verl.merge import merge_checkpoint
from ffr_verl.rewards import Diagnosis, compute_score, diagnose
from ffr_verl.samplers import select_rows
from ffr_verl.samplers.difficulty import LEVELS
from ffr_verl.samplers.difficulty_file import DifficultyFile, row_keys

pytestmark = pytest.mark.timeout(1200)

REWARD_KEYS = {"score", "f1", "f1_utterances", "f1_images", "coherence", "format", "exact_match"}


@pytest.fixture(scope="module")
def grpo(folder: Path, sft_model: Path, embeddings: Path, small_train: Path, difficulty: Path) -> Stage:
    """Two steps of the published curriculum with the group filter, in micro-batches of one row."""
    return run_stage(
        "grpo",
        folder,
        [
            "verl.trainer.main_ppo",
            "+recipe=ffr_grpo_published_cpu",
            f"actor_rollout_ref.model.path={sft_model}",
            f"data.train_files={small_train}",
            f"data.val_files={folder / 'heldout.rl.parquet'}",
            f"data.ffr.curriculum.difficulty={difficulty}",
            "data.max_prompt_length=1024",
            "data.max_response_length=48",
            "data.train_batch_size=12",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=12",
            "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1",
            "actor_rollout_ref.actor.optim.lr=1e-3",
            "trainer.total_training_steps=2",
            "trainer.save_freq=1",
            "trainer.test_freq=2",
            "trainer.max_actor_ckpt_to_keep=3",
            f"reward.custom_reward_function.reward_kwargs.embeddings={embeddings}",
            # The published one is 0 where images have no vectors.
            "reward.custom_reward_function.reward_kwargs.coherence_mode=continuous",
            f"trainer.rollout_data_dir={folder / 'rollouts'}",
            f"trainer.validation_data_dir={folder / 'validation'}",
        ],
        seconds=700,
    )


def rollouts(folder: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rollouts" / f"{step}.jsonl").read_text().splitlines()]


def test_sft_learns_the_format(sft: Stage) -> None:
    losses = sft.values("train/loss")
    assert len(losses) == SFT_STEPS
    assert losses[0] > 3
    assert sum(losses[-5:]) / 5 < 0.8


def test_merge_gives_a_whole_model(folder: Path, sft_model: Path) -> None:
    base, merged = load_file(folder / "base" / "model.safetensors"), load_file(sft_model / "model.safetensors")
    assert base.keys() == merged.keys()
    # verl's merger writes bf16.
    changed = {name for name in base if not base[name].bfloat16().equal(merged[name])}
    assert changed
    assert not [name for name in changed if "visual" in name], "full fine-tuning leaves the vision tower as it is"
    for name in ("config.json", "tokenizer.json", "processor_config.json", "generation_config.json"):
        assert (sft_model / name).is_file(), name


def test_grpo_ran_its_two_steps(grpo: Stage) -> None:
    assert [entry["step"] for entry in grpo.metrics if "actor/loss" in entry["data"]] == [1, 2]
    assert all(math.isfinite(value) for value in grpo.values("actor/loss"))


def test_the_platform_reached_every_process(grpo: Stage) -> None:
    """The trainer's actors, the reward worker and the process inside vLLM, which Ray does not start."""
    chosen = [line for line in grpo.log.splitlines() if "Platform override from VERL_PLATFORM: cpu" in line]
    for process in ("TaskRunner", "WorkerDict", "RewardLoopWorker", "vLLMHttpServer"):
        assert any(process in line for line in chosen), process


def test_rewards_vary_inside_a_group(folder: Path, grpo: Stage) -> None:
    for step in (1, 2):
        groups = defaultdict(list)
        for row in rollouts(folder, step):
            groups[row["input"]].append(row["score"])
        assert {len(scores) for scores in groups.values()} == {4}
        assert any(len(set(scores)) > 1 for scores in groups.values())
        assert any(row["score"] > 0 for row in rollouts(folder, step))


@dataclasses.dataclass(frozen=True)
class Answer:
    """A rollout as verl wrote it down, and what our reward gives for it."""

    row: dict[str, Any]
    scores: dict[str, float]
    found: Diagnosis


def answers(folder: Path, step: int, embeddings: Path) -> list[Answer]:
    """The step's rollouts, scored again; the prompt tells which row of the data each belongs to."""
    table = pq.read_table(folder / "train.rl.parquet")
    prompts, infos = (table.column(name).to_pylist() for name in ("prompt", "extra_info"))
    contents = [prompt[-1]["content"].replace("<image>", "") for prompt in prompts]
    result = []
    for row in rollouts(folder, step):
        info = next(info for content, info in zip(contents, infos, strict=True) if content in row["input"])
        scores = compute_score("ffr/mldr", row["output"], row["gts"], info, embeddings=str(embeddings))
        result.append(Answer(row, scores, diagnose(row["output"], row["gts"], extra_info=info)))
    return result


def test_the_logged_scores_are_those_of_compute_score(folder: Path, grpo: Stage, embeddings: Path) -> None:
    """The model's text, decoded by verl, earns the same reward again, coherence included."""
    found = [answer for step in (1, 2) for answer in answers(folder, step, embeddings)]
    for answer in found:
        assert answer.row["score"] == pytest.approx(answer.scores["score"], abs=1e-5), answer
    assert any(answer.scores["format"] for answer in found)
    assert len({answer.scores["coherence"] for answer in found}) > 3, "coherence is at work"


def test_reward_components_reach_the_training_curves(folder: Path, grpo: Stage, embeddings: Path) -> None:
    """In verl's file log, its console log and tensorboard; the numbers are those of the rollouts."""
    for step in (1, 2):
        data = next(entry["data"] for entry in grpo.metrics if entry["step"] == step and "actor/loss" in entry["data"])
        found = answers(folder, step, embeddings)
        for name in REWARD_KEYS:
            values = [answer.scores[name] for answer in found]
            for statistic, function in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
                assert data[f"ffr/reward/{name}/{statistic}"] == pytest.approx(function(values), abs=1e-5)
        for reason in MalformedReason:
            share = np.mean([answer.found.malformed is reason for answer in found])
            assert data[f"ffr/malformed/{reason.value}"] == pytest.approx(share)
        for name in ("predicted_utterances", "predicted_images", "gold_utterances", "gold_images"):
            assert data[f"ffr/size/{name}"] == pytest.approx(np.mean([getattr(one.found, name) for one in found]))
        assert data["ffr/missing_embeddings"] == 0.0
        assert 0.0 <= data["ffr/groups/without_spread"] < 1.0
    assert re.search(r"step:2 .*ffr/reward/coherence/mean:", grpo.log)
    curves = EventAccumulator(str(grpo.tensorboard)).Reload()
    for name in ("ffr/reward/f1/mean", "ffr/malformed/any", "ffr/groups/without_spread", "ffr/size/gold_utterances"):
        logged = [(event.step, event.value) for event in curves.Scalars(name)]
        assert logged == [
            (step, pytest.approx(value, rel=1e-5)) for step, value in zip((1, 2), grpo.values(name), strict=True)
        ]


def test_groups_without_spread_were_replaced(folder: Path, grpo: Stage) -> None:
    """The recipe's tolerance: what was trained on differs by more."""
    for step in (1, 2):
        groups = defaultdict(list)
        for row in rollouts(folder, step):
            groups[row["input"]].append(row["score"])
        assert len(groups) == 12
        assert all(np.std(scores) > 0.001 for scores in groups.values())


def test_all_reward_keys_arrive(grpo: Stage) -> None:
    for step in (0, 2):
        data = next(
            entry["data"] for entry in grpo.metrics if entry["step"] == step and "val-aux" in str(entry["data"])
        )
        arrived = {key.split("/")[3] for key in data if key.startswith(("val-aux/ffr/mldr", "val-core/ffr/mldr"))}
        assert arrived >= REWARD_KEYS


def test_rollout_and_trainer_agree_on_token_probabilities(grpo: Stage) -> None:
    correlations = grpo.values("training/rollout_actor_probs_pearson_corr")
    assert len(correlations) == 2
    assert min(correlations) >= 0.98
    # After the first update the adapter has travelled to vLLM; without it the second step would differ.
    assert max(grpo.values("training/rollout_probs_diff_max")) < 0.01


def test_the_weights_changed_and_the_vision_tower_did_not(folder: Path, sft_model: Path, grpo: Stage) -> None:
    assert all(value > 0 for value in grpo.values("actor/grad_norm"))
    states = [load_file(sft_model / "model.safetensors")]
    for step in (1, 2):
        merged = merge_checkpoint(grpo.checkpoints / f"global_step_{step}", folder / "models" / f"grpo_{step}")
        states.append(load_file(merged / "model.safetensors"))
    for before, after in itertools.pairwise(states):
        assert before.keys() == after.keys()
        changed = {name for name in before if not before[name].equal(after[name])}
        assert changed
        assert not [name for name in changed if "visual" in name]


@pytest.mark.parametrize("step", [0, 2])
def test_verls_validation_and_evaluate_agree(folder: Path, grpo: Stage, step: int) -> None:
    """The same answers, as verl wrote them down, give the numbers of verl's own `val-*` metrics, micro ones too."""
    logged = next(entry["data"] for entry in grpo.metrics if entry["step"] == step and "val-aux" in str(entry["data"]))
    found = evaluate_file(folder / "validation" / f"{step}.jsonl", row_format="verl")
    assert found.samples == 8
    assert set(found.rewards) >= {"f1", "f1_utterances", "f1_images", "format", "exact_match"}
    for name, value in found.rewards.items():
        key = next(key for key in logged if key.startswith("val-") and key.endswith(f"/{name}/mean@1"))
        assert logged[key] == pytest.approx(value, abs=1e-6), name
    for kind in ("utterance", "image", "joint"):
        for metric in ("f1", "mcc"):
            key = f"val-aux/ffr/mldr/micro_{kind}_{metric}/mean@1"
            assert logged[key] == pytest.approx(found.micro[kind][metric], abs=1e-6), key


def test_the_rows_come_in_the_order_of_the_published_curriculum(
    folder: Path, grpo: Stage, small_train: Path, difficulty: Path
) -> None:
    """Groups without spread are evicted and the next rows of the curriculum generated in their place."""
    rows = DifficultyFile(difficulty).of_rows(row_keys([small_train]), name="train")
    order = select_rows(rows.levels, rows.f1, rows.is_negative).tolist()
    position = 0
    for step in (1, 2):
        trained = set(answers_by_row(folder / "rollouts" / f"{step}.jsonl", small_train))
        data = next(entry["data"] for entry in grpo.metrics if entry["step"] == step and "actor/loss" in entry["data"])
        evicted = data.get("training/filter_groups/evicted_samples", 0)
        discarded = data.get("training/filter_groups/discarded_surplus_samples", 0)
        drawn = order[position : position + 12 + int(evicted + discarded)]
        position += len(drawn)
        assert len(trained) == 12
        assert trained <= set(drawn)
        assert data["ffr/curriculum/coverage"] == pytest.approx(position / len(rows))
        shares = [data[f"ffr/curriculum/share/{level}"] for level in LEVELS]
        assert shares == pytest.approx([float(np.mean(rows.levels[drawn] == level)) for level in LEVELS])


def test_sft_with_lora_on_rows_without_images(folder: Path, sft_model: Path) -> None:
    """The recipe as it is, LoRA included, over micro-batches without a picture; then its adapter folded in."""
    stage = run_stage(
        "sft_text",
        folder,
        [
            "verl.trainer.sft_trainer",
            "+recipe=ffr_sft_cpu",
            f"model.path={sft_model}",
            f"data.train_files={folder / 'text.sft.parquet'}",
            "data.max_length=1024",
            "data.micro_batch_size_per_gpu=8",
            "optim.lr=1e-3",
            "trainer.total_training_steps=2",
            "trainer.total_epochs=10",
            "trainer.save_freq=2",
        ],
        seconds=200,
    )
    assert len(stage.values("train/loss")) == 2
    before = load_file(sft_model / "model.safetensors")
    after = load_file(merge_checkpoint(stage.checkpoints, folder / "models" / "sft_text") / "model.safetensors")
    changed = [name for name in before if not before[name].equal(after[name])]
    assert changed
    assert all("visual" not in name for name in changed)
