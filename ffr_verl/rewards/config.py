"""The settings of `compute_score`: `reward_kwargs` of a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle
from ffr_verl.rewards.components import Component, components_of
from ffr_verl.rewards.micro import micro_counts
from ffr_verl.rewards.settings import SETTINGS, CoherenceMode, check_number, choice
from ffr_verl.rewards.table import DEFAULT_WEIGHTS, REWARDS
from ffr_verl.settings import refuse_unknown_keys

F1Mode = Literal["published", "pooled", "micro", "micro_f1_mcc"]
REWARDS_PATH = "pkg://ffr_verl.rewards"
# Where settings of a reward may stand in the node `reward` of a run's config.
REWARD_NODES = ("custom_reward_function.reward_kwargs", "reward_kwargs")
MCC_SHARES: Mapping[str, float] = {"micro": 0.0, "micro_f1_mcc": 0.5}


def reward_node(reward: Mapping[str, Any]) -> str | None:
    """Where in the node `reward` of a run's config the settings of our reward stand; `None` where another one is used.

    Example:
        >>> reward_node({"custom_reward_function": {"path": "pkg://ffr_verl.rewards", "name": "compute_score"}})
        'custom_reward_function.reward_kwargs'
        >>> reward_node({"custom_reward_function": {"path": None}, "reward_manager": {"name": "ffr"}})
        'reward_kwargs'
    """
    custom, manager = (
        one if isinstance(one := reward.get(name), Mapping) else {}
        for name in ("custom_reward_function", "reward_manager")
    )
    if custom.get("path"):
        is_ours = (custom["path"], custom.get("name", "compute_score")) == (REWARDS_PATH, "compute_score")
        return REWARD_NODES[0] if is_ours else None
    return REWARD_NODES[1] if manager.get("name") == "ffr" else None


@dataclass(frozen=True, slots=True)
class RewardConfig:
    """The settings of `compute_score`, checked.

    Attributes:
        weights: `(component, weight)` pairs; components are f1, coherence, format, exact_match, mcc, those of
            `components`, and entry points of the group `ffr_verl.rewards`.
        components: rewards of one's own, by a name of your choice: `pkg://module:function`, `path/to/file.py:function`
            or an entry point; or a mapping of these as `function` and settings of the function.
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

    weights: tuple[tuple[str, float], ...] = tuple(DEFAULT_WEIGHTS.items())
    components: tuple[Component, ...] = ()
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
        return self.f1_mode in MCC_SHARES

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any], *, where: str = "reward_kwargs") -> RewardConfig:
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
        refuse_unknown_keys(kwargs, allowed=[field.name for field in fields(cls)], where=where)
        given = {name: _CHECKS[name](f"{where}.{name}", one) for name, one in kwargs.items() if name != "components"}
        components, weights = kwargs.get("components") or {}, dict(given.get("weights", ()))
        if components or not REWARDS.keys() >= weights.keys():
            embeddings = given.get("embeddings")
            given["components"] = components_of(components, weights, embeddings=embeddings, where=where)
        return cls(**given)


def _weights(where: str, value: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping):
        raise FFRError(f"{where}: found {value!r}, expected a mapping such as {{f1: 1.0, format: 0.3}}")
    return tuple([(str(name), check_number(f"{where}.{name}", weight)) for name, weight in value.items()])


def _micro_counts(where: str, value: Any) -> tuple[tuple[str, tuple[float, ...]], ...] | None:
    return None if value is None else tuple(micro_counts(value, where=where).items())


def _embeddings(where: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise FFRError(
            f"{where}: found {value!r}, expected the folder of an embedding store (made by `ffr-verl embed`), or null "
            "for no coherence reward"
        )
    return os.fspath(value)


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = {
    "weights": _weights,
    "f1_mode": choice(F1Mode),
    "micro_counts": _micro_counts,
    "embeddings": _embeddings,
    "coherence_mode": SETTINGS["mode"],
    "answer_style": SETTINGS["style"],
    **{name: SETTINGS[name] for name in ("length_penalty", "utterance_weight", "image_weight")},
}
