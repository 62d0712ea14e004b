"""FFRReplayBuffer over a real TransferQueue: what it evicts, what it asks for anew, what it logs.

Groups are put there as verl's agent loop puts them; only the engine that would make them is left out.
"""

from __future__ import annotations

import itertools
import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf

from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl.advantages import compute_ffr_advantage, publish
from ffr_verl.integrations.verl.checkpoint_folders import read_results
from ffr_verl.integrations.verl.validation import micro_metrics, results_go_to
from ffr_verl.samplers import CurriculumConfig, CurriculumSampler, FFRReplayBuffer, FFRReplayBufferAsync, RowDifficulty
from ffr_verl.samplers.micro_estimate import MicroEstimate
from ffr_verl.samplers.sampler import activate
from ffr_verl.settings import OnlineConfig

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def queue() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    tq.init(
        OmegaConf.create(
            {
                "controller": {"polling_mode": True},
                "backend": {"SimpleStorage": {"num_data_storage_units": 1}},
            }
        )
    )
    yield
    tq.close()
    ray.shutdown()


class Rollouts:
    """Puts finished groups into the queue, one after another out of a list of rewards; counts what was asked for."""

    def __init__(
        self,
        groups: Sequence[Sequence[float]],
        *,
        partition: str = "train",
        rows: bool = False,
        confusions: Sequence[Any] = ([[1, 0, 1, 3], [0, 0, 0, 1]],),
        error: str | None = None,
        statuses: Sequence[str] = ("finished",),
    ) -> None:
        self._statuses = itertools.cycle(statuses)
        self._error = error  # of the reward, instead of what it returns
        self._rows = rows  # number the rows, as FFRDataset does
        self._confusions = itertools.cycle(confusions)
        self._groups = itertools.cycle(groups)
        self._numbers = itertools.count()
        self._partition = partition
        self.asked = 0

    def __call__(self, count: int) -> int:
        self.asked += count
        for _ in range(count):
            number = next(self._numbers)
            uid, scores, confusion = f"prompt{number:03}", next(self._groups), next(self._confusions)
            for session, score in enumerate(scores):
                info = {
                    "score": score,
                    "f1": score / 2,
                    "malformed": "repeated_id" if score == 0.0 else "",
                    "predicted_utterances": 3,
                    "gold_utterances": 2,
                    "confusion": json.dumps(confusion),
                }
                info = info if self._error is None else {"reward_error": self._error}
                tq.kv_put(
                    key=f"{uid}_{session}_0",
                    partition_id=self._partition,
                    fields={
                        "rm_scores": torch.tensor([0.0, 0.0, score]),
                        "extra_fields": {"reward_extra_info": info},
                        "uid": uid,
                        "data_source": "ffr/mldr",
                        "extra_info": {"dialogue_id": f"d{number}", "images": ["a.png"]},
                        **({"ffr_row": number} if self._rows else {}),
                    },
                    tag={"status": "success"},
                )
            tq.kv_put(
                key=uid,
                partition_id=self._partition,
                tag={"is_prompt": True, "status": next(self._statuses), "global_steps": 1},
            )
        return count


def buffer_for(rollouts: Rollouts, kind: type[Any] = FFRReplayBuffer, **settings: Any) -> Any:
    return kind(
        trainer_mode="sync" if kind is FFRReplayBuffer else "separate_async",
        trainer_config=OmegaConf.create({}),
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs={"poll_interval": 0.01, "train_batch_size": 4, **settings},
        refill_fn=rollouts,
    )


@pytest.fixture
def clear(queue: None) -> Iterator[None]:
    yield
    for partition, items in (tq.kv_list() or {}).items():
        if items:
            tq.kv_clear(partition_id=partition, keys=list(items))


def scores_of(batch: Any) -> list[float]:
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
    return [round(float(value.sum()), 4) for value in data["rm_scores"]]


VARIED, FLAT, NEARLY_FLAT = [0.0, 1.0, 0.5], [0.7, 0.7, 0.7], [0.7, 0.7005, 0.7]


def test_metrics_of_a_step(clear: None) -> None:
    rollouts = Rollouts([VARIED, FLAT, VARIED, NEARLY_FLAT])
    buffer = buffer_for(rollouts, min_std=0.001)
    rollouts(4)
    batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=4)
    assert len(batch.keys) == 12
    assert metrics["ffr/reward/score/mean"] == pytest.approx((1.5 + 2.1 + 1.5 + 2.1005) / 12)
    assert metrics["ffr/reward/f1/max"] == pytest.approx(0.5)
    assert metrics["ffr/malformed/any"] == pytest.approx(2 / 12)
    assert metrics["ffr/malformed/repeated_id"] == pytest.approx(2 / 12)
    assert metrics["ffr/size/predicted_utterances"] == pytest.approx(3.0)
    assert metrics["ffr/size/gold_utterances"] == pytest.approx(2.0)
    assert metrics["ffr/groups/without_spread"] == pytest.approx(0.5)
    assert rollouts.asked == 4, "the filter is off: nothing is replaced"


def test_validation_rows_hold_the_micro_metrics(clear: None, tmp_path: Path) -> None:
    """verl averages what each row holds; over all batches of a validation the mean is the metric of all rows."""
    results_go_to(tmp_path)
    right, wrong, half = [[[2, 0, 0, 3], [1, 0, 0, 1]], [[0, 2, 1, 2], [0, 0, 1, 1]], [[1, 1, 1, 2], [0, 1, 0, 1]]]
    rollouts = Rollouts([[1.0], [0.0], [0.5]], partition="val", confusions=[right, wrong, half])
    buffer = buffer_for(rollouts, filter_groups=True)
    rows: list[dict[str, Any]] = []
    for size in (2, 1):
        rollouts(size)
        batch, metrics = buffer.sample(global_steps=7, partition_id="val", batch_size=size)
        assert metrics == {}
        data = tq.kv_batch_get(keys=batch.keys, partition_id="val", select_fields=["extra_fields"])
        rows += [getattr(one, "data", one)["reward_extra_info"] for one in data["extra_fields"]]
        tq.kv_clear(partition_id="val", keys=batch.keys)
    assert len(rows) == rollouts.asked == 3
    expected = micro_metrics(np.array([right, wrong, half]).sum(axis=0))
    for name, value in expected.items():
        assert np.mean([row[name] for row in rows]) == pytest.approx(value)
    assert [row["score"] for row in rows] == [1.0, 0.0, 0.5], "what the reward returned is still there"
    assert read_results(tmp_path)[7]["micro_joint_f1"] == pytest.approx(expected["micro_joint_f1"])
    assert read_results(tmp_path)[7]["score"] == pytest.approx(0.5)


@pytest.mark.parametrize("partition", ["train", "val"])
@pytest.mark.parametrize("filters", [False, True])
def test_a_reward_that_must_be_mended_ends_the_run(clear: None, partition: str, filters: bool) -> None:
    """verl alone would train on with the answers that are left, and a filter would ask for others without end."""
    rollouts = Rollouts([[0.0, 0.0]], partition=partition, error="reward brevity (mine.py:brevity): raised")
    buffer = buffer_for(rollouts, filter_groups=filters)
    rollouts(2)
    with pytest.raises(FFRError, match=r"^reward brevity \(mine\.py:brevity\): raised$"):
        buffer.sample(global_steps=1, partition_id=partition, batch_size=2)


def test_answers_that_do_not_come_end_the_run(clear: None) -> None:
    """verl's own buffer waits for ever."""
    rollouts = Rollouts([VARIED])
    buffer = buffer_for(rollouts, stall_timeout=0.3)
    rollouts(1)
    with pytest.raises(FFRError, match=r"^no answer has been finished for 0 s: .*resumes from the newest checkpoint"):
        buffer.sample(global_steps=1, partition_id="train", batch_size=2)


def test_a_step_whose_answers_all_failed_ends_the_run(clear: None) -> None:
    """verl's message names a key that would ask a dead process again, for ever."""
    buffer = buffer_for(Rollouts([VARIED]))
    for uid in ("a", "b"):
        tag = {"is_prompt": True, "status": "failure", "global_steps": 1}
        tq.kv_put(key=uid, partition_id="train", tag=tag)
    with pytest.raises(FFRError, match=r"^step 1: no group has an answer.* resumes from the newest checkpoint$"):
        buffer.sample(global_steps=1, partition_id="train", batch_size=2)


@pytest.mark.parametrize(
    ("call", "status", "message"),
    [
        ("time.sleep(60)", 1, "no step has ended 1 s after its answers were there (update, weight sync, checkpoint)"),
        ("watch.waits_for(1); time.sleep(1.5)", 0, ""),
    ],
)
def test_a_step_that_does_not_end_ends_the_process(call: str, status: int, message: str) -> None:
    code = "import time\nfrom ffr_verl.integrations.verl.stalls import StallWatch\n"
    code += f"watch = StallWatch(1.0)\nwatch.left()\n{call}\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert run.returncode == status, run.stderr
    assert message in run.stderr


@pytest.mark.parametrize("credit", ["answer", "id", "components"])
def test_the_estimator_gets_the_advantages_of_each_answer(clear: None, credit: str) -> None:
    """In whatever order verl hands the answers over, padding among them."""
    rollouts = Rollouts([VARIED, FLAT])
    components = {"f1": 1.0} if credit == "components" else {}
    buffer = buffer_for(rollouts, advantage={"credit": credit, "components": components})
    rollouts(2)
    batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=2)
    keys = [*batch.keys[::-1], "pad0_0_0"]
    data = tq.kv_batch_get(keys=keys[:-1], partition_id="train", select_fields=["uid", "rm_scores"])
    names = [str(getattr(one, "data", one)) for one in data["uid"]]
    assert names == keys[:-1]
    mask = torch.ones(len(keys), 4)
    mask[:, 3] = 0
    advantages, returns = compute_ffr_advantage(torch.zeros_like(mask), mask, np.array([*names, "pad0"], dtype=object))
    assert torch.equal(advantages, returns)
    assert advantages[-1].tolist() == [0.0] * 4
    expected = {"prompt000": [-0.5, 0.5, 0.0], "prompt001": [0.0] * 3}
    if credit == "components":
        expected["prompt000"] = (np.array(expected["prompt000"]) / np.sqrt(0.5 / 3 * 18 / 17 / 2)).tolist()
    for key, row in zip(keys[:-1], advantages[:-1].tolist(), strict=True):
        uid, session, _ = key.split("_")
        assert row == pytest.approx([expected[uid][int(session)]] * 3 + [0.0], abs=1e-3)
    scores = [round(float(one.sum()), 4) for one in data["rm_scores"]]
    assert sorted(scores) == sorted([*VARIED, *FLAT]), "score metrics and dumps keep the rewards"
    publish({})
    with pytest.raises(
        FFRError, match="adv_estimator=ffr: no advantages for these answers; it needs our replay buffer"
    ):
        compute_ffr_advantage(torch.zeros_like(mask), mask, np.array(names, dtype=object))


def test_what_verls_dump_lacks_is_written_down(clear: None, tmp_path: Path) -> None:
    rollouts = Rollouts([VARIED, FLAT])
    buffer = buffer_for(rollouts, advantage={"credit": "answer"}, dump_dir=str(tmp_path / "dump"))
    rollouts(2)
    batch, _ = buffer.sample(global_steps=7, partition_id="train", batch_size=2)
    found = [json.loads(line) for line in (tmp_path / "dump" / "7.jsonl").read_text().splitlines()]
    assert sorted(one["uid"] for one in found) == sorted(batch.keys)
    first = next(one for one in found if one["uid"] == "prompt000_1_0")
    told = {name: first[name] for name in ("dialogue_id", "images", "reward", "f1", "malformed")}
    assert told == {"dialogue_id": "d0", "images": ["a.png"], "reward": 1.0, "f1": 0.5, "malformed": ""}
    assert first["advantage"] == pytest.approx(0.5)


@pytest.mark.parametrize("metric", ["reward", "f1"])
def test_groups_within_the_tolerance_are_replaced(clear: None, metric: str) -> None:
    """As verl's own filter: two new prompts for each evicted group, what is too many in the end is discarded."""
    rollouts = Rollouts([VARIED, FLAT, NEARLY_FLAT, VARIED])
    buffer = buffer_for(rollouts, filter_groups=True, filter_groups_metric=metric, min_std=0.001)
    rollouts(4)
    batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=4)
    assert sorted(scores_of(batch)) == sorted(VARIED * 4)
    assert rollouts.asked == 8, "two groups were evicted, twice as many asked for"
    assert metrics["training/filter_groups/evicted_samples"] == 4
    assert metrics["ffr/groups/without_spread"] == pytest.approx(4 / 8)
    assert not [uid for uid in tq.kv_list().get("train", {}) if "_" not in uid], "no group is left behind"


def test_verls_own_filter_keeps_nearly_equal_groups(clear: None) -> None:
    """The reason for `min_std`: 0, its default, is verl's rule."""
    rollouts = Rollouts([NEARLY_FLAT, NEARLY_FLAT, NEARLY_FLAT, FLAT, NEARLY_FLAT, NEARLY_FLAT])
    buffer = buffer_for(rollouts, filter_groups=True)
    rollouts(4)
    batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=4)
    assert metrics["training/filter_groups/evicted_samples"] == 1
    assert sorted(scores_of(batch)) == sorted(NEARLY_FLAT * 4)


def test_the_filter_rests_when_nothing_has_spread(clear: None, caplog: pytest.LogCaptureFixture) -> None:
    """verl's own would ask for new prompts without end."""
    rollouts = Rollouts([FLAT])
    buffer = buffer_for(rollouts, filter_groups=True, max_filtered_batches=2)
    rollouts(4)
    with caplog.at_level(logging.WARNING):
        batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=4)
    assert set(scores_of(batch)) == {0.7}
    assert metrics["ffr/groups/without_spread"] == 1.0
    assert metrics["training/filter_groups/evicted_samples"] <= 8
    assert "more than 8 groups of this step had no spread in 'reward' above 0" in caplog.text
    rollouts(4)
    again = Rollouts([VARIED])
    buffer.refill_fn = again
    buffer.sample(global_steps=2, partition_id="train", batch_size=4)
    assert again.asked, "the filter works again in the next step"


def test_a_metric_that_the_reward_does_not_return_is_named(clear: None) -> None:
    rollouts = Rollouts([VARIED])
    buffer = buffer_for(rollouts, filter_groups=True, filter_groups_metric="f2")
    rollouts(4)
    with pytest.raises(RuntimeError, match=r"filter_groups_metric: no 'f2' in the rewards of 4 groups"):
        buffer.sample(global_steps=1, partition_id="train", batch_size=4)


class Observed(CurriculumSampler):
    """Remembers what the buffer tells it."""

    def __init__(self, metric: str) -> None:
        count = 40
        rows = RowDifficulty(np.full(count, 0.5), np.ones(count), np.array(["hard"] * count), np.zeros(count, bool))
        start = MicroEstimate(np.array([[0.5, 1.0, 1.0, 5.0], [0.0, 0.0, 0.5, 1.0]]), 4.0)
        super().__init__(rows, CurriculumConfig(order="online", online=OnlineConfig(metric=metric)), micro=start)
        self.deviations: list[dict[int, float]] = []

    def update(self, deviations: Mapping[int, float]) -> dict[str, float]:
        self.deviations.append(dict(deviations))
        return super().update(deviations)


@pytest.mark.parametrize(("metric", "scale"), [("f1", 0.5), ("reward", 1.0)])
@pytest.mark.parametrize("filtered", [False, True])
def test_the_curriculum_learns_from_every_finished_group(
    clear: None, metric: str, scale: float, filtered: bool
) -> None:
    """From those that the filter evicts too, once each."""
    sampler = Observed(metric)
    activate(sampler)
    try:
        rollouts = Rollouts([VARIED, FLAT, VARIED, VARIED], rows=True)
        buffer = buffer_for(rollouts, filter_groups=filtered)
        rollouts(4)
        _, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=4)
        spread = float(np.std(VARIED))
        deviations = {0: spread, 1: 0.0, 2: spread, 3: spread}
        expected = {row: scale * (deviations[row % 4]) for row in range(rollouts.asked)}
        assert sampler.deviations == [pytest.approx(expected, abs=1e-6)]
        assert rollouts.asked == (6 if filtered else 4)
        answers = 3 * rollouts.asked
        hits, named = (2.0 + answers) / (4 + answers), (4.0 + answers) / (4 + answers)
        gold = (4.0 + 2 * answers) / (4 + answers)
        assert metrics["ffr/micro/utterance_f1"] == pytest.approx(2 * hits / (named + gold))
        assert metrics["ffr/strata/all/utterances_named"] == 3.0
        rollouts(4)
        buffer.sample(global_steps=2, partition_id="train", batch_size=4)
        assert set(sampler.deviations[1]).isdisjoint(expected), "a step's groups count once"
    finally:
        activate(None)


def test_the_curriculum_learns_from_groups_that_the_filter_does_not_judge(clear: None) -> None:
    """An answer of theirs failed: verl trains on the others."""
    sampler = Observed("reward")
    activate(sampler)
    try:
        rollouts = Rollouts([VARIED], rows=True, statuses=["finished", "finished", "finished", "failure"])
        buffer = buffer_for(rollouts, filter_groups=True)
        rollouts(4)
        batch, _ = buffer.sample(global_steps=1, partition_id="train", batch_size=4)
        assert len(batch.keys) == 12
        assert sorted(sampler.deviations[0]) == [0, 1, 2, 3]
    finally:
        activate(None)


def test_counting_groups_does_not_use_up_the_filter(clear: None) -> None:
    rollouts = Rollouts([FLAT, FLAT, FLAT, VARIED, VARIED, VARIED, VARIED])
    buffer = buffer_for(rollouts, FFRReplayBufferAsync, filter_groups=True, max_filtered_batches=1)
    rollouts(4)
    assert [buffer.get_sampleable_count(1, "train") for _ in range(3)] == [1, 1, 1]
    batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=4)
    assert sorted(scores_of(batch)) == sorted(VARIED * 4)
    assert metrics["ffr/groups/without_spread"] == pytest.approx(3 / 7)


def test_the_async_trainers_buffer_filters_and_learns_too(clear: None) -> None:
    """As verl's own async one, one new prompt for each evicted group."""
    sampler = Observed("reward")
    activate(sampler)
    try:
        rollouts = Rollouts([VARIED, FLAT, NEARLY_FLAT, VARIED, VARIED, VARIED], rows=True)
        buffer = buffer_for(rollouts, FFRReplayBufferAsync, filter_groups=True, min_std=0.001)
        rollouts(4)
        batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=4)
        assert sorted(scores_of(batch)) == sorted(VARIED * 4)
        assert rollouts.asked == 6
        assert metrics["ffr/reward/score/mean"] == pytest.approx(0.5)
        assert sorted(sampler.deviations[0]) == [0, 1, 2, 3, 4, 5]
    finally:
        activate(None)
