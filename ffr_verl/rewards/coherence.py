"""How well neighbouring elements of the predicted fragment fit together, by the cosine of their embeddings."""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from array import array
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy as np

from ffr_verl.embeddings.store import image_key, split_dialogue_id, utterance_key
from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle, Fragment, parse_fragment, parse_gold

__all__ = ["CoherenceMode", "CoherenceScorer", "VectorSource", "coherence_reward", "scorer_of"]

logger = logging.getLogger(__name__)

CoherenceMode = Literal["published", "continuous", "gold_anchored"]

_EMPTY = Fragment((), ())
_FIELDS = ("dialogue_id", "utterance_ids", "image_utterances", "images")
# Cosines kept in memory by one scorer: 4 million, 32 MB, some 4,000 dialogues of 25 turns and 6 images.
_CACHED_COSINES = 4_000_000


class VectorSource(Protocol):
    """What the reward needs of an embedding store; `EmbeddingStore` is one, a `dict` of arrays another."""

    def get(self, key: str, /) -> np.ndarray | None:
        """The vector of a key, or `None`."""


class _DialogueProducts:
    """The dot products between all vectors of a dialogue, from which every cosine of a fragment follows.

    A mean of image vectors needs no vector arithmetic either: its product with another vector is a mean of products.
    """

    __slots__ = (
        "_products",
        "_size",
        "image_at",
        "image_ids",
        "image_utterances",
        "images",
        "missing",
        "utterance_at",
        "utterance_ids",
        "utterance_of_image",
    )

    def __init__(self, source: VectorSource, info: Mapping[str, Any]) -> None:
        dialogue_id = str(info["dialogue_id"])
        self.utterance_ids = _plain_list(info["utterance_ids"])
        self.image_utterances = _plain_list(info["image_utterances"])
        self.images = _plain_list(info["images"])
        if len(self.image_utterances) != len(self.images):
            raise TypeError(f"{len(self.image_utterances)} image_utterances for {len(self.images)} images")
        self.image_ids = _image_ids(info)
        if len(self.image_ids) != len(self.images):
            raise TypeError(f"{len(self.image_ids)} image_ids for {len(self.images)} images")
        self.utterance_of_image = dict(zip(self.image_ids, self.image_utterances, strict=True))
        find = getattr(source, "row_of", source.get)  # a store tells "known to have none" from "never heard of"
        own_name = split_dialogue_id(str(info.get("split", "")), dialogue_id)
        if self.utterance_ids and find(utterance_key(own_name, self.utterance_ids[0])) is not None:
            dialogue_id = own_name
        self.utterance_at: dict[int, int] = {}
        self.image_at: dict[int, int] = {}
        self.missing: dict[str, tuple[Literal["utterance", "image"], int]] = {}
        vectors: list[np.ndarray] = []
        wanted: list[tuple[Literal["utterance", "image"], int, str]] = [
            ("utterance", identifier, utterance_key(dialogue_id, identifier)) for identifier in self.utterance_ids
        ]
        wanted += [
            ("image", identifier, image_key(name))
            for identifier, name in zip(self.image_ids, self.images, strict=True)
        ]
        for kind, identifier, key in wanted:
            vector = source.get(key)
            if vector is None:
                if find(key) is None:
                    self.missing[key] = (kind, identifier)
                continue
            (self.utterance_at if kind == "utterance" else self.image_at)[identifier] = len(vectors)
            vectors.append(np.asarray(vector, dtype=np.float64))
        self._size = len(vectors)
        if vectors:
            matrix = np.stack(vectors)
            self._products = array("d", (matrix @ matrix.T).ravel().tobytes())
        else:
            self._products = array("d")

    def __len__(self) -> int:
        return len(self._products)

    def is_of(self, info: Mapping[str, Any]) -> bool:
        """Whether these are the products of the dialogue that `info` describes, and not of another with its id."""
        return (
            self.images == _plain_list(info["images"])
            and self.utterance_ids == _plain_list(info["utterance_ids"])
            and self.image_utterances == _plain_list(info["image_utterances"])
            and self.image_ids == _image_ids(info)
        )

    def cosine(self, first: tuple[int, ...], second: tuple[int, ...]) -> float:
        """Cosine, clipped to [-1, 1], of the means of two groups of vectors; 0 when one of them has length 0."""
        products, size = self._products, self._size
        if len(first) == len(second) == 1:
            a, b = first[0], second[0]
            dot, length = products[a * size + b], products[a * size + a] * products[b * size + b]
        else:
            dot = sum([products[a * size + b] for a in first for b in second])
            length = sum([products[a * size + b] for a in first for b in first])
            length *= sum([products[a * size + b] for a in second for b in second])
        if length <= 0.0:
            return 0.0
        value = dot / math.sqrt(length)
        return -1.0 if value < -1.0 else min(value, 1.0)


def _image_ids(info: Mapping[str, Any]) -> list[int]:
    """Ids of the images; those of a window over a dialogue may start anywhere, others count from 0."""
    given = info.get("image_ids")
    return list(range(len(info["images"]))) if given is None else _plain_list(given)


def _plain_list(values: Any) -> list[Any]:
    if type(values) is list:
        return values
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


class CoherenceScorer:
    """Coherence of fragments over one source of vectors, with the dialogues it met last kept in memory.

    Safe to use from several threads.

    Args:
        source: an `EmbeddingStore`, or a mapping of keys to vectors.

    Example:
        >>> source = {"utt:d:0": np.array([1.0, 0.0]), "utt:d:1": np.array([1.0, 1.0])}
        >>> info = {"dialogue_id": "d", "utterance_ids": [0, 1], "image_utterances": [], "images": []}
        >>> gold = Fragment((0, 1), ())
        >>> round(CoherenceScorer(source).score(gold, gold, info), 4)
        0.7071
    """

    def __init__(self, source: VectorSource) -> None:
        self._source = source
        self._dialogues: dict[tuple[Any, Any], _DialogueProducts] = {}
        self._cosines = 0
        self._lock = threading.Lock()
        self._missing: set[str] = set()

    @property
    def missing_keys(self) -> int:
        """How many different keys were looked for and are not in the source."""
        return len(self._missing)

    def _products(self, info: Mapping[str, Any]) -> _DialogueProducts:
        try:
            name = (info["dialogue_id"], info.get("split"))
            found = self._dialogues.get(name)
            if found is not None and found.is_of(info):
                return found
            made = _DialogueProducts(self._source, info)
        except (KeyError, TypeError) as error:
            lacking = [name for name in _FIELDS if not isinstance(info, Mapping) or info.get(name) is None]
            raise FFRError(
                f"extra_info: coherence needs {', '.join(_FIELDS)}; "
                + (f"missing: {', '.join(lacking)}" if lacking else f"unusable: {error}")
                + "; `ffr-verl prepare` writes them"
            ) from None
        with self._lock:
            if made.missing and not self._missing:
                logger.warning(
                    "%s: no vector for %d of the %d utterances and images of dialogue %s (%s ...): they are left out "
                    "of coherence. Make the store again with `ffr-verl embed` on this data. Further missing keys are "
                    "counted, not logged.",
                    getattr(self._source, "path", "embeddings"),
                    len(made.missing),
                    len(made.utterance_ids) + len(made.images),
                    info["dialogue_id"],
                    next(iter(made.missing)),
                )
            self._missing.update(made.missing)
            replaced = self._dialogues.pop(name, None)
            self._cosines += len(made) - (len(replaced) if replaced is not None else 0)
            self._dialogues[name] = made
            while self._cosines > _CACHED_COSINES and len(self._dialogues) > 1:
                self._cosines -= len(self._dialogues.pop(next(iter(self._dialogues))))
        return made

    def missing_of(self, info: Mapping[str, Any]) -> list[str]:
        """Keys of the dialogue's utterances and images that the source lacks; nothing is logged or counted."""
        return list(_DialogueProducts(self._source, info).missing)

    def missing_in(self, predicted: Fragment | None, info: Mapping[str, Any]) -> int:
        """How many ids of the prediction exist in the dialogue and were left out for want of a vector."""
        missing = self._products(info).missing
        if predicted is None or not missing:
            return 0
        lacking = set(missing.values())
        return sum(("utterance", identifier) in lacking for identifier in set(predicted.utterance_ids)) + sum(
            ("image", identifier) in lacking for identifier in set(predicted.image_ids)
        )

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
        products = self._products(info)
        if predicted.image_ids and not products.images:
            return 0.0
        utterance_at, image_at, utterance_of_image = (
            products.utterance_at,
            products.image_at,
            products.utterance_of_image,
        )
        utterances = {identifier for identifier in predicted.utterance_ids if identifier in utterance_at}
        images = sorted({identifier for identifier in predicted.image_ids if identifier in image_at})
        if mode == "published" and not (utterances and images):
            return 0.0
        images_of: dict[int, list[int]] = {}
        for identifier in images:
            images_of.setdefault(utterance_of_image[identifier], []).append(identifier)
        anchored = mode == "gold_anchored"
        gold_utterances, gold_images = (set(gold.utterance_ids), set(gold.image_ids)) if anchored else (set(), set())
        sequence: list[tuple[tuple[int, ...], bool]] = []  # positions in `products`; whether it may count
        for identifier in sorted(utterances.union(images_of)):
            if identifier in utterances:
                sequence.append(((utterance_at[identifier],), not anchored or identifier in gold_utterances))
            if identifier in images_of:
                held = images_of[identifier]
                sequence.append(
                    (tuple([image_at[image] for image in held]), not anchored or gold_images.issuperset(held))
                )
        if len(sequence) < 2:
            return 0.5 if sequence and sequence[0][1] else 0.0
        total = 0.0
        before, counts_before = sequence[0]
        for element, counts in sequence[1:]:
            if counts and counts_before:
                total += products.cosine(before, element)
            before, counts_before = element, counts
        return total / (len(sequence) - 1)


_SCORERS: weakref.WeakKeyDictionary[Any, CoherenceScorer] = weakref.WeakKeyDictionary()
_MISSING_IN_MAPPINGS: set[str] = set()


def scorer_of(store: VectorSource) -> CoherenceScorer:
    """The process's one scorer over an open store; a new one over a mapping, whose content may change."""
    try:
        scorer = _SCORERS.get(store)
        return _SCORERS.setdefault(store, CoherenceScorer(weakref.proxy(store))) if scorer is None else scorer
    except TypeError:  # a dict can neither be hashed nor referenced weakly: nothing is kept for it but what it lacked
        scorer = CoherenceScorer(store)
        scorer._missing = _MISSING_IN_MAPPINGS
        return scorer


def coherence_reward(
    completion: str,
    solution: str,
    *,
    extra_info: Mapping[str, Any],
    store: VectorSource,
    mode: CoherenceMode = "continuous",
    style: AnswerStyle = "plain",
) -> float:
    """Mean cosine of neighbouring elements of the predicted fragment.

    The fragment becomes a sequence: for every utterance id in ascending order the utterance's vector, if it was
    predicted, then the mean of the vectors of its predicted images. A repeated id counts once; an id outside the
    dialogue or without a vector is left out. The reward is the mean cosine (each clipped to [-1, 1]) of neighbours;
    one element alone earns 0.5, none 0.

    Both fragments empty: 1; exactly one of them empty: 0, and a malformed text counts as empty. Images predicted in a
    dialogue that has none: 0.

    Args:
        completion: what the model wrote. Whatever it is, nothing is raised.
        solution: the gold answer.
        extra_info: of the row: `dialogue_id`, `utterance_ids`, `image_utterances` (utterance of each image), `images`;
            `image_ids` where they do not count from 0.
        store: an `EmbeddingStore` (or a dict) with the keys of `utterance_key` and `image_key`.
        mode: `published`: there is a sequence only when at least one predicted utterance and one predicted image
            have vectors, so text alone earns 0, and the gold matters for emptiness only. `continuous`: a sequence for
            any fragment. `gold_anchored`: as `continuous`, but a pair counts only when both ends are in the gold
            fragment (otherwise 0, and a lone element outside it earns 0), so that a coherent but wrong fragment earns
            nothing.
        style: of the completion, see `parse_fragment`.

    Returns:
        A value in [-1, 1].

    Raises:
        FFRError: when `extra_info` lacks a field, or `store` is a path; ValueError for another `mode`.

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
    if mode not in ("published", "continuous", "gold_anchored"):
        raise ValueError(f"mode: found {mode!r}, expected published, continuous or gold_anchored")
    if isinstance(store, (str, os.PathLike)):
        raise FFRError(f"store: found the path {str(store)!r}, expected an open store: EmbeddingStore.open(...)")
    predicted = parse_fragment(completion, style=style)
    return scorer_of(store).score(predicted, parse_gold(solution), extra_info, mode)
