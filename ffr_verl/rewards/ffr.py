"""The composed reward: verl's custom reward function `compute_score`."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle, parse_fragment
from ffr_verl.rewards.f1 import f1_of_fragments, parse_gold
from ffr_verl.rewards.format import has_no_repeats
from ffr_verl.unknown_keys import refuse_unknown_keys

__all__ = ["COMPONENTS", "CoherenceMode", "RewardConfig", "compute_score"]

logger = logging.getLogger(__name__)

CoherenceMode = Literal["published", "continuous", "gold_anchored"]

COMPONENTS = ("f1", "coherence", "format", "exact_match")
_WHERE = "reward_kwargs"


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """The settings of `compute_score`, checked.

    Attributes:
        weights: `(component, weight)` pairs; components are f1, coherence, format and exact_match.
        embeddings: path of an embedding store, or `None`: then coherence is 0 and its weight does not count.
        coherence_mode: `continuous`, `published` or `gold_anchored`.
        answer_style: `plain` or `reasoning`, for every component.
        length_penalty: in [0, 1], see `f1_reward`.
        utterance_weight: share of the utterances in f1, at least 0.
        image_weight: share of the images in f1, at least 0.
    """

    weights: tuple[tuple[str, float], ...] = (("f1", 1.0), ("coherence", 1.0), ("format", 0.3))
    embeddings: str | None = None
    coherence_mode: CoherenceMode = "continuous"
    answer_style: AnswerStyle = "plain"
    length_penalty: float = 0.95
    utterance_weight: float = 0.5
    image_weight: float = 0.5

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
        for name, choices in (("coherence_mode", get_args(CoherenceMode)), ("answer_style", get_args(AnswerStyle))):
            if name in values and values[name] not in choices:
                raise FFRError(f"{_WHERE}.{name}: found {values[name]!r}, expected one of {', '.join(choices)}")
        for name, upper in (("length_penalty", 1.0), ("utterance_weight", math.inf), ("image_weight", math.inf)):
            if name in values:
                values[name] = _checked_number(f"{_WHERE}.{name}", values[name], upper=upper)
        if values.get("embeddings") is not None:
            raise FFRError(
                f"{_WHERE}.embeddings: found {values['embeddings']!r}; this version has no coherence "
                f"reward yet, set it to null"
            )
        return cls(**values)


def _checked_number(where: str, value: Any, *, upper: float = math.inf) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0.0 <= value <= upper
        or math.isinf(value)
    ):
        raise FFRError(f"{where}: found {value!r}, expected a number from 0 to {'1' if upper == 1.0 else 'any size'}")
    return float(value)


def _checked_weights(weights: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(weights, Mapping):
        raise FFRError(f"{_WHERE}.weights: found {weights!r}, expected a mapping such as {{f1: 1.0, format: 0.3}}")
    refuse_unknown_keys(weights, allowed=COMPONENTS, where=f"{_WHERE}.weights")
    return tuple((str(name), _checked_number(f"{_WHERE}.weights.{name}", value)) for name, value in weights.items())


@functools.lru_cache(maxsize=64)
def _config_of(items: tuple[tuple[str, Any], ...]) -> RewardConfig:
    config = RewardConfig.from_kwargs({name: dict(value) if name == "weights" else value for name, value in items})
    if dict(config.weights).get("coherence") and config.embeddings is None:
        logger.warning("no embeddings configured: the coherence reward is 0 and its weight does not count")
    return config


def _resolve(kwargs: Mapping[str, Any]) -> RewardConfig:
    try:
        return _config_of(
            tuple(
                (name, tuple(value.items()) if name == "weights" and isinstance(value, Mapping) else value)
                for name, value in kwargs.items()
            )
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, FFRError):
            raise
        return RewardConfig.from_kwargs(kwargs)  # unhashable or misshapen: let the check say which key


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
        extra_info: not used yet; coherence needs it.
        **reward_kwargs: see `RewardConfig`.

    Returns:
        The same keys on every call, as verl needs: `score` = sum of weight x component, `f1`, `f1_utterances`,
        `f1_images`, `coherence`, `format`, `exact_match`; Python floats.

    Raises:
        FFRError: for settings that `RewardConfig` refuses, on the first call.

    Example:
        >>> gold = "<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> compute_score("ffr/mldr", gold, gold)["score"]  # f1 1.0 + 0.3 x format 1.0; no embeddings, no coherence
        1.3
    """
    config = _resolve(reward_kwargs)
    utterances = images = f1 = well_formed = exact = 0.0
    predicted = parse_fragment(solution_str, style=config.answer_style)
    if predicted is not None:
        well_formed = float(has_no_repeats(predicted))
        gold = parse_gold(ground_truth)
        if gold is not None:
            utterances, images = f1_of_fragments(predicted, gold, length_penalty=config.length_penalty)
            f1 = config.utterance_weight * utterances + config.image_weight * images
            exact = float(predicted == gold)
    components = {"f1": f1, "coherence": 0.0, "format": well_formed, "exact_match": exact}
    return {
        "score": sum((weight * components[name] for name, weight in config.weights), 0.0),
        "f1": f1,
        "f1_utterances": utterances,
        "f1_images": images,
        "coherence": 0.0,
        "format": well_formed,
        "exact_match": exact,
    }
