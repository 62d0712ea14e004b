"""How well neighbouring elements of the predicted fragment fit together, by the cosine of their embeddings."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ffr_verl.embeddings.store import EmbeddingStore, image_key, open_store, split_dialogue_id, utterance_key
from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle, Fragment
from ffr_verl.rewards.reading import RowDialogue, read_answer, read_gold
from ffr_verl.rewards.settings import CoherenceMode, check_settings

__all__ = [
    "CoherenceMode",
    "CoherenceScorer",
    "VectorSource",
    "coherence_reward",
    "open_scorer",
    "scorer_of",
    "utterance_prefix",
]

logger = logging.getLogger(__name__)

_EMPTY = Fragment((), ())
# What one scorer keeps, about 200 bytes each: the answers to some thousands of dialogues.
_MOST_COSINES = 250_000
_MOST_MISSING = 1_000_000

# An utterance, by its id; or images of one utterance, whose mean counts, by theirs.
Element = int | tuple[int, ...]
Pair = tuple[Element, Element]


class VectorSource(Protocol):
    """What the reward needs of an embedding store; `EmbeddingStore` is one, a `dict` of arrays another."""

    def get(self, key: str, /) -> np.ndarray | None:
        """The vector of a key, or `None`."""


def utterance_prefix(row: RowDialogue, row_of: Callable[[str], Any]) -> str:
    """What the keys of a dialogue's utterances begin with: those of its own split, where the source holds such (an
    earlier split has used the id for another dialogue). `row_of` gives `None` for a key that it has never heard of."""
    if row.split and row.utterance_ids:
        of_split = utterance_key(split_dialogue_id(row.split, row.dialogue_id), "")
        if row_of(f"{of_split}{row.utterance_ids[0]}") is not None:
            return of_split
    return utterance_key(row.dialogue_id, "")


class _Dialogue:
    """What answers have needed of a dialogue: vectors with their lengths, `None` where there is none, and cosines."""

    def __init__(self, source: VectorSource, row: RowDialogue) -> None:
        self.row, self._source, self._get = row, source, source.get
        self.cosines: dict[Pair, float] = {}
        self.missing: set[str] = set()  # keys that were looked up, and the source has never heard of
        self.counted = 0  # by the scorer, of `size`
        self._vectors: dict[Element, tuple[Any, float] | None] = {}
        # A store tells "known to have no vector" from "never heard of".
        self._row_of = getattr(source, "row_of", source.get)
        self._prefix = utterance_prefix(row, self._row_of)

    @property
    def size(self) -> int:
        """How much is kept, in cosines."""
        return len(self.cosines) + len(self.row.utterance_ids)

    def is_of(self, info: Mapping[str, Any]) -> bool:
        """Whether this is the dialogue that `info` describes, and not another one with its id."""
        row, image_ids = self.row, info.get("image_ids")
        return (
            row.images == _plain_list(info.get("images"))
            and row.utterance_ids == _plain_list(info.get("utterance_ids"))
            and row.image_utterances == _plain_list(info.get("image_utterances"))
            and row.image_ids == (list(range(len(row.images))) if image_ids is None else _plain_list(image_ids))
        )

    def _key(self, element: Element) -> str | None:
        """The key of an utterance or an image; `None` for an id that the dialogue does not have."""
        row = self.row
        if not isinstance(element, tuple):
            return f"{self._prefix}{element}" if element in row.utterance_ids else None
        return image_key(row.images[row.image_ids.index(element[0])]) if element[0] in row.image_ids else None

    def unknown(self, fragment: Fragment) -> list[str]:
        """Keys of those named ids that the dialogue has and the source has never heard of."""
        keys = [self._key(one) for one in dict.fromkeys(fragment.utterance_ids)]
        keys += [self._key((one,)) for one in dict.fromkeys(fragment.image_ids)]
        return [key for key in keys if key is not None and self._row_of(key) is None]

    def _look_up(self, element: Element) -> tuple[Any, float] | None:
        """The vector of an utterance or an image and its length, from the source; `None` where there is none."""
        key = self._key(element)
        vector = None if key is None else self._get(key)
        if vector is None and key is not None and self._row_of(key) is None:
            self.missing.add(key)
        found = self._vectors[element] = None if vector is None else self._measured(element, vector)
        return found

    def _measured(self, element: Element, vector: Any) -> tuple[Any, float]:
        """A vector and its length. `FFRError` for what is no vector of finite numbers."""
        if type(vector) is np.ndarray and vector.dtype.char == "f":  # as most stores have them
            square = float(vector.dot(vector))
            if 1e-30 < square < 1e30:
                return vector, math.sqrt(square)
        try:
            vector = np.asarray(vector, dtype=np.float64)
            length = math.sqrt(vector.dot(vector)) if vector.ndim == 1 else math.nan
        except (TypeError, ValueError):
            length = math.nan
        if not math.isfinite(length):
            raise self._unusable(element, "a number that is not finite, or no list of numbers")
        return vector, length

    def sequence(self, predicted: Fragment, mode: CoherenceMode) -> list[Element]:
        """What is compared: by utterance id, the utterance if it was predicted, then its predicted images."""
        row, vectors, look_up = self.row, self._vectors, self._look_up
        utterances = [
            one
            for one in set(predicted.utterance_ids)
            if (vectors[one] if one in vectors else look_up(one)) is not None
        ]
        images = [
            one
            for one in sorted(set(predicted.image_ids))
            if (vectors[one,] if (one,) in vectors else look_up((one,))) is not None
        ]
        if mode == "published" and not (utterances and images):
            return []
        elements: dict[int, Any] = {2 * one: one for one in utterances}  # its images come behind an utterance
        for one in images:
            place = 2 * row.image_utterances[row.image_ids.index(one)] + 1
            elements[place] = (*elements.get(place, ()), one)
        return [elements[place] for place in sorted(elements)]

    def cosines_of(self, pairs: Sequence[Pair]) -> list[float]:
        """Of each pair, clipped to [-1, 1]; 0 when one of the two has length 0.

        Raises `FFRError` for a vector that is not as long as the others.
        """
        cosines, vectors, values = self.cosines, self._vectors, []
        for pair in pairs:
            value = cosines.get(pair)
            if value is None:
                first, first_length = vectors.get(pair[0]) or self._mean(pair[0])
                second, second_length = vectors.get(pair[1]) or self._mean(pair[1])
                length = first_length * second_length
                try:
                    value = float(first.dot(second)) / length if length else 0.0
                except ValueError:
                    raise self._unusable(pair[1], f"{len(second)} numbers where others are {len(first)}") from None
                value = cosines[pair] = -1.0 if value < -1.0 else 1.0 if value > 1.0 else value
            values.append(value)
        return values

    def _mean(self, images: Any) -> tuple[Any, float]:
        """The mean vector of several images and its length."""
        vectors = [found[0] for one in images if (found := self._vectors[one,]) is not None]
        try:
            mean = np.stack(vectors).mean(axis=0, dtype=np.float64)
        except ValueError:
            raise self._unusable(images, f"vectors of {sorted({len(one) for one in vectors})} numbers") from None
        found = self._vectors[images] = self._measured(images, mean)
        return found

    def _unusable(self, element: Element, found: str) -> FFRError:
        key = self._key(element)
        return FFRError(
            f"{getattr(self._source, 'path', 'embeddings')}: {key}: found {found}, expected a vector of "
            "finite numbers, as long as the others; make the embeddings again, with `ffr-verl embed` or what made them"
        )


def _plain_list(values: Any) -> list[Any]:
    if type(values) is list:
        return values
    return list(values.tolist() if isinstance(values, np.ndarray) else values)


class CoherenceScorer:
    """Coherence of fragments over one source of vectors (an `EmbeddingStore`, or a mapping of keys to vectors), with
    what the last dialogues needed of them kept in memory. Safe to use from several threads."""

    def __init__(self, source: VectorSource) -> None:
        self._source = source
        self._dialogues: dict[tuple[Any, Any], _Dialogue] = {}
        self._kept = 0
        self._lock = threading.Lock()
        self._missing: set[str] = set()

    @property
    def missing_keys(self) -> int:
        """How many different keys answers named that the source has never heard of."""
        return len(self._missing)

    def _dialogue(self, info: Mapping[str, Any]) -> _Dialogue:
        try:
            found = self._dialogues.get((info["dialogue_id"], info.get("split")))
            if found is not None and found.is_of(info):
                return found
        except (KeyError, TypeError, AttributeError):
            pass  # the next line says what is wrong
        return _Dialogue(self._source, RowDialogue.read(info))

    def _keep(self, dialogue: _Dialogue, info: Mapping[str, Any]) -> None:
        """Keep what a dialogue knows now, and forget the oldest ones where that is too much in all."""
        name = info["dialogue_id"], info.get("split")
        with self._lock:
            if self._dialogues.get(name) is not dialogue:
                self._forget(name)
                self._dialogues[name] = dialogue
            self._kept += dialogue.size - dialogue.counted
            dialogue.counted = dialogue.size
            while self._kept > _MOST_COSINES and len(self._dialogues) > 1:
                self._forget(next(iter(self._dialogues)))

    def _forget(self, name: tuple[Any, Any]) -> None:
        if (gone := self._dialogues.pop(name, None)) is not None:
            self._kept -= gone.counted
            gone.counted = 0

    def _note_missing(self, dialogue: _Dialogue) -> None:
        """Count keys that the source lacks, and log the first."""
        keys = list(dialogue.missing)
        with self._lock:
            is_first = not self._missing
            if len(self._missing) < _MOST_MISSING:
                self._missing.update(keys)
        if is_first:
            logger.warning(
                "%s: no vector for %s of dialogue %s: it is left out of coherence. Make the store again with "
                "`ffr-verl embed` on this data. Further missing keys are counted, not logged.",
                getattr(self._source, "path", "embeddings"),
                min(keys),
                dialogue.row.dialogue_id,
            )

    def missing_of(self, info: Mapping[str, Any]) -> list[str]:
        """Keys of the dialogue's utterances and images that the source lacks; nothing is logged or counted."""
        row = RowDialogue.read(info)
        whole = Fragment(tuple(row.utterance_ids), tuple(row.image_ids))
        return list(dict.fromkeys(_Dialogue(self._source, row).unknown(whole)))

    def missing_in(self, predicted: Fragment | None, info: Mapping[str, Any]) -> int:
        """How many ids of the prediction exist in the dialogue and were left out for want of a vector."""
        return len(self._dialogue(info).unknown(predicted or _EMPTY))

    def score(
        self,
        predicted: Fragment | None,
        gold: Fragment | None,
        info: Mapping[str, Any],
        mode: CoherenceMode = "continuous",
    ) -> float:
        """Coherence of a parsed answer, see `coherence_reward`; `None`, a malformed answer, counts as empty, and a
        malformed gold earns nothing."""
        if gold is None:
            return 0.0
        predicted = predicted or _EMPTY
        if predicted == _EMPTY or gold == _EMPTY:
            return float(predicted == gold)
        dialogue = self._dialogue(info)
        if predicted.image_ids and not dialogue.row.images:
            return 0.0
        sequence = dialogue.sequence(predicted, mode)
        if dialogue.missing:
            self._note_missing(dialogue)
        pairs = list(itertools.pairwise(sequence))
        if mode == "gold_anchored":
            in_gold = {*gold.utterance_ids, *[(one,) for one in gold.image_ids]}
            counts = {
                element: in_gold.issuperset([(one,) for one in element] if isinstance(element, tuple) else [element])
                for element in sequence
            }
            pairs = [pair for pair in pairs if counts[pair[0]] and counts[pair[1]]]
            sequence = sequence if len(sequence) != 1 or counts[sequence[0]] else []
        value = (
            sum(dialogue.cosines_of(pairs), 0.0) / (len(sequence) - 1) if len(sequence) > 1 else 0.5 * len(sequence)
        )
        if dialogue.size > dialogue.counted:
            self._keep(dialogue, info)
        return value


_MISSING_IN_MAPPINGS: set[str] = set()


def scorer_of(store: VectorSource) -> CoherenceScorer:
    """The process's one scorer over an open `EmbeddingStore`; a new one over anything else, which may change."""
    if isinstance(store, EmbeddingStore):
        scorer = store.scorer
        if scorer is None:
            scorer = store.scorer = CoherenceScorer(store)
        return scorer
    scorer = CoherenceScorer(store)
    scorer._missing = _MISSING_IN_MAPPINGS  # nothing is kept for it but what it lacked, which is said once
    return scorer


def open_scorer(path: str | os.PathLike[str]) -> CoherenceScorer:
    """The process's one scorer over the store that is at `path` now, see `open_store`."""
    return scorer_of(open_store(path))


def coherence_reward(
    completion: str,
    solution: str,
    *,
    extra_info: Mapping[str, Any],
    store: VectorSource | str | os.PathLike[str],
    mode: CoherenceMode = "continuous",
    style: AnswerStyle = "plain",
) -> float:
    """Mean cosine of neighbouring elements of the predicted fragment.

    The fragment becomes a sequence: for every utterance id in ascending order the utterance's vector, if it was
    predicted, then the mean of the vectors of its predicted images. A repeated id counts once; an id outside the
    dialogue or without a vector is left out. The reward is the mean cosine (each clipped to [-1, 1]) of neighbours;
    one element alone earns 0.5, none 0. The value is in [-1, 1].

    Both fragments empty: 1; exactly one of them empty: 0, and a malformed text counts as empty. Images predicted in a
    dialogue that has none: 0. A malformed gold earns 0.

    Args:
        completion: what the model wrote.
        solution: the gold answer.
        extra_info: of the row: `dialogue_id`, `utterance_ids`, `image_utterances` (utterance of each image), `images`;
            `image_ids` where they do not count from 0.
        store: an `EmbeddingStore`, its folder, or a dict with the keys of `utterance_key` and `image_key`.
        mode: `published`: there is a sequence only when at least one predicted utterance and one predicted image
            have vectors, so text alone earns 0, and the gold matters for emptiness only. `continuous`: a sequence for
            any fragment. `gold_anchored`: as `continuous`, but a pair counts only when both ends are in the gold
            fragment (otherwise 0, and a lone element outside it earns 0), so that a coherent but wrong fragment earns
            nothing.
        style: of the completion, see `parse_fragment`.

    Raises:
        FFRError: when `extra_info` lacks a field or holds something else there, a vector is none, the store cannot be
            opened, and for another `mode`.

    Source: `published` the released reward; the other modes are ours.

    Example:
        >>> store = {f"utt:d:{number}": vector for number, vector in enumerate(np.eye(3))}
        >>> store["img:cat.png"] = np.array([1.0, 1.0, 0.0])
        >>> info = {"dialogue_id": "d", "utterance_ids": [0, 1, 2], "image_utterances": [0], "images": ["cat.png"]}
        >>> text = "<|utt_ids_start|>[0, 1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> both = "<|utt_ids_start|>[0, 1]<|utt_ids_end|>;<|img_ids_start|>[0]<|img_ids_end|>"
        >>> coherence_reward(text, both, extra_info=info, store=store)  # the cosine of utterances 0 and 1
        0.0
        >>> round(coherence_reward(both, both, extra_info=info, store=store), 4)  # 0, its image, 1
        0.7071
    """
    check_settings("coherence", mode=mode, style=style)
    scorer = open_scorer(store) if isinstance(store, (str, os.PathLike)) else scorer_of(store)
    return scorer.score(read_answer(completion, style), read_gold(solution), extra_info, mode)
