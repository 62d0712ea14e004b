"""What a reward is handed: the completion as text, a conversation or nothing at all, and the gold answer.

A model may have written anything, so no completion raises; what is no completion, and a gold that is no text, does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ffr_verl.dialogues import content_text
from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle, Fragment, parse_fragment, parse_gold

__all__ = ["Completion", "completion_text", "read_answer", "read_gold"]

# A text; a conversation, whose last message is the answer; or nothing, as of a model that only called a tool.
Completion = str | Sequence[Mapping[str, Any]] | None


def completion_text(completion: Completion) -> str:
    """What the model said last; a tool's or the user's message at the end of a conversation is no answer.

    Raises:
        FFRError: for what is neither a text nor a list of messages.

    Example:
        >>> completion_text([{"role": "assistant", "content": "yes"}])
        'yes'
        >>> completion_text([{"role": "assistant", "content": "I ask."}, {"role": "tool", "content": "yes"}])
        ''
    """
    if isinstance(completion, str):
        return completion
    if completion is None or (isinstance(completion, (list, tuple, np.ndarray)) and not len(completion)):
        return ""
    last = completion[-1] if isinstance(completion, (list, tuple, np.ndarray)) else completion
    if not isinstance(last, Mapping):
        raise FFRError(
            f"completion: found {type(completion).__name__}"
            + (f" of {type(last).__name__}" if last is not completion else "")
            + ", expected a text or a list of messages"
        )
    return content_text(last.get("content"), image="") if last.get("role") in (None, "assistant") else ""


def read_answer(completion: Completion, style: AnswerStyle) -> Fragment | None:
    """`parse_fragment` of a completion."""
    return parse_fragment(completion if isinstance(completion, str) else completion_text(completion), style=style)


def read_gold(solution: str, *, name: str = "solution") -> Fragment | None:
    """`parse_gold`; `None` when the text is malformed, which earns nothing.

    Raises:
        FFRError: for what is no text; it is called `name` there.

    Example:
        >>> read_gold(None)
        Traceback (most recent call last):
            ...
        ffr_verl.errors.FFRError: solution: found None, expected the gold answer as text
    """
    if not isinstance(solution, str):
        found = "None" if solution is None else type(solution).__name__
        raise FFRError(f"{name}: found {found}, expected the gold answer as text")
    return parse_gold(solution)
