"""The rewards with the call signature of TRL's GRPOTrainer and of ms-swift's ORM.

Each takes a batch: `f(completions, solution, **columns) -> list[float]`. A completion is a text, or a conversation (a
list of messages) whose last message is the answer. Columns that a reward does not use are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ffr_verl.rewards.exact_match import exact_match_reward
from ffr_verl.rewards.f1 import f1_reward
from ffr_verl.rewards.ffr import compute_score
from ffr_verl.rewards.format import format_reward

__all__ = ["exact_match", "f1", "ffr", "format"]

Completion = str | list[dict[str, Any]]


def _text(completion: Completion) -> str:
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, str):
        return content
    return "".join(item.get("text", "") for item in content)


def f1(completions: Sequence[Completion], solution: Sequence[str], **columns: Any) -> list[float]:
    """`f1_reward` of each completion.

    Example:
        >>> gold = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> f1([gold, [{"role": "assistant", "content": "no idea"}]], [gold, gold])
        [1.0, 0.0]
    """
    return [f1_reward(_text(one), gold) for one, gold in zip(completions, solution, strict=True)]


def format(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """`format_reward` of each completion.

    Example:
        >>> format(["no idea"])
        [0.0]
    """
    return [format_reward(_text(one)) for one in completions]


def exact_match(completions: Sequence[Completion], solution: Sequence[str], **columns: Any) -> list[float]:
    """`exact_match_reward` of each completion.

    Example:
        >>> exact_match(["no idea"], ["<|utt_ids_start|>[]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"])
        [0.0]
    """
    return [exact_match_reward(_text(one), gold) for one, gold in zip(completions, solution, strict=True)]


def ffr(completions: Sequence[Completion], solution: Sequence[str], **columns: Any) -> list[float]:
    """The `score` of `compute_score`, with its default weights, of each completion.

    Example:
        >>> gold = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> ffr([gold], [gold])
        [1.3]
    """
    return [compute_score("", _text(one), gold)["score"] for one, gold in zip(completions, solution, strict=True)]
