"""The composed reward: verl's custom reward function `compute_score`."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ffr_verl.fragments import Fragment, locate_ids
from ffr_verl.rewards.coherence import open_scorer
from ffr_verl.rewards.config import MCC_SHARES, F1Mode, RewardConfig
from ffr_verl.rewards.f1 import pooled_f1_of_fragments
from ffr_verl.rewards.micro import LOWEST, MODALITIES, NEUTRAL, MicroCounts, id_values, micro_counts, micro_value
from ffr_verl.rewards.reading import completion_text, is_outside, read_answer, read_gold, row_ids
from ffr_verl.rewards.table import COMPONENTS, MODE_KEYS, REWARDS, Reward, Values

__all__ = [
    "COMPONENTS",
    "MICRO_COUNTS",
    "F1Mode",
    "RewardConfig",
    "compute_score",
    "id_credits",
    "open_scorer",
    "score_keys",
]

logger = logging.getLogger(__name__)

MICRO_COUNTS = "micro_counts"  # of a row's `extra_info`: where the policy stands, see `ffr_verl.rewards.micro`
_FIRST_IMAGE = 10**9  # ids have nine digits at most
_LIST_END = _FIRST_IMAGE - 1
_MAPPINGS = ("weights", "micro_counts")
_COMPONENTS = "components"
_SAID = threading.Lock()  # taken by who says that coherence is left out: once a process is enough


class _Settings(NamedTuple):
    """A checked config, and what follows from it."""

    config: RewardConfig
    keys: tuple[str, ...]
    values: tuple[Values, ...]
    weights: tuple[tuple[str, float], ...]
    micro: tuple[MicroCounts, ...] | None


class _Held:
    """A mapping of settings as it is now, which can be looked up; one that was changed in place is another."""

    __slots__ = ("text", "value")

    def __init__(self, value: Any) -> None:
        self.value, self.text = value, repr(value)

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and self.text == other.text


def _rewards_of(config: RewardConfig) -> tuple[Reward, ...]:
    weights = dict(config.weights)
    return tuple([one for one in REWARDS.values() if one.needs != "dialogue" or one.name in weights])


def score_keys(config: RewardConfig) -> tuple[str, ...]:
    """The keys of what `compute_score` returns with these settings."""
    own = [one.name for one in config.components]
    return (*_plain_keys(config), *MODE_KEYS[config.f1_mode], *own)


def _plain_keys(config: RewardConfig) -> tuple[str, ...]:
    return ("score", *[key for one in _rewards_of(config) for key in one.keys])


@functools.lru_cache(maxsize=64)
def _settings_of(items: tuple[tuple[str, Any], ...]) -> _Settings:
    kwargs: dict[str, Any] = {name: dict(value) if name in _MAPPINGS else value for name, value in items}
    if _COMPONENTS in kwargs:
        kwargs[_COMPONENTS] = kwargs[_COMPONENTS].value
    config = RewardConfig.from_kwargs(kwargs)
    weights = dict(config.weights)
    if weights.get("coherence") and config.embeddings is None and _SAID.acquire(blocking=False):
        logger.warning("no embeddings configured: the coherence reward is 0 and its weight does not count")
    trained = (*MODE_KEYS[config.f1_mode], "f1")[0]
    counted = tuple([(trained if name == "f1" else name, weight) for name, weight in config.weights])
    given = dict(config.micro_counts or ())
    micro = tuple([MicroCounts(*given.get(kind, NEUTRAL)) for kind in MODALITIES]) if config.is_micro else None
    return _Settings(config, _plain_keys(config), tuple([one.values for one in _rewards_of(config)]), counted, micro)


def _items(mapping: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a mapping holds now, to be looked up: one that is changed in place has other settings."""
    node: Any = mapping
    if type(mapping) is not dict and hasattr(mapping, "items_ex"):
        # verl's naive manager hands over a node of its config; to read it as a mapping takes longer than all rewards.
        items = tuple(node.items_ex(resolve=False))
        if {type(one) for _, one in items} <= {int, float}:
            return items
    return tuple(
        [
            (name, tuple(one) if isinstance(one, Sequence) and not isinstance(one, str) else one)
            for name, one in mapping.items()
        ]
    )


def _resolve(kwargs: Mapping[str, Any]) -> _Settings:
    given = {**kwargs, _COMPONENTS: _Held(kwargs[_COMPONENTS])} if _COMPONENTS in kwargs else kwargs
    try:
        return _settings_of(
            tuple([(key, _items(one) if key in _MAPPINGS and one is not None else one) for key, one in given.items()])
        )
    except (TypeError, AttributeError):
        RewardConfig.from_kwargs(kwargs)  # unhashable or misshapen: let the check say which key
        raise


def _values_of_ids(extra_info: Any, settings: _Settings) -> tuple[tuple[float, float], tuple[float, float]]:
    """What a right and a wrong utterance, and a right and a wrong image, add to the micro metric."""
    given = (extra_info or {}).get(MICRO_COUNTS)
    try:
        counts = settings.micro if given is None else tuple([tuple(given[kind]) for kind in MODALITIES])
        return _id_values_of(counts, MCC_SHARES[settings.config.f1_mode])
    except (TypeError, KeyError):
        micro_counts(given or {}, where=f"extra_info.{MICRO_COUNTS}")  # says what is wrong with it
        raise


@functools.lru_cache(maxsize=256)  # the answers of a step are asked for with the same few counts
def _id_values_of(counts: Any, mcc_share: float) -> tuple[tuple[float, float], tuple[float, float]]:
    found = micro_counts(dict(zip(MODALITIES, counts, strict=True)), where=f"extra_info.{MICRO_COUNTS}")
    utterances, images = (id_values(found[kind], mcc_share=mcc_share) for kind in MODALITIES)
    return utterances, images


def _micro_values(
    predicted: Fragment | None, gold: Fragment | None, extra_info: Any, settings: _Settings
) -> tuple[float, float]:
    """What utterances and images add to the micro metric; the least for an answer that is none or names other ids."""
    if predicted is None or gold is None or is_outside(predicted, *row_ids(extra_info)):
        return LOWEST, LOWEST
    utterances, images = _values_of_ids(extra_info, settings)
    return (
        micro_value(predicted.utterance_ids, gold.utterance_ids, utterances),
        micro_value(predicted.image_ids, gold.image_ids, images),
    )


def id_credits(
    completion: str, solution: str, extra_info: Mapping[str, Any] | None = None, **reward_kwargs: Any
) -> list[tuple[int, int, float]] | None:
    """What each id of an answer adds to its score, with `f1_mode: micro` or `micro_f1_mcc`; arguments as of
    `compute_score`.

    Returns:
        For each id, in the order in which the answer names them: its place (utterances by id, then images by id), the
        offset in `completion` behind its last digit, and its value; between the two kinds the end of the utterances'
        list, with value 0. Ids that the dialogue does not have take the answer down to the least. `None` for an answer
        that is none, and with another `f1_mode`.
    """
    settings = _resolve(reward_kwargs)
    config, text = settings.config, completion_text(completion)
    located = locate_ids(text, style=config.answer_style)
    predicted, gold = read_answer(text, config.answer_style), read_gold(solution)
    if settings.micro is None or located is None or predicted is None or gold is None:
        return None
    weight = dict(config.weights).get("f1", 0.0)
    shares = (config.utterance_weight, config.image_weight)
    credits: list[tuple[int, int, float]] = []
    outside: list[int] = []  # of `credits`
    for first, share, ids, right, values, offsets, in_dialogue in zip(
        (0, _FIRST_IMAGE),
        shares,
        (predicted.utterance_ids, predicted.image_ids),
        (set(gold.utterance_ids), set(gold.image_ids)),
        _values_of_ids(extra_info, settings),
        (located[0], located[2]),
        row_ids(extra_info),
        strict=True,
    ):
        for one, offset in zip(ids, offsets, strict=True):
            if one not in in_dialogue:
                outside.append(len(credits))
            credits.append((first + one, offset, weight * share * values[one not in right] * (one in in_dialogue)))
            right.discard(one)  # once more is a miss
        if not first:
            credits.append((_LIST_END, located[1], 0.0))
    rest = weight * sum(shares) * LOWEST - sum([value for *_, value in credits])
    for number in outside:
        credits[number] = (*credits[number][:2], rest / len(outside))
    return credits


def compute_score(
    data_source: Any,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    reward_router_address: Any = None,
    reward_model_tokenizer: Any = None,
    **reward_kwargs: Any,
) -> dict[str, float]:
    """verl's custom reward function: the weighted sum of the components, and each of them.

    Args:
        data_source: not used; part of verl's signature.
        solution_str: the completion. Whatever the model wrote, and be it nothing (`None`), nothing is raised.
        ground_truth: the gold answer; a malformed one earns 0 in all but format, and the least in `f1_micro`.
        extra_info: of the row, as `ffr-verl prepare` writes it; coherence and mcc need it.
        reward_router_address: not used; part of verl's signature.
        reward_model_tokenizer: not used; part of verl's signature.
        **reward_kwargs: see `RewardConfig`.

    Returns:
        The same keys on every call, as verl needs: `score` = sum of weight x component, `f1`, `f1_utterances`,
        `f1_images` (always the published F1), `coherence`, `format`, `exact_match`, and `mcc` when it has a weight;
        Python floats. With `f1_mode: pooled` also `f1_pooled`, with `micro` or `micro_f1_mcc` also `f1_micro`,
        `f1_micro_utterances` and `f1_micro_images`: the weight of f1 then counts `f1_pooled` or `f1_micro`. With
        `components` a key of each.

    Raises:
        FFRError: for settings that `RewardConfig` refuses, a store that does not open, a gold that is no text, and an
            `extra_info` without the fields that coherence or mcc need, or with something else in them; and for a
            component of one's own that raises or returns no finite number, which the message names.

    Example:
        >>> gold = "<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> compute_score("ffr/mldr", gold, gold)["score"]  # f1 1.0 + 0.3 x format 1.0; no embeddings, no coherence
        1.3
    """
    settings = _resolve(reward_kwargs)
    config = settings.config
    predicted = read_answer(solution_str, config.answer_style)
    gold = read_gold(ground_truth, name="ground_truth")
    found = [0.0]
    for values in settings.values:
        found += values(predicted, gold, extra_info, config)
    result = dict(zip(settings.keys, found, strict=True))
    if config.f1_mode == "pooled":
        result["f1_pooled"] = 0.0
        if predicted is not None and gold is not None:
            result["f1_pooled"] = pooled_f1_of_fragments(predicted, gold, length_penalty=config.length_penalty)
    elif settings.micro is not None:
        utterances, images = _micro_values(predicted, gold, extra_info, settings)
        result["f1_micro"] = config.utterance_weight * utterances + config.image_weight * images
        result["f1_micro_utterances"], result["f1_micro_images"] = utterances, images
    for own in config.components:
        result[own.name] = own.value(
            solution_str, ground_truth, extra_info, style=config.answer_style, embeddings=config.embeddings
        )
    result["score"] = sum([weight * result[name] for name, weight in settings.weights], 0.0)
    return result
