"""The numbers of rows whose sums give every metric, and the metrics of such sums.

All metrics of a result, of a break-down's part and of a resample are functions of these sums, so each is written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ffr_verl.evaluation.counts import RowCounts
from ffr_verl.metrics import Confusion, Scores, joint_scores, list_f_score, row_scores, scores
from ffr_verl.rewards.table import keys_of

MODALITIES = ("utterance", "image", "joint")
AVERAGES = ("micro", "macro")
REWARDS = keys_of("answer", "gold")
REWARD_SETTINGS = ("length_penalty", "utterance_weight", "image_weight")  # of `RewardConfig`, that they depend on
# What answers look like beside their golds: shares of the rows, and mean numbers of ids.
ANSWERS = (
    "malformed",
    "outside",
    "empty",
    "gold_empty",
    "utterances",
    "gold_utterances",
    "images",
    "gold_images",
)

# Names of the metrics, in the order of `metrics_of_sums`; where each stands in a result.
METRICS: tuple[tuple[str, ...], ...] = (
    *[(average, modality, name) for average in AVERAGES for modality in MODALITIES for name in Scores._fields],
    *[("rewards", name) for name in REWARDS],
    *[("answers", name) for name in ANSWERS],
    *[("macro_where_gold", modality) for modality in MODALITIES[:2]],
)

_CONFUSIONS, _ROW_SCORES = 2 * len(Confusion._fields), len(MODALITIES) * len(Scores._fields)
_MEANS = _ROW_SCORES + len(REWARDS) + len(ANSWERS)
# Where a row's statistics tell whether its answer has a fault.
MALFORMED = _CONFUSIONS + _ROW_SCORES + len(REWARDS)
# The last four: f1 of each modality where the gold has such ids, and whether it has.
STATISTICS = _CONFUSIONS + _MEANS + 4

_CHUNK = 8192


def chunks(rows: int) -> Iterator[slice]:
    """Rows in parts that are small beside the memory of a machine."""
    return (slice(start, min(start + _CHUNK, rows)) for start in range(0, rows, _CHUNK))


def width(counts: RowCounts) -> int:
    """How many statistics a row has: `STATISTICS`, and one for each component of one's own."""
    return STATISTICS + counts.own.shape[1]


def row_statistics(counts: RowCounts) -> np.ndarray:
    """Of each row; shape `(rows, width)`, float64."""
    confusions = [_confusion(counts, modality) for modality in MODALITIES[:2]]
    is_answered = ~counts.is_unanswered & (counts.is_readable | (_ids(counts, "predicted") > 0))
    of_rows = [Scores(*[value * is_answered for value in row_scores(one)]) for one in confusions]
    of_rows.append(joint_scores(*of_rows))
    utterances, images = (_f1_reward(counts, modality) for modality in MODALITIES[:2])
    reward_of = {
        "f1": counts.reward.utterance_weight * utterances + counts.reward.image_weight * images,
        "f1_utterances": utterances,
        "f1_images": images,
        "format": counts.is_well_formed,
        "exact_match": counts.column("is_exact"),
    }
    rewards = [reward_of[key] for key in REWARDS]
    columns = [*[count for one in confusions for count in one], *[value for one in of_rows for value in one]]
    has_outside = (counts.column("utterance_outside") > 0) | (counts.column("image_outside") > 0)
    answers = [counts.has_fault, has_outside, _ids(counts, "predicted") == 0, _ids(counts, "gold") == 0]
    sizes = [counts.column(f"{kind}_{side}") for kind in MODALITIES[:2] for side in ("predicted", "gold")]
    has_gold = [counts.column(f"{kind}_gold") > 0 for kind in MODALITIES[:2]]
    where_gold = [scored.f1 * one for scored, one in zip(of_rows, has_gold, strict=False)]
    every = [*columns, *rewards, *answers, *sizes, *where_gold, *has_gold, *counts.own.T]
    return np.stack(every, axis=1, dtype=np.float64, casting="unsafe")


def metrics_of_sums(sums: np.ndarray, samples: Any) -> np.ndarray:
    """The metrics of rows whose statistics were summed.

    Args:
        sums: shape `(…, width)`.
        samples: number of rows in each sum.

    Returns:
        Shape `(…, metrics)`: `METRICS`, then the means of components of one's own.
    """
    counts = np.moveaxis(sums[..., :_CONFUSIONS], -1, 0)
    modalities = [scores(Confusion(*counts[:4])), scores(Confusion(*counts[4:]))]
    modalities.append(joint_scores(*modalities))
    micro = np.stack([np.asarray(value) for one in modalities for value in one], axis=-1)
    means, own = (
        sums[..., part] / np.asarray(samples)[..., None]
        for part in (slice(_CONFUSIONS, _CONFUSIONS + _MEANS), slice(STATISTICS, None))
    )
    where_gold = sums[..., STATISTICS - 4 : STATISTICS - 2] / np.maximum(sums[..., STATISTICS - 2 : STATISTICS], 1)
    return np.concatenate([micro, means, where_gold, own], axis=-1)


def nested(values: Any, own: Sequence[str] = ()) -> dict[str, Any]:
    """Values in the order of `METRICS`, then of components of one's own, under their names:
    `{"micro": {"utterance": {"precision": …`"""
    result: dict[str, Any] = {}
    for path, value in zip([*METRICS, *[("rewards", name) for name in own]], values, strict=True):
        inner = result
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return result


def metric_rows(about: Mapping[str, Any], found: Any, intervals: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Lines of a table: `about`, then an average and a modality with the four metrics that were found and their
    intervals, `None` where there are none."""
    lines = []
    for average in AVERAGES:
        averages = found[average] if isinstance(found, Mapping) else getattr(found, average)
        for modality, values in averages.items():
            line = {**about, "average": average, "modality": modality, **values}
            for name in values:
                low, high = (None, None) if intervals is None else intervals[average][modality][name]
                line |= {f"{name}_low": low, f"{name}_high": high}
            lines.append(line)
    return lines


def _confusion(counts: RowCounts, modality: str) -> Confusion:
    hits, predicted, gold, rest = (
        counts.column(f"{modality}_{name}") for name in ("hits", "predicted", "gold", "rest")
    )
    return Confusion(hits, predicted - hits, gold - hits, rest)


def _ids(counts: RowCounts, side: str) -> np.ndarray:
    """Ids of both modalities, `predicted` or `gold`, of each row."""
    return counts.column(f"utterance_{side}") + counts.column(f"image_{side}")


def _f1_reward(counts: RowCounts, modality: str) -> np.ndarray:
    """`f1_of_ids` of `ffr_verl.rewards`, of many rows."""
    hits, listed, gold = (counts.column(f"{modality}_{name}") for name in ("strict_hits", "listed", "gold_listed"))
    value = list_f_score(hits, listed, gold, length_penalty=counts.reward.length_penalty)
    return np.where(counts.is_readable, value, 0.0)
