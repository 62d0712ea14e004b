"""Which training rows come when.

`FFRReplayBuffer` is imported on first use: it needs verl, the rest of the package does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ffr_verl.samplers.config import SamplerConfig

if TYPE_CHECKING:
    from ffr_verl.samplers.replay_buffer import FFRReplayBuffer

__all__ = ["FFRReplayBuffer", "SamplerConfig"]


def __getattr__(name: str) -> Any:
    if name == "FFRReplayBuffer":
        from ffr_verl.samplers.replay_buffer import FFRReplayBuffer

        return FFRReplayBuffer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
