"""The composed reward: verl's custom reward function `compute_score`."""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ffr_verl.embeddings.store import EmbeddingStore
from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle, Fragment, locate_ids, parse_fragment, parse_gold
from ffr_verl.rewards.coherence import CoherenceMode, CoherenceScorer, scorer_of
from ffr_verl.rewards.f1 import f1_of_fragments, pooled_f1_of_fragments
from ffr_verl.rewards.format import has_no_repeats
from ffr_verl.rewards.mcc import mcc_of_ids
from ffr_verl.rewards.micro import LOWEST, MODALITIES, NEUTRAL, MicroCounts, id_values, micro_counts, micro_value
from ffr_verl.settings import refuse_unknown_keys

__all__ = ["COMPONENTS", "F1Mode", "RewardConfig", "compute_score", "id_credits", "open_scorer", "open_store"]

logger = logging.getLogger(__name__)

COMPONENTS = ("f1", "coherence", "format", "exact_match", "mcc")
F1Mode = Literal["published", "pooled", "micro", "micro_f1_mcc"]
MICRO_COUNTS = "micro_counts"  # of a row's `extra_info`: where the policy stands, see `ffr_verl.rewards.micro`
_FIRST_IMAGE = 10**9  # ids have nine digits at most
_LIST_END = _FIRST_IMAGE - 1
_MCC_SHARES: Mapping[str, float] = {"micro": 0.0, "micro_f1_mcc": 0.5}
_WHERE = "reward_kwargs"


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """The settings of `compute_score`, checked.

    Attributes:
        weights: `(component, weight)` pairs; components are f1, coherence, format, exact_match and mcc.
        f1_mode: what the weight of f1 counts: `published` F1; `pooled`, F1 of utterances and images as one list;
            `micro`, what the ids add to micro F1, or `micro_f1_mcc`, to micro F1 and MCC in equal parts, see
            `ffr_verl.rewards.micro`.
        micro_counts: where the policy stands, for rows whose `extra_info` does not say it; `None`: a neutral guess.
        embeddings: path of an embedding store, or `None`: then coherence is 0 and its weight does not count.
        coherence_mode: `continuous`, `published` or `gold_anchored`, see `coherence_reward`.
        answer_style: `plain` or `reasoning`, for every component.
        length_penalty: in [0, 1], see `f1_reward`.
        utterance_weight: share of the utterances in f1, at least 0.
        image_weight: share of the images in f1, at least 0.
    """

    weights: tuple[tuple[str, float], ...] = (("f1", 1.0), ("coherence", 1.0), ("format", 0.3))
    f1_mode: F1Mode = "published"
    micro_counts: tuple[tuple[str, tuple[float, ...]], ...] | None = None
    embeddings: str | None = None
    coherence_mode: CoherenceMode = "continuous"
    answer_style: AnswerStyle = "plain"
    length_penalty: float = 0.95
    utterance_weight: float = 0.5
    image_weight: float = 0.5

    @property
    def is_micro(self) -> bool:
        """Whether ids have a worth of their own, see `ffr_verl.rewards.micro`."""
        return self.f1_mode in _MCC_SHARES

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> RewardConfig:
        """Check `reward_kwargs` of a recipe.

        Raises:
            FFRError: for an unknown key, an unknown component or a value out of range; the message names the key.

        Example:
            >>> RewardConfig.from_kwargs({"weights": {"f1": 1.0}}).weights
            (('f1', 1.0),)
            >>> RewardConfig.from_kwargs({"length_penality": 0.9})  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ffr_verl.errors.FFRError: reward_kwargs.length_penality: unknown key; did you mean 'length_penalty'? ...
        """
        refuse_unknown_keys(kwargs, allowed=[field.name for field in fields(cls)], where=_WHERE)
        values = dict(kwargs)
        if "weights" in values:
            values["weights"] = _checked_weights(values["weights"])
        for name, choices in (
            ("f1_mode", get_args(F1Mode)),
            ("coherence_mode", get_args(CoherenceMode)),
            ("answer_style", get_args(AnswerStyle)),
        ):
            if name in values and values[name] not in choices:
                raise FFRError(f"{_WHERE}.{name}: found {values[name]!r}, expected one of {', '.join(choices)}")
        for name, upper in (("length_penalty", 1.0), ("utterance_weight", math.inf), ("image_weight", math.inf)):
            if name in values:
                values[name] = _checked_number(f"{_WHERE}.{name}", values[name], upper=upper)
        if values.get("micro_counts") is not None:
            found = micro_counts(values["micro_counts"], where=f"{_WHERE}.micro_counts")
            values["micro_counts"] = tuple(found.items())
        embeddings = values.get("embeddings")
        if embeddings is not None:
            if not isinstance(embeddings, (str, os.PathLike)) or not str(embeddings):
                raise FFRError(
                    f"{_WHERE}.embeddings: found {embeddings!r}, expected the folder of an embedding store (made by "
                    "`ffr-verl embed`), or null for no coherence reward"
                )
            values["embeddings"] = os.fspath(embeddings)
        return cls(**values)


def _checked_number(where: str, value: Any, *, upper: float = math.inf) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0.0 <= value <= upper
        or math.isinf(value)
    ):
        expected = "a number of at least 0" if math.isinf(upper) else f"a number from 0 to {upper:g}"
        raise FFRError(f"{where}: found {value!r}, expected {expected}")
    return float(value)


def _checked_weights(weights: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(weights, Mapping):
        raise FFRError(f"{_WHERE}.weights: found {weights!r}, expected a mapping such as {{f1: 1.0, format: 0.3}}")
    refuse_unknown_keys(weights, allowed=COMPONENTS, where=f"{_WHERE}.weights")
    return tuple((str(name), _checked_number(f"{_WHERE}.weights.{name}", value)) for name, value in weights.items())


_LOCK = threading.Lock()
_OPEN_STORES: dict[str, EmbeddingStore] = {}
_SAID: set[str] = set()


def open_store(path: str | os.PathLike[str]) -> EmbeddingStore:
    """The process's one opened store at `path`, opened on first use.

    Raises:
        FFRError: when the store cannot be opened.
    """
    name = os.path.realpath(os.path.expanduser(path))
    with _LOCK:
        if name not in _OPEN_STORES:
            _OPEN_STORES[name] = EmbeddingStore.open(name)
        return _OPEN_STORES[name]


def open_scorer(path: str | os.PathLike[str]) -> CoherenceScorer:
    """The process's one scorer over the store at `path`, see `open_store`."""
    return scorer_of(open_store(path))


def _warn_once(message: str) -> None:
    with _LOCK:
        is_new = message not in _SAID
        _SAID.add(message)
    if is_new:
        logger.warning(message)


@dataclass(frozen=True, slots=True)
class _Settings:
    """A checked config, and what its first call has opened."""

    config: RewardConfig
    coherence: CoherenceScorer | None
    wants_mcc: bool
    weights: tuple[tuple[str, float], ...]
    micro: tuple[MicroCounts, ...] | None


_MAPPINGS = ("weights", "micro_counts")


@functools.lru_cache(maxsize=64)
def _settings_of(items: tuple[tuple[str, Any], ...]) -> _Settings:
    config = RewardConfig.from_kwargs({name: dict(value) if name in _MAPPINGS else value for name, value in items})
    weights = dict(config.weights)
    if weights.get("coherence") and config.embeddings is None:
        _warn_once("no embeddings configured: the coherence reward is 0 and its weight does not count")
    try:
        scorer = None if config.embeddings is None else open_scorer(config.embeddings)
    except FFRError as error:
        raise FFRError(f"{_WHERE}.embeddings: {error}") from None
    trained = "f1" if config.f1_mode == "published" else "f1_pooled" if config.f1_mode == "pooled" else "f1_micro"
    counted = tuple((trained if name == "f1" else name, weight) for name, weight in config.weights)
    micro = None
    if config.is_micro:
        given = dict(config.micro_counts or ())
        micro = tuple([MicroCounts(*given.get(kind, NEUTRAL)) for kind in MODALITIES])
    return _Settings(config, scorer, "mcc" in weights, counted, micro)


class _Same:
    """A key that is equal to another one of the same object only."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _items(mapping: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(
        [
            (name, tuple(one) if isinstance(one, Sequence) and not isinstance(one, str) else one)
            for name, one in mapping.items()
        ]
    )


@functools.lru_cache(maxsize=64)
def _items_of_node(node: _Same) -> tuple[tuple[str, Any], ...]:
    return _items(node.value)


def _hashable(value: Any) -> Any:
    """The items of a mapping. verl hands a node of its config over, the same one on every call; reading that takes
    longer than all rewards together, so it is read once."""
    if type(value) is dict:
        return _items(value)
    return _items_of_node(_Same(value)) if isinstance(value, Mapping) else value


def _resolve(kwargs: Mapping[str, Any]) -> _Settings:
    try:
        return _settings_of(tuple([(key, _hashable(one) if key in _MAPPINGS else one) for key, one in kwargs.items()]))
    except (TypeError, ValueError) as error:
        if isinstance(error, FFRError):
            raise
        RewardConfig.from_kwargs(kwargs)  # unhashable or misshapen: let the check say which key
        raise


def _count(extra_info: Mapping[str, Any] | None, name: str) -> int:
    try:
        return len((extra_info or {})[name])
    except (KeyError, TypeError):
        raise FFRError(
            f"extra_info.{name} is missing; mcc and f1_mode micro need it to know the dialogue's size, "
            "`ffr-verl prepare` writes it"
        ) from None


def _is_outside(predicted: Fragment, extra_info: Mapping[str, Any] | None) -> bool:
    """Whether an answer names an id that the dialogue does not have."""
    n_utterances, n_images = _count(extra_info, "utterance_ids"), _count(extra_info, "images")
    return max(predicted.utterance_ids, default=-1) >= n_utterances or max(predicted.image_ids, default=-1) >= n_images


def _values_of_ids(
    extra_info: Mapping[str, Any] | None, settings: _Settings
) -> tuple[tuple[float, float], tuple[float, float]]:
    """What a right and a wrong utterance, and a right and a wrong image, add to the micro metric."""
    given = (extra_info or {}).get(MICRO_COUNTS)
    try:
        counts = settings.micro if given is None else tuple([tuple(given[kind]) for kind in MODALITIES])
        return _id_values_of(counts, _MCC_SHARES[settings.config.f1_mode])
    except (TypeError, KeyError):
        micro_counts(given or {}, where=f"extra_info.{MICRO_COUNTS}")  # says what is wrong with it
        raise


@functools.lru_cache(maxsize=256)  # the answers of a step are asked for with the same few counts
def _id_values_of(counts: Any, mcc_share: float) -> tuple[tuple[float, float], tuple[float, float]]:
    found = micro_counts(dict(zip(MODALITIES, counts, strict=True)), where=f"extra_info.{MICRO_COUNTS}")
    utterances, images = (id_values(found[kind], mcc_share=mcc_share) for kind in MODALITIES)
    return utterances, images


def _micro_values(
    predicted: Fragment | None, gold: Fragment | None, extra_info: Mapping[str, Any] | None, settings: _Settings
) -> tuple[float, float]:
    """What utterances and images add to the micro metric; the least for an answer that is none or names other ids."""
    if predicted is None or gold is None or _is_outside(predicted, extra_info):
        return LOWEST, LOWEST
    utterances, images = _values_of_ids(extra_info, settings)
    return (
        micro_value(predicted.utterance_ids, gold.utterance_ids, utterances),
        micro_value(predicted.image_ids, gold.image_ids, images),
    )


def id_credits(
    completion: str, solution: str, extra_info: Mapping[str, Any] | None = None, **reward_kwargs: Any
) -> list[tuple[int, int, float]] | None:
    """What each id of an answer adds to its score, with `f1_mode: micro` or `micro_f1_mcc`.

    Args:
        completion: what the model wrote.
        solution: the gold answer.
        extra_info: of the row.
        **reward_kwargs: as of `compute_score`.

    Returns:
        For each id, in the order in which the answer names them: its place (utterances by id, then images by id), the
        offset in `completion` behind its last digit, and its value; between the two kinds the end of the utterances'
        list, with value 0. Ids that the dialogue does not have take the answer down to the least. `None` for an answer
        that is none, and with another `f1_mode`.

    Example:
        >>> gold = "<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> info = {"utterance_ids": [0, 1, 2], "images": []}
        >>> info["micro_counts"] = {"utterance": [1, 2, 2, 8], "image": [0, 0, 1, 2]}
        >>> id_credits(gold, gold, info, f1_mode="micro", weights={"f1": 1.0})
        [(1, 19, 0.1875), (2, 22, 0.1875), (999999999, 23, 0.0)]
    """
    settings = _resolve(reward_kwargs)
    config = settings.config
    located = locate_ids(completion, style=config.answer_style)
    predicted, gold = parse_fragment(completion, style=config.answer_style), parse_gold(solution)
    if settings.micro is None or located is None or predicted is None or gold is None:
        return None
    weight = dict(config.weights).get("f1", 0.0)
    shares = (config.utterance_weight, config.image_weight)
    credits: list[tuple[int, int, float]] = []
    outside: list[int] = []  # of `credits`
    for first, share, ids, right, values, offsets, size in zip(
        (0, _FIRST_IMAGE),
        shares,
        (predicted.utterance_ids, predicted.image_ids),
        (set(gold.utterance_ids), set(gold.image_ids)),
        _values_of_ids(extra_info, settings),
        (located[0], located[2]),
        (_count(extra_info, "utterance_ids"), _count(extra_info, "images")),
        strict=True,
    ):
        for one, offset in zip(ids, offsets, strict=True):
            if one >= size:
                outside.append(len(credits))
            credits.append((first + one, offset, weight * share * values[one not in right] * (one < size)))
            right.discard(one)  # once more is a miss
        if not first:
            credits.append((_LIST_END, located[1], 0.0))
    rest = weight * sum(shares) * LOWEST - sum([value for *_, value in credits])
    for number in outside:
        credits[number] = (*credits[number][:2], rest / len(outside))
    return credits


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    **reward_kwargs: Any,
) -> dict[str, float]:
    """verl's custom reward function: the weighted sum of the components, and each of them.

    Args:
        data_source: not used; part of verl's signature.
        solution_str: the completion. Whatever it is, nothing is raised.
        ground_truth: the gold answer; a malformed one earns 0 in f1 and exact match.
        extra_info: of the row, as `ffr-verl prepare` writes it; coherence and mcc need it.
        **reward_kwargs: see `RewardConfig`.

    Returns:
        The same keys on every call, as verl needs: `score` = sum of weight x component, `f1`, `f1_utterances`,
        `f1_images` (always the published F1), `coherence`, `format`, `exact_match`, and `mcc` when it has a weight;
        Python floats. With `f1_mode: pooled` also `f1_pooled`, with `micro` or `micro_f1_mcc` also `f1_micro`,
        `f1_micro_utterances` and `f1_micro_images`: the weight of f1 then counts `f1_pooled` or `f1_micro`.

    Raises:
        FFRError: for settings that `RewardConfig` refuses and a store that does not open, on the first call; for an
            `extra_info` without the fields that coherence or mcc need.

    Example:
        >>> gold = "<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> compute_score("ffr/mldr", gold, gold)["score"]  # f1 1.0 + 0.3 x format 1.0; no embeddings, no coherence
        1.3
    """
    settings = _resolve(reward_kwargs)
    config = settings.config
    utterances = images = f1 = well_formed = exact = mcc = coherence = 0.0
    predicted, gold = parse_fragment(solution_str, style=config.answer_style), parse_gold(ground_truth)
    if predicted is not None:
        well_formed = float(has_no_repeats(predicted))
        if gold is not None:
            utterances, images = f1_of_fragments(predicted, gold, length_penalty=config.length_penalty)
            f1 = config.utterance_weight * utterances + config.image_weight * images
            exact = float(predicted == gold)
            if settings.wants_mcc:
                n_utterances, n_images = _count(extra_info, "utterance_ids"), _count(extra_info, "images")
                mcc = 0.5 * mcc_of_ids(predicted.utterance_ids, gold.utterance_ids, count=n_utterances)
                mcc += 0.5 * mcc_of_ids(predicted.image_ids, gold.image_ids, count=n_images)
    if settings.coherence is not None:
        coherence = settings.coherence.score(predicted, gold, extra_info or {}, config.coherence_mode)
    result = {
        "score": 0.0,
        "f1": f1,
        "f1_utterances": utterances,
        "f1_images": images,
        "coherence": coherence,
        "format": well_formed,
        "exact_match": exact,
    }
    if settings.wants_mcc:
        result["mcc"] = mcc
    if config.f1_mode == "pooled":
        result["f1_pooled"] = 0.0
        if predicted is not None and gold is not None:
            result["f1_pooled"] = pooled_f1_of_fragments(predicted, gold, length_penalty=config.length_penalty)
    elif settings.micro is not None:
        utterances, images = _micro_values(predicted, gold, extra_info, settings)
        result["f1_micro"] = config.utterance_weight * utterances + config.image_weight * images
        result["f1_micro_utterances"], result["f1_micro_images"] = utterances, images
    result["score"] = sum([weight * result[name] for name, weight in settings.weights], 0.0)
    return result
