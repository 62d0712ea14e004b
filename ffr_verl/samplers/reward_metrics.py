"""Training curves of a step's answers: reward components, faults, sizes. Pure: knows nothing of verl."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ffr_verl.fragments import MalformedReason

REWARD_ERROR = "reward_error"  # of `reward_extra_info`: what must be mended before an answer can be scored
_SIZES = ("predicted_utterances", "gold_utterances", "predicted_images", "gold_images")
_MISSING, _CUT_OFF = "missing_embeddings", "cut_off"
_MALFORMED = "malformed"
# Of the whole validation, in each of its rows.
_OF_VALIDATION = re.compile("micro_(?:utterance|image|joint)_(?:f1|mcc)")


def has_spread(values: Sequence[float], *, min_std: float = 0.0) -> bool:
    """Whether the population standard deviation of a group's rewards is above `min_std`; one answer has none to
    want."""
    return len(values) < 2 or float(np.std(values)) > min_std


def is_component(name: str) -> bool:
    """Whether a number of this name in `reward_extra_info` is a reward, or a part of it."""
    return name not in (*_SIZES, _MISSING, _CUT_OFF) and not _OF_VALIDATION.fullmatch(name)


def reward_metrics(answers: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Metrics of a step from what the reward returned for each answer.

    Args:
        answers: `reward_extra_info` of each: numbers are components, except the keys that `FFRRewardManager` adds.

    Returns:
        `ffr/reward/NAME/{mean,std,min,max}` of each component; and when the manager's keys are there
        `ffr/malformed/any` and `ffr/malformed/REASON` (shares of the answers, one for each `MalformedReason`),
        `ffr/size/NAME` (mean number of ids), `ffr/missing_embeddings` (mean number of predicted ids without a vector)
        and `ffr/cut_off` (share of the answers that ended at the length limit).

    Example:
        >>> found = reward_metrics([{"f1": 1.0, "malformed": ""}, {"f1": 0.0, "malformed": "repeated_id"}])
        >>> found["ffr/reward/f1/mean"], found["ffr/malformed/any"], found["ffr/malformed/repeated_id"]
        (0.5, 0.5, 0.5)
    """
    rows = list(answers)
    metrics: dict[str, float] = {}
    columns: dict[str, list[float]] = {}
    reasons: Counter[str] = Counter()
    diagnosed = 0
    for row in rows:
        if _MALFORMED in row:
            diagnosed += 1
            reasons[str(row[_MALFORMED])] += 1
        for name, value in row.items():
            if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
                columns.setdefault(name, []).append(float(value))
    for name, values in columns.items():
        if name in _SIZES:
            metrics[f"ffr/size/{name}"] = float(np.mean(values))
        elif name in (_MISSING, _CUT_OFF):
            metrics[f"ffr/{name}"] = float(np.mean(values))
        else:
            for statistic, function in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
                metrics[f"ffr/reward/{name}/{statistic}"] = float(function(values))
    if diagnosed:
        metrics["ffr/malformed/any"] = 1.0 - reasons[""] / diagnosed
        for reason in MalformedReason:
            metrics[f"ffr/malformed/{reason.value}"] = reasons[reason.value] / diagnosed
    return metrics


def strata_metrics(answers: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, float]:
    """Mean numbers of ids that answers name and that are gold, `ffr/strata/NAME/{utterances,images}_{named,gold}`.

    `answers` are the stratum of each, and its `reward_extra_info` with the keys that `FFRRewardManager` adds.
    """
    found: dict[str, list[float]] = {}
    for stratum, info in answers:
        for kind in ("utterances", "images"):
            for side, name in (("named", f"predicted_{kind}"), ("gold", f"gold_{kind}")):
                if name in info:
                    found.setdefault(f"ffr/strata/{stratum}/{kind}_{side}", []).append(float(info[name]))
    return {name: float(np.mean(values)) for name, values in found.items()}
