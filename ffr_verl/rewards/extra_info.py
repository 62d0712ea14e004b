"""`extra_info`, what a row says of its dialogue: `ffr_verl.dialogues.extra_info` makes it, and it is read here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment

__all__ = ["RowDialogue", "is_outside", "row_ids"]

_MEND = "`ffr-verl prepare` writes them"


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

        Raises:
            FFRError: when a field is missing, of another kind, or does not fit the others.
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
        made = cls(
            str(dialogue_id),
            split or "",
            _ids(info, "utterance_ids"),
            list(range(len(images))) if info.get("image_ids") is None else _ids(info, "image_ids"),
            _ids(info, "image_utterances"),
            images,
        )
        for name in ("image_utterances", "image_ids"):
            if len(getattr(made, name)) != len(images):
                raise FFRError(f"extra_info: {len(getattr(made, name))} {name} for {len(images)} images; {_MEND}")
        return made


def row_ids(info: Any) -> tuple[Collection[int], Collection[int]]:
    """The ids of the dialogue's utterances and of its images.

    Raises:
        FFRError: when they are missing or no whole numbers.

    Example:
        >>> row_ids({"utterance_ids": [20, 22], "images": ["a.png"]})
        (frozenset({20, 22}), range(0, 1))
    """
    if missing := _missing(info, ("utterance_ids", "images")):
        raise FFRError(
            f"extra_info.{missing[0]} is missing; mcc and f1_mode micro need it to know the dialogue's ids; {_MEND}"
        )
    count = len(_values(info, "images"))
    images = _universe(_ids(info, "image_ids")) if info.get("image_ids") is not None else range(count)
    return _universe(_ids(info, "utterance_ids")), images


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
    found = _values(info, name)
    if set(map(type, found)) <= {int}:
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
