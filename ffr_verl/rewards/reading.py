"""What a reward is handed: the completion, the gold answer, and `extra_info`, what the row says of its dialogue
(`ffr_verl.dialogues.extra_info` makes it).

A model may have written anything, so no completion raises; what is no completion, a gold that is no text and an
`extra_info` without what is needed do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ffr_verl.dialogues import Ids, content_text
from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle, Fragment, parse_fragment, parse_gold

# A text; a conversation, whose last message is the answer; or nothing, as of a model that only called a tool.
Completion = str | Sequence[Mapping[str, Any]] | None
_INT = frozenset({int})
_MEND = "`ffr-verl prepare` writes them"


def completion_text(completion: Completion) -> str:
    """What the model said last; a tool's or the user's message at the end of a conversation is no answer.

    Raises `FFRError` for what is neither a text nor a list of messages.
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
    """`parse_gold`; `None` when the text is malformed, which earns nothing. `FFRError`, with `name`, for no text."""
    if not isinstance(solution, str):
        found = "None" if solution is None else type(solution).__name__
        raise FFRError(f"{name}: found {found}, expected the gold answer as text")
    return parse_gold(solution)


class RowDialogue(NamedTuple):
    """What coherence needs to know of a dialogue; `image_ids`, `image_utterances` and `images` are parallel."""

    dialogue_id: str
    split: str
    utterance_ids: list[int]
    image_ids: list[int]
    image_utterances: list[int]
    images: list[str]

    @classmethod
    def read(cls, info: Any) -> RowDialogue:
        """Check the `extra_info` of a row.

        Raises `FFRError` when a field is missing, of another kind, or does not fit the others.
        """
        fields = ("dialogue_id", "utterance_ids", "image_utterances", "images")
        if missing := _missing(info, fields):
            raise FFRError(f"extra_info: coherence needs {', '.join(fields)}; missing: {', '.join(missing)}; {_MEND}")
        dialogue_id, split = info["dialogue_id"], info.get("split")
        if isinstance(dialogue_id, bool) or not isinstance(dialogue_id, (str, int, np.integer)):
            raise _unexpected("dialogue_id", dialogue_id, "a text or a whole number")
        if split is not None and not isinstance(split, str):
            raise _unexpected("split", split, "a text")
        images = [one if type(one) is str else _image_path(one) for one in _values(info, "images")]
        image_ids = list(range(len(images))) if info.get("image_ids") is None else _ids(info, "image_ids")
        image_utterances = _ids(info, "image_utterances")
        for name, values in (("image_utterances", image_utterances), ("image_ids", image_ids)):
            if len(values) != len(images):
                raise FFRError(f"extra_info: {len(values)} {name} for {len(images)} images; {_MEND}")
        utterance_ids = _ids(info, "utterance_ids")
        return cls(str(dialogue_id), split or "", utterance_ids, image_ids, image_utterances, images)


def row_ids(info: Any) -> tuple[Collection[int], Collection[int]]:
    """The ids of the dialogue's utterances and of its images. `FFRError` when they are missing or no whole numbers."""
    if missing := _missing(info, ("utterance_ids", "images")):
        raise FFRError(
            f"extra_info.{missing[0]} is missing; mcc and f1_mode micro need it to know the dialogue's ids; {_MEND}"
        )
    count = len(_values(info, "images"))
    images = _universe(_ids(info, "image_ids")) if info.get("image_ids") is not None else range(count)
    return _universe(_ids(info, "utterance_ids")), images


def row_universes(info: Mapping[str, Any]) -> tuple[int, int]:
    """Sizes of the universes of the row's utterance ids and of its image ids, as `ffr-verl evaluate` takes them from
    the prompt; a field that is missing counts as empty."""
    told = {name: value for name, value in info.items() if value is not None}
    utterances, images = row_ids({"utterance_ids": (), "images": (), **told})
    return Ids(0, max(utterances, default=-1) + 1).universe, Ids(0, max(images, default=-1) + 1).universe


def is_outside(predicted: Fragment, utterances: Collection[int], images: Collection[int]) -> bool:
    """Whether an answer names an id that the dialogue does not have."""
    return any(one not in utterances for one in predicted.utterance_ids) or any(
        one not in images for one in predicted.image_ids
    )


def _universe(ids: list[int]) -> Collection[int]:
    counting = range(len(ids))
    return counting if ids == list(counting) else frozenset(ids)


def _missing(info: Any, fields: Sequence[str]) -> list[str]:
    if info is None:
        return list(fields)
    if not isinstance(info, Mapping):
        raise FFRError(f"extra_info: found {type(info).__name__}, expected a mapping; {_MEND}")
    return [name for name in fields if info.get(name) is None]


def _values(info: Mapping[str, Any], name: str) -> list[Any]:
    found = info[name]
    if isinstance(found, list):
        return found
    if isinstance(found, np.ndarray):
        return list(found.tolist())
    if isinstance(found, (str, bytes, Mapping)) or not isinstance(found, Collection):
        raise _unexpected(name, found, "a list")
    return list(found)


def _ids(info: Mapping[str, Any], name: str) -> list[int]:
    found = info[name]
    if type(found) is not list:
        found = _values(info, name)
    if _INT.issuperset(map(type, found)):
        return list(found)  # the row's own list may change
    for one in found:
        is_number = isinstance(one, (int, float, np.integer, np.floating)) and not isinstance(one, bool)
        if not is_number or one != one // 1:
            raise _unexpected(name, one, "whole numbers")
    return [int(one) for one in found]


def _image_path(image: Any) -> str:
    path = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(path, str):
        raise _unexpected(
            "images",
            image,
            "the image's path as it stood in the row; with decoded pictures give a column extra_info (of `ffr-verl "
            "prepare`)",
        )
    return path


def _unexpected(name: str, found: Any, expected: str) -> FFRError:
    shown = f"{found!r:.80} " if isinstance(found, (str, int, float)) else ""
    return FFRError(f"extra_info.{name}: found {shown}({type(found).__name__}), expected {expected}")
