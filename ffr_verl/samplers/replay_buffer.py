"""verl's replay buffer with a polling interval and group filter that recipes can set.

verl builds a custom replay buffer without its own filter settings, so they come through `sampler_kwargs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from ffr_verl.samplers.config import SamplerConfig

__all__ = ["FFRReplayBuffer"]


class FFRReplayBuffer(ReplayBuffer):
    """`ReplayBuffer` of verl's sync trainer, configured from `trainer.v1.sampler.sampler_kwargs`.

    See `SamplerConfig` for the keys. Use it through the recipe:

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
