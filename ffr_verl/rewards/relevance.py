"""How much nearer the predicted elements are to the query than the dialogue's other elements, by their embeddings.

A component of the entry point group `ffr_verl.rewards`, as anyone's own may be: `weights: {relevance: 0.3}`.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ffr_verl.embeddings.store import EmbeddingStore, image_key, open_store, query_key
from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle, Fragment
from ffr_verl.rewards.coherence import VectorSource, utterance_prefix
from ffr_verl.rewards.reading import RowDialogue, read_answer, read_gold

_EMPTY = Fragment((), ())
_MOST_DIALOGUES = 2048
_AGAIN = "make it again with `ffr-verl embed`, which stores the queries of the data files"

# Cosines with the query, by id: of utterances and of images that have vectors.
_Nearness = tuple[dict[int, float], dict[int, float]]
_kept: weakref.WeakKeyDictionary[EmbeddingStore, dict[Any, _Nearness]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def relevance_reward(
    completion: str,
    solution: str,
    *,
    extra_info: Mapping[str, Any],
    store: VectorSource | str | os.PathLike[str],
    style: AnswerStyle = "plain",
) -> float:
    """How much nearer the predicted elements are to the query than the dialogue's others, in [0, 1]; half is chance.

    With the cosines of the query and each element of a kind, utterances or images, it is (1 + (mean of the predicted
    ones - mean of the others) / (greatest - smallest)) / 2; where both kinds were predicted, their mean weighted by
    the numbers of predicted elements. Elements without a vector, ids outside the dialogue and repeats are left out,
    and a kind of which all or none are predicted does not count. Where no kind counts, as when everything was
    predicted: 0. Both fragments empty: 1; one of them empty: 0; a malformed answer or gold: 0. The gold is looked at
    only for that.

    Args:
        completion: what the model wrote.
        solution: the gold answer.
        extra_info: of the row: `query`, and what `coherence_reward` needs.
        store: an `EmbeddingStore`, its folder, or a dict with the keys of `utterance_key`, `image_key` and
            `query_key`.
        style: of the completion, see `parse_fragment`.

    Raises:
        FFRError: when `extra_info` lacks a field, the row has no query, or the store no vector for it, as one that
            was made before queries were stored.

    Source: ours.

    Example:
        >>> store = {"qry:a cat": [1, 0], "utt:d:0": [1, 0], "utt:d:1": [0.6, 0.8], "utt:d:2": [0, 1]}
        >>> info = {"dialogue_id": "d", "query": "a cat", "utterance_ids": [0, 1, 2], "image_utterances": []}
        >>> info["images"] = []
        >>> def relevance(ids):
        ...     texts = [f"<|utt_ids_start|>[{ids}]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"] * 2
        ...     return round(relevance_reward(*texts, extra_info=info, store=store), 3)
        >>> [relevance(ids) for ids in ("0", "1", "2", "0, 1", "0, 1, 2")]
        [0.85, 0.55, 0.1, 0.9, 0.0]
    """
    predicted, gold = read_answer(completion, style), read_gold(solution)
    if predicted is None or gold is None:
        return 0.0
    if predicted == _EMPTY or gold == _EMPTY:
        return float(predicted == gold)
    source = open_store(store) if isinstance(store, (str, os.PathLike)) else store
    total, count = 0.0, 0
    for near, named in zip(_nearness(source, extra_info), (predicted.utterance_ids, predicted.image_ids), strict=True):
        chosen = [near[one] for one in near.keys() & set(named)]
        rest = len(near) - len(chosen)
        if chosen and rest:
            own, every, span = sum(chosen), near.values(), max(near.values()) - min(near.values())
            nearer = own / len(chosen) - (sum(every) - own) / rest
            total += len(chosen) * 0.5 * (1.0 + nearer / span if span else 1.0)
            count += len(chosen)
    return min(1.0, max(0.0, total / count)) if count else 0.0


def check_queries(store: EmbeddingStore, infos: Iterable[Mapping[str, Any]]) -> None:
    """Raise `FFRError` for the first row whose query has no vector in the store."""
    for info in infos:
        _query_vector(store, info)


def _nearness(source: VectorSource, info: Mapping[str, Any]) -> _Nearness:
    if not isinstance(source, EmbeddingStore):
        return _measured(source, RowDialogue.read(info), _query_vector(source, info))
    row = RowDialogue.read(info)
    name = (row.dialogue_id, row.split, info.get("query"), *[tuple(values) for values in row[2:]])
    with _lock:
        kept = _kept.setdefault(source, {})
        if (found := kept.get(name)) is not None:
            return found
    found = _measured(source, row, _query_vector(source, info))
    with _lock:
        while len(kept) >= _MOST_DIALOGUES:
            del kept[next(iter(kept))]
        kept[name] = found
    return found


def _query_vector(source: VectorSource, info: Mapping[str, Any]) -> np.ndarray:
    query, name = info.get("query"), getattr(source, "path", "embeddings")
    if not isinstance(query, str) or not query.strip():
        raise FFRError(
            f"extra_info.query: found {query!r}, expected the query as text; relevance compares the fragment with it"
        )
    vector = source.get(query_key(query))
    if vector is None:
        if isinstance(source, EmbeddingStore) and "query" not in source.manifest.modalities:
            raise FFRError(f"{name}: holds no queries, which relevance needs; {_AGAIN}")
        raise FFRError(f"{name}: no vector for the query {query.strip()!r:.80}; {_AGAIN}")
    return np.asarray(vector, dtype=np.float64)


def _measured(source: VectorSource, row: RowDialogue, query: np.ndarray) -> _Nearness:
    row_of = getattr(source, "row_of", source.get)  # which tells "has no vector" from "never heard of"
    prefix = utterance_prefix(row, row_of)
    utterances = {one: f"{prefix}{one}" for one in row.utterance_ids}
    images = {one: image_key(path) for one, path in zip(row.image_ids, row.images, strict=True)}
    found = _cosines(source, utterances, query), _cosines(source, images, query)
    keys = [*utterances.values(), *images.values()]
    if not any(found) and all(row_of(key) is None for key in keys):
        raise FFRError(
            f"{getattr(source, 'path', 'embeddings')}: no vector for dialogue {row.dialogue_id!r} ({keys[:1]}); "
            "make the store of this data with `ffr-verl embed`"
        )
    return found


def _cosines(source: VectorSource, keys: Mapping[int, str], query: np.ndarray) -> dict[int, float]:
    vectors = {one: vector for one, key in keys.items() if (vector := source.get(key)) is not None}
    if not vectors:
        return {}
    try:
        matrix = np.stack([np.asarray(vector, dtype=np.float64) for vector in vectors.values()])
        products = matrix @ query
        lengths = np.sqrt((matrix * matrix).sum(axis=1)) * np.sqrt(query @ query)
    except (TypeError, ValueError):
        products = lengths = np.array([np.nan])
    if not np.isfinite(products).all():
        raise FFRError(
            f"{getattr(source, 'path', 'embeddings')}: {next(iter(keys.values()))} and others: expected vectors of "
            "finite numbers, as long as the query's; make the embeddings again, with `ffr-verl embed` or what made "
            "them"
        )
    values = np.divide(products, lengths, out=np.zeros(len(lengths)), where=lengths > 0)
    return dict(zip(vectors, values.tolist(), strict=True))
