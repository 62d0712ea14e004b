"""verl's replay buffer with a polling interval, a group filter with a tolerance, and the rewards' training curves.

verl builds a custom replay buffer without its own filter settings, so they come through `sampler_kwargs`.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transfer_queue as tq
from verl.trainer.ppo.v1.replay_buffer import FILTER_GROUPS_REWARD_METRIC, ReplayBuffer

from ffr_verl.samplers.config import SamplerConfig
from ffr_verl.samplers.reward_metrics import has_spread, reward_metrics

__all__ = ["FFRReplayBuffer"]

logger = logging.getLogger(__name__)


class FFRReplayBuffer(ReplayBuffer):
    """`ReplayBuffer` of verl's sync trainer, configured from `trainer.v1.sampler.sampler_kwargs`.

    See `SamplerConfig` for the keys, and `reward_metrics` for what it adds to a step's metrics, beside
    `ffr/groups/without_spread`: the share of the step's finished groups whose rewards differ by no more than
    `min_std`. Use it through the recipe:

        trainer.v1.sampler.custom_sampler: {path: pkg://ffr_verl.samplers, name: FFRReplayBuffer}
    """

    def __init__(self, *, sampler_kwargs: Mapping[str, Any] | None, **kwargs: Any) -> None:
        config = SamplerConfig.from_mapping(sampler_kwargs or {})
        super().__init__(
            sampler_kwargs=sampler_kwargs,  # type: ignore[arg-type]  # not read by verl's own class
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

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[Any, dict[str, Any]]:
        """verl's `sample`, with the metrics of the sampled answers added for training batches."""
        self._filtered_in_step, self._filter_is_off = 0, False
        batch, metrics = super().sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
        if partition_id == "val" or not batch.keys:
            return batch, metrics
        return batch, {**metrics, **self._reward_metrics(partition_id, list(batch.keys))}

    def _reward_metrics(self, partition_id: str, keys: Sequence[str]) -> dict[str, float]:
        data = tq.kv_batch_get(keys=list(keys), partition_id=partition_id, select_fields=["rm_scores", "extra_fields"])
        # A session may have several outputs; verl puts the same reward on each, so the last one stands for all.
        answers: dict[str, Mapping[str, Any]] = {}
        groups: dict[str, dict[str, float]] = defaultdict(dict)
        for key, scores, extra in zip(keys, list(data["rm_scores"]), list(data["extra_fields"]), strict=True):
            session = key.rpartition("_")[0]
            answers[session] = _reward_extra_info(extra)
            groups[key.split("_")[0]][session] = float(scores.sum())
        flat = sum(
            not has_spread(list(values.values()), min_std=self.ffr_config.min_std) for values in groups.values()
        )
        share = (flat + self._filtered_in_step) / (len(groups) + self._filtered_in_step)
        return {"ffr/groups/without_spread": share, **reward_metrics(answers.values())}

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
        for uid, values in self._metric_values(partition_id, finished - cache.keys()).items():
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

    def _metric_values(self, partition_id: str, uids: set[str]) -> dict[str, list[float]]:
        """The filter's metric of every answer of the groups."""
        metric = str(self.filter_groups_metric)
        keys = [key for key in self.partitions[partition_id] if key.split("_")[0] in uids]
        values: dict[str, list[float]] = defaultdict(list)
        if keys:
            name = "rm_scores" if metric == FILTER_GROUPS_REWARD_METRIC else "extra_fields"
            data = tq.kv_batch_get(keys=keys, partition_id=partition_id, select_fields=[name])
            for key, value in zip(keys, list(data[name]), strict=True):
                if name == "rm_scores":
                    values[key.split("_")[0]].append(float(value.sum()))
                    continue
                info = _reward_extra_info(value)
                if metric in info:
                    values[key.split("_")[0]].append(float(info[metric]))
        lacking = uids - values.keys()
        if lacking:
            raise RuntimeError(
                f"trainer.v1.sampler.sampler_kwargs.filter_groups_metric: no {metric!r} in the rewards of "
                f"{len(lacking)} groups; give `reward`, or a key that the reward function returns"
            )
        return values


def _reward_extra_info(extra_fields: Any) -> Mapping[str, Any]:
    value = getattr(extra_fields, "data", extra_fields)
    return value.get("reward_extra_info", {}) if isinstance(value, dict) else {}
