"""Advantages of the answers of a training step, token by token. numpy only: knows nothing of verl.

Two ways beside GRPO's, whose advantage is the reward less the mean of its group, on every token of the answer:

- `gdpo_advantages`: every component of the reward is normalised in its group before they are summed, so that a small
  one is not lost beside a large one. Source: GDPO (arXiv 2601.05242).
- `id_advantages`: an id is credited to the tokens that could still decide it. Source: ours, from what is known as
  reward-to-go with a baseline that depends on the state (Sutton and Barto, ch. 13).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ffr_verl.errors import FFRError
from ffr_verl.settings import AdvantageConfig

_EPSILON = 1e-6


class IdCredit(NamedTuple):
    """An id that an answer names, or the end of its utterances."""

    place: int  # orders ids as answers name them: utterances by id, then the end of their list, then images by id
    token: int  # the response token that ends it, from 0
    value: float  # what it adds to the score


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """An answer and what it earned."""

    tokens: int  # length of the response, at least 1
    score: float
    components: Mapping[str, float] = field(default_factory=dict)  # what the reward function returned
    ids: Sequence[IdCredit] | None = None  # what its ids add to the score; `None` for an answer that is none


def advantages_of(groups: Sequence[Sequence[ScoredAnswer]], config: AdvantageConfig) -> list[list[np.ndarray]]:
    """Advantages of each answer of each group; float32, shape `(tokens,)` each."""
    if config.credit == "components":
        return gdpo_advantages(groups, config.components)
    if config.credit == "id":
        return [id_advantages(group) for group in groups]
    return [
        [np.full(one.tokens, one.score - np.mean([other.score for other in group]), np.float32) for one in group]
        for group in groups
    ]


def gdpo_advantages(groups: Sequence[Sequence[ScoredAnswer]], weights: Mapping[str, float]) -> list[list[np.ndarray]]:
    """Each component less its group's mean, over its group's standard deviation (of a sample); their weighted sum;
    that less its mean over the tokens of all answers, over its standard deviation there. `FFRError` when an answer
    lacks a component.

    Source: GDPO (arXiv 2601.05242), as verl's `compute_gdpo_outcome_advantage` has it.
    """
    sums, lengths = [], []
    for group in groups:
        try:
            values = np.array([[one.components[name] for name in weights] for one in group], dtype=np.float64)
        except KeyError as error:
            known = ", ".join(sorted({name for one in group for name in one.components}))
            raise FFRError(
                f"{AdvantageConfig.node}.components: the reward function returns no {error.args[0]!r}; only {known}"
            ) from None
        centred = values - values.mean(axis=0)
        deviation = values.std(axis=0, ddof=1) if len(group) > 1 else np.ones(values.shape[1])
        sums.append((centred / (deviation + _EPSILON)) @ np.array(list(weights.values())))
        lengths.append([one.tokens for one in group])
    every, tokens = np.concatenate(sums), np.concatenate(lengths)
    mean = np.average(every, weights=tokens)
    variance = np.average((every - mean) ** 2, weights=tokens) * tokens.sum() / max(1, tokens.sum() - 1)
    return [
        [
            np.full(length, (value - mean) / np.sqrt(variance + 1e-8), np.float32)
            for value, length in zip(of_group, of_lengths, strict=True)
        ]
        for of_group, of_lengths in zip(sums, lengths, strict=True)
    ]


def id_advantages(group: Sequence[ScoredAnswer]) -> list[np.ndarray]:
    """GRPO's advantage where every id is credited to the tokens that could still decide it.

    A token is credited with the ids that its answer completes from it on, less what the group's answers get, on the
    average, from ids behind the last one that is complete before it: a token cannot change what was named before. Both
    are functions of what stands before the token, so the policy gradient keeps its expected value and loses most of
    its variance. What an answer earns beside its ids (format, coherence) counts on every token. The first token's
    advantage is GRPO's, the score less the group's mean, and so is every token's of an answer that is none.
    """
    mean = float(np.mean([one.score for one in group]))
    named = [one.ids for one in group if one.ids is not None]
    if not named:
        return [np.full(one.tokens, one.score - mean, np.float32) for one in group]
    every = sorted([(credit.place, credit.value) for ids in named for credit in ids])
    places = np.array([place for place, _ in every], dtype=np.int64)
    # Behind each place, what the group's answers get on the average.
    behind = np.append(np.cumsum([value for _, value in every][::-1])[::-1], 0.0) / len(named)
    result = []
    for one in group:
        advantages = np.full(one.tokens, one.score - mean, np.float32)
        left = sum([credit.value for credit in one.ids or ()])
        rest = one.score - left + float(behind[0]) - mean
        for credit in one.ids or ():
            left -= credit.value
            baseline = float(behind[np.searchsorted(places, credit.place, side="right")])
            advantages[credit.token + 1 :] = rest + left - baseline
        result.append(advantages)
    return result
