"""FFRReplayBuffer over a real TransferQueue: what it evicts, what it asks for anew, what it logs.

Groups are put there as verl's agent loop puts them; only the engine that would make them is left out.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import ray
import torch
import transfer_queue as tq
from omegaconf import OmegaConf

from ffr_verl.samplers import CurriculumConfig, CurriculumSampler, FFRReplayBuffer, FFRReplayBufferAsync, RowDifficulty
from ffr_verl.samplers.curriculum_config import OnlineConfig
from ffr_verl.samplers.sampler import activate

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

    def __init__(self, groups: Sequence[Sequence[float]], *, partition: str = "train", rows: bool = False) -> None:
        self._rows = rows  # number the rows, as FFRDataset does
        self._groups = itertools.cycle(groups)
        self._numbers = itertools.count()
        self._partition = partition
        self.asked = 0

    def __call__(self, count: int) -> int:
        self.asked += count
        for _ in range(count):
            number = next(self._numbers)
            uid, scores = f"prompt{number:03}", next(self._groups)
            for session, score in enumerate(scores):
                info = {
                    "score": score,
                    "f1": score / 2,
                    "malformed": "repeated_id" if score == 0.0 else "",
                    "predicted_utterances": 3,
                    "gold_utterances": 2,
                }
                tq.kv_put(
                    key=f"{uid}_{session}_0",
                    partition_id=self._partition,
                    fields={
                        "rm_scores": torch.tensor([0.0, 0.0, score]),
                        "extra_fields": {"reward_extra_info": info},
                        **({"ffr_row": number} if self._rows else {}),
                    },
                    tag={"status": "success"},
                )
            tq.kv_put(
                key=uid,
                partition_id=self._partition,
                tag={"is_prompt": True, "status": "finished", "global_steps": 1},
            )
        return count


def buffer_for(rollouts: Rollouts, **settings: Any) -> FFRReplayBuffer:
    return FFRReplayBuffer(
        trainer_mode="sync",
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


def test_validation_batches_get_no_metrics(clear: None) -> None:
    rollouts = Rollouts([FLAT], partition="val")
    buffer = buffer_for(rollouts, filter_groups=True)
    rollouts(2)
    batch, metrics = buffer.sample(global_steps=1, partition_id="val", batch_size=2)
    assert len(batch.keys) == 6
    assert metrics == {}
    assert rollouts.asked == 2


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
        super().__init__(rows, CurriculumConfig(order="online", online=OnlineConfig(metric=metric)))
        self.scores: list[dict[int, float]] = []

    def update(self, scores: Mapping[int, float]) -> dict[str, float]:
        self.scores.append(dict(scores))
        return super().update(scores)


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
        means = {0: 0.5, 1: 0.7, 2: 0.5, 3: 0.5}
        expected = {row: scale * (means[row % 4]) for row in range(rollouts.asked)}
        assert sampler.scores == [pytest.approx(expected)]
        assert rollouts.asked == (6 if filtered else 4)
        assert metrics["ffr/curriculum/target"] == pytest.approx(0.5, abs=0.01)
        rollouts(4)
        buffer.sample(global_steps=2, partition_id="train", batch_size=4)
        assert set(sampler.scores[1]).isdisjoint(expected), "a step's groups count once"
    finally:
        activate(None)


def test_the_async_trainers_buffer_filters_and_learns_too(clear: None) -> None:
    """As verl's own async one, one new prompt for each evicted group."""
    sampler = Observed("reward")
    activate(sampler)
    try:
        rollouts = Rollouts([VARIED, FLAT, NEARLY_FLAT, VARIED, VARIED, VARIED], rows=True)
        settings = {"poll_interval": 0.01, "train_batch_size": 4, "filter_groups": True, "min_std": 0.001}
        buffer = FFRReplayBufferAsync(
            trainer_mode="separate_async",
            trainer_config=OmegaConf.create({}),
            max_off_policy_threshold=None,
            max_off_policy_strategy="drop",
            sampler_kwargs=settings,
            refill_fn=rollouts,
        )
        rollouts(4)
        batch, metrics = buffer.sample(global_steps=1, partition_id="train", batch_size=4)
        assert sorted(scores_of(batch)) == sorted(VARIED * 4)
        assert rollouts.asked == 6
        assert metrics["ffr/reward/score/mean"] == pytest.approx(0.5)
        assert sorted(sampler.scores[0]) == [0, 1, 2, 3, 4, 5]
    finally:
        activate(None)
