"""The rewards for tasks of verifiers 0.4, whose data have the fields `solution` and `extra_info`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from ffr_verl.rewards import batch
from ffr_verl.rewards.batch import BatchReward


def task_reward(reward: BatchReward) -> Callable[[Any, Any], Awaitable[float]]:
    """A reward of `ffr_verl.rewards.batch` for `vf.reward`, in a task or named by its settings.

    Example:
        >>> import asyncio, types
        >>> gold = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> data, trace = types.SimpleNamespace(solution=gold), types.SimpleNamespace(last_reply=gold)
        >>> asyncio.run(task_reward(batch.f1)(data, trace))
        1.0
    """

    async def score(task: Any, trace: Any) -> float:
        data = getattr(task, "data", task)  # a method of a task is given the task, a function of its settings the data
        info = getattr(data, "extra_info", None)
        columns = {} if info is None else {"extra_info": [info]}
        return reward([trace.last_reply], [data.solution], **columns)[0]

    score.__name__ = reward.__name__
    return score


f1, format, mcc, exact_match, ffr = map(task_reward, (batch.f1, batch.format, batch.mcc, batch.exact_match, batch.ffr))
