"""verl's replay buffers with a polling interval, a group filter with a tolerance, the rewards' training curves, and
what the curriculum learns from.

verl builds a custom replay buffer without its own filter settings, so they come through `sampler_kwargs`.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import FILTER_GROUPS_REWARD_METRIC, ReplayBuffer, ReplayBufferAsync

from ffr_verl.samplers.config import SamplerConfig
from ffr_verl.samplers.reward_metrics import has_spread, reward_metrics
from ffr_verl.samplers.sampler import active_sampler

__all__ = ["FFRReplayBuffer", "FFRReplayBufferAsync"]

logger = logging.getLogger(__name__)

_ROW = "ffr_row"  # what FFRDataset calls the number of a row


class _FFRSampling:
    """What both buffers add to verl's; mixed in before verl's class."""

    partitions: dict[str, dict[str, dict[str, Any]]]
    finished_keys: dict[str, set[str]]
    filter_groups_metric: str | None
    train_batch_size: int | None
    _dapo_classification_cache: dict[str, dict[str, float | None]]

    def __init__(self, *, sampler_kwargs: Mapping[str, Any] | None, **kwargs: Any) -> None:
        config = SamplerConfig.from_mapping(sampler_kwargs or {})
        super().__init__(
            sampler_kwargs=sampler_kwargs,  # type: ignore[call-arg]  # not read by verl's own class
            poll_interval=config.poll_interval,
            filter_groups_metric=config.filter_groups_metric if config.filter_groups else None,
            train_batch_size=config.train_batch_size,
            gen_batch_size=1,
            max_inflight_gen_batches=config.max_inflight_gen_batches,
            **kwargs,
        )
        self.ffr_config = config
        self._filtered_in_step = 0
        self._filter_is_off = False
        self._scores_of_rows: dict[int, list[float]] = {}

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """verl's `sample`; for training batches with the metrics of the sampled answers and of the curriculum, which
        learns how the policy did."""
        self._filtered_in_step, self._filter_is_off = 0, False
        batch, metrics = super().sample(  # type: ignore[misc]
            global_steps=global_steps, partition_id=partition_id, batch_size=batch_size
        )
        if partition_id == "val" or not batch.keys:
            return batch, metrics
        return batch, {**metrics, **self._reward_metrics(partition_id, list(batch.keys)), **self._end_step()}

    def _reward_metrics(self, partition_id: str, keys: Sequence[str]) -> dict[str, float]:
        answers = _Answers.of(partition_id, keys)
        groups = answers.values(FILTER_GROUPS_REWARD_METRIC)
        if self.filter_groups_metric is None:
            self._observe(answers)
        flat = sum(not has_spread(values, min_std=self.ffr_config.min_std) for values in groups.values())
        share = (flat + self._filtered_in_step) / (len(groups) + self._filtered_in_step)
        return {"ffr/groups/without_spread": share, **reward_metrics(answers.infos.values())}

    def _observe(self, answers: _Answers) -> None:
        """Remember how well the policy did on the rows of finished groups, those evicted afterwards included."""
        sampler = active_sampler()
        if sampler is None:
            return
        for uid, values in answers.values(sampler.config.online.metric).items():
            if uid in answers.rows:
                self._scores_of_rows.setdefault(answers.rows[uid], []).extend(values)

    def _end_step(self) -> dict[str, float]:
        sampler = active_sampler()
        if sampler is None:
            return {}
        scores = {row: float(np.mean(values)) for row, values in self._scores_of_rows.items()}
        self._scores_of_rows = {}
        return sampler.update(scores)

    def _dapo_filtered_keys(self, partition_id: str) -> tuple[set[str], Counter[float]]:
        """verl's group filter, with `min_std` for its exact 0 and an end to it.

        Returns:
            The finished groups to evict, and how many of them lie at each (rounded mean) metric value.
        """
        if partition_id == "val" or self.filter_groups_metric is None or self._filter_is_off:
            return set(), Counter()
        cache = self._dapo_classification_cache[partition_id]
        finished = self.finished_keys[partition_id]
        for uid in cache.keys() - finished:
            del cache[uid]
        new = finished - cache.keys()
        answers = _Answers.of(partition_id, [key for key in self.partitions[partition_id] if key.split("_")[0] in new])
        self._observe(answers)
        for uid, values in self._filter_values(answers, new).items():
            flat = not has_spread(values, min_std=self.ffr_config.min_std)
            cache[uid] = round(float(np.mean(values)), 3) if flat else None
        filtered = {uid: value for uid, value in cache.items() if value is not None}
        limit = self.ffr_config.max_filtered_batches * (self.train_batch_size or 0)
        if filtered and limit and self._filtered_in_step + len(filtered) > limit:
            self._filter_is_off = True
            logger.warning(
                "more than %d groups of this step had no spread in %r above %g: the filter rests until the next step. "
                "Raise rollout.temperature, or train on rows of another difficulty.",
                limit,
                self.filter_groups_metric,
                self.ffr_config.min_std,
            )
            return set(), Counter()
        self._filtered_in_step += len(filtered)
        return set(filtered), Counter(filtered.values())

    def _filter_values(self, answers: _Answers, uids: set[str]) -> dict[str, list[float]]:
        """The filter's metric of every answer of the groups."""
        metric = str(self.filter_groups_metric)
        values = answers.values(metric)
        lacking = uids - values.keys()
        if lacking:
            raise RuntimeError(
                f"trainer.v1.sampler.sampler_kwargs.filter_groups_metric: no {metric!r} in the rewards of "
                f"{len(lacking)} groups; give `reward`, or a key that the reward function returns"
            )
        return values


class FFRReplayBuffer(_FFRSampling, ReplayBuffer):  # type: ignore[misc]
    """`ReplayBuffer` of verl's sync trainer, configured from `trainer.v1.sampler.sampler_kwargs`.

    See `SamplerConfig` for the keys, `reward_metrics` and `CurriculumSampler.update` for what it adds to a step's
    metrics, beside `ffr/groups/without_spread`: the share of the step's finished groups whose rewards differ by no
    more than `min_std`. Use it through the recipe:

        trainer.v1.sampler.custom_sampler: {path: pkg://ffr_verl.samplers, name: FFRReplayBuffer}
    """


class FFRReplayBufferAsync(_FFRSampling, ReplayBufferAsync):  # type: ignore[misc]
    """The same for verl's async trainers (`trainer.v1.trainer_mode` other than `sync`)."""


@dataclass(frozen=True, slots=True)
class _Answers:
    """What TransferQueue holds of finished answers.

    A session may have several outputs; verl puts the same reward on each, so the last one stands for all.

    Attributes:
        infos: what the reward function returned, of each session.
        rewards: of each session.
        rows: `ffr_row` of each group, where the dataset gives one.
    """

    infos: dict[str, Mapping[str, Any]]
    rewards: dict[str, float]
    rows: dict[str, int]

    @classmethod
    def of(cls, partition_id: str, keys: Sequence[str]) -> _Answers:
        answers = cls({}, {}, {})
        if not keys:
            return answers
        fields = ["rm_scores", "extra_fields", *([_ROW] if active_sampler() is not None else [])]
        data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=fields)
        rows = list(data[_ROW]) if _ROW in fields else [None] * len(keys)
        for key, scores, extra, row in zip(
            keys, list(data["rm_scores"]), list(data["extra_fields"]), rows, strict=True
        ):
            session = key.rpartition("_")[0]
            answers.infos[session] = _reward_extra_info(extra)
            answers.rewards[session] = float(scores.sum())
            if row is not None:
                answers.rows[key.split("_")[0]] = int(getattr(row, "data", row))
        return answers

    def values(self, metric: str) -> dict[str, list[float]]:
        """A metric of every answer, by group; groups whose answers lack it are left out."""
        found: dict[str, list[float]] = defaultdict(list)
        for session, info in self.infos.items():
            uid = session.split("_")[0]
            if metric == FILTER_GROUPS_REWARD_METRIC:
                found[uid].append(self.rewards[session])
            elif metric in info:
                found[uid].append(float(info[metric]))
        return dict(found)


def _reward_extra_info(extra_fields: Any) -> Mapping[str, Any]:
    value = getattr(extra_fields, "data", extra_fields)
    return value.get("reward_extra_info", {}) if isinstance(value, dict) else {}
