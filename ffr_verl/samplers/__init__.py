"""Which training rows come when.

`FFRReplayBuffer` and `FFRReplayBufferAsync` are imported on first use: they need verl, the rest does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffr_verl.samplers.curriculum import Order, RowDifficulty, StaticOrder, order_rows
from ffr_verl.samplers.difficulty import assign_levels, select_rows, token_entropy
from ffr_verl.samplers.sampler import CurriculumSampler
from ffr_verl.settings import CurriculumConfig, SamplerConfig

if TYPE_CHECKING:
    from ffr_verl.integrations.verl.replay_buffer import FFRReplayBuffer, FFRReplayBufferAsync

__all__ = [
    "CurriculumConfig",
    "CurriculumSampler",
    "FFRReplayBuffer",
    "FFRReplayBufferAsync",
    "Order",
    "RowDifficulty",
    "SamplerConfig",
    "StaticOrder",
    "assign_levels",
    "order_rows",
    "select_rows",
    "token_entropy",
]


def __getattr__(name: str) -> Any:
    if name in ("FFRReplayBuffer", "FFRReplayBufferAsync"):
        from ffr_verl.integrations.verl import replay_buffer

        return getattr(replay_buffer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
