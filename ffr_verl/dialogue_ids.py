"""Which ids a dialogue has: the universe of the metrics, and what an answer may name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["DEFAULT_GREATEST", "DialogueIds", "DialogueIdsReader", "Ids"]

# Greatest id of the universe of a dialogue that has no ids of a modality, as published.
DEFAULT_GREATEST = 20

_UTTERANCE = re.compile(r"<\|utt_id_start\|>([0-9]{1,9})<\|utt_id_end\|>")
_IMAGE = re.compile(r"<\|img_id_start\|>([0-9]{1,9})<\|img_id_end\|>")


class Ids(NamedTuple):
    """The ids of one modality.

    Attributes:
        first: the smallest; 0 when there are none.
        end: behind the greatest; 0 when there are none.
        others: all of them where some between `first` and `end` are missing, else `None`.
    """

    first: int
    end: int
    others: frozenset[int] | None = None

    @property
    def universe(self) -> int:
        """Size of the universe `0 … greatest id`, of `0 … 20` when there are no ids."""
        return self.end or DEFAULT_GREATEST + 1

    def outside(self, identifiers: Iterable[int]) -> int:
        """How many of the ids the dialogue does not have.

        Example:
            >>> Ids(0, 3).outside({1, 3, 4})
            2
        """
        if self.others is not None:
            return sum([identifier not in self.others for identifier in identifiers])
        return sum([not self.first <= identifier < self.end for identifier in identifiers])


class DialogueIds(NamedTuple):
    """The ids of a dialogue.

    Attributes:
        utterances: ids of its utterances.
        images: ids of its images.
        turns: number of its utterances.
        is_counting: whether both are `0, 1, 2, …`, as a prompt of this package has them.
    """

    utterances: Ids
    images: Ids
    turns: int
    is_counting: bool


_COUNTING = [str(number) for number in range(1024)]
_COUNTED = [Ids(0, end) for end in range(len(_COUNTING) + 1)]


def _ids(found: list[str]) -> Ids:
    count = len(found)
    if found == _COUNTING[:count]:
        return _COUNTED[count]
    numbers = {int(one) for one in found}
    first, end = min(numbers), max(numbers) + 1
    return Ids(first, end, None if len(numbers) == end - first else frozenset(numbers))


class DialogueIdsReader:
    """Reads the ids out of prompts, quicker where rows that ask of the same dialogue follow each other.

    Example:
        >>> prompt = "<|utt_id_start|>0<|utt_id_end|> a: <|img_id_start|>0<|img_id_end|><image>"
        >>> DialogueIdsReader().read(prompt).images
        Ids(first=0, end=1, others=None)
    """

    def __init__(self) -> None:
        self._dialogue = ""
        self._ids = DialogueIds(Ids(0, 0), Ids(0, 0), 0, True)

    def read(self, prompt: str) -> DialogueIds:
        """The ids of the dialogue in a user's message."""
        start = prompt.find("<|utt_id_start|>")
        if start < 0 or prompt.find("<|img_id_start|>", 0, start) >= 0:
            start = 0
        is_known = len(prompt) - start == len(self._dialogue) and prompt.endswith(self._dialogue)
        if not is_known:
            turns = _UTTERANCE.findall(prompt, start)
            utterances, images = _ids(turns), _ids(_IMAGE.findall(prompt, start))
            is_counting = bool(turns) and not utterances.first and utterances.others is None
            is_counting = is_counting and not images.first and images.others is None
            self._ids = DialogueIds(utterances, images, len(turns), is_counting)
            self._dialogue = prompt[start:]
        return self._ids
