"""The keys of `trainer.v1.sampler.sampler_kwargs` that are ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ffr_verl.errors import FFRError
from ffr_verl.unknown_keys import refuse_unknown_keys

__all__ = ["SamplerConfig"]


@dataclasses.dataclass(frozen=True, slots=True)
class SamplerConfig:
    """Settings of `FFRReplayBuffer`.

    Attributes:
        poll_interval: seconds between two looks at the rollouts, above 0.
        filter_groups: evict groups whose metric is the same in all answers, and generate others instead.
        filter_groups_metric: `reward`, or a key that `compute_score` returns.
        train_batch_size: prompts a step; needed with `filter_groups`.
        max_inflight_gen_batches: how many batches of replacement prompts may be generated at once.

    Example:
        >>> SamplerConfig.from_mapping({"poll_interval": 0.1}).poll_interval
        0.1
    """

    poll_interval: float = 2.0
    filter_groups: bool = False
    filter_groups_metric: str = "reward"
    train_batch_size: int | None = None
    max_inflight_gen_batches: int = 1

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplerConfig:
        """Check `values` (a recipe's `sampler_kwargs`).

        Raises:
            FFRError: for an unknown key or a value out of range; the message names the key.
        """
        where = "trainer.v1.sampler.sampler_kwargs"
        refuse_unknown_keys(values, allowed=[field.name for field in dataclasses.fields(cls)], where=where)
        config = cls(**dict(values))
        if not isinstance(config.poll_interval, (int, float)) or not config.poll_interval > 0:
            raise FFRError(f"{where}.poll_interval: found {config.poll_interval!r}; give seconds above 0, such as 0.5")
        if config.filter_groups and config.train_batch_size is None:
            raise FFRError(f"{where}.train_batch_size is missing; filter_groups needs it: ${{data.train_batch_size}}")
        if not isinstance(config.max_inflight_gen_batches, int) or config.max_inflight_gen_batches < 1:
            raise FFRError(
                f"{where}.max_inflight_gen_batches: found {config.max_inflight_gen_batches!r}; give a "
                f"whole number >= 1"
            )
        return config
