"""The keys of `trainer.v1.sampler.sampler_kwargs` that are ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ffr_verl.errors import FFRError
from ffr_verl.samplers.advantages import AdvantageConfig
from ffr_verl.settings import refuse_unknown_keys

__all__ = ["SamplerConfig"]


@dataclasses.dataclass(frozen=True, slots=True)
class SamplerConfig:
    """Settings of `FFRReplayBuffer`.

    Attributes:
        poll_interval: seconds between two looks at the rollouts, above 0.
        filter_groups: evict groups whose metric hardly differs between answers, and generate others instead.
        filter_groups_metric: `reward`, or a key that `compute_score` returns.
        min_std: a group has no spread when the standard deviation of its metric is at most this, at least 0. verl's
            own filter knows 0 only, which a continuous reward never hits.
        max_filtered_batches: after so many batches of evicted groups the filter rests until the next step, so that a
            policy that always agrees with itself cannot regenerate without end; 0 for no limit.
        train_batch_size: prompts a step; needed with `filter_groups`.
        advantage: of `algorithm.adv_estimator=ffr`, see `AdvantageConfig`; `None` leaves advantages to verl.
        best_checkpoint: of the validation, by whose largest value `BestCheckpoint` keeps a checkpoint:
            `micro_joint_f1`,
            `micro_joint_mcc`, the same of `utterance` and `image`, or a key of the reward function; `None` keeps none.
        max_inflight_gen_batches: how many batches of replacement prompts may be generated at once.

    Example:
        >>> SamplerConfig.from_mapping({"poll_interval": 0.1}).poll_interval
        0.1
    """

    poll_interval: float = 2.0
    filter_groups: bool = False
    filter_groups_metric: str = "reward"
    min_std: float = 0.0
    max_filtered_batches: int = 10
    train_batch_size: int | None = None
    max_inflight_gen_batches: int = 1
    advantage: AdvantageConfig | None = None
    best_checkpoint: str | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplerConfig:
        """Check `values` (a recipe's `sampler_kwargs`).

        Raises:
            FFRError: for an unknown key or a value out of range; the message names the key.
        """
        where = "trainer.v1.sampler.sampler_kwargs"
        refuse_unknown_keys(values, allowed=[field.name for field in dataclasses.fields(cls)], where=where)
        given = dict(values)
        if given.get("advantage") is not None:
            given["advantage"] = AdvantageConfig.from_mapping(given["advantage"])
        config = cls(**given)
        if config.best_checkpoint is not None and (
            not isinstance(config.best_checkpoint, str) or not config.best_checkpoint
        ):
            raise FFRError(f"{where}.best_checkpoint: found {config.best_checkpoint!r}; give a metric's name, or null")
        if not _is_number(config.poll_interval) or not config.poll_interval > 0:
            raise FFRError(f"{where}.poll_interval: found {config.poll_interval!r}; give seconds above 0, such as 0.5")
        if not _is_number(config.min_std) or not 0.0 <= config.min_std < math.inf:
            raise FFRError(f"{where}.min_std: found {config.min_std!r}; give a number >= 0, such as 0.001")
        if not _is_whole(config.max_filtered_batches) or config.max_filtered_batches < 0:
            raise FFRError(
                f"{where}.max_filtered_batches: found {config.max_filtered_batches!r}; give a whole number >= 0"
            )
        if config.filter_groups and config.train_batch_size is None:
            raise FFRError(f"{where}.train_batch_size is missing; filter_groups needs it: ${{data.train_batch_size}}")
        if not _is_whole(config.max_inflight_gen_batches) or config.max_inflight_gen_batches < 1:
            raise FFRError(
                f"{where}.max_inflight_gen_batches: found {config.max_inflight_gen_batches!r}; give a "
                f"whole number >= 1"
            )
        return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
