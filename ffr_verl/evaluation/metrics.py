"""Precision, recall, F1 and Matthews correlation from counts, and the joint values of utterances and images.

Every function takes numbers or arrays of them; arrays stand for many rows or resamples at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Confusion",
    "Scores",
    "confusion",
    "f1",
    "joint_scores",
    "mcc",
    "precision",
    "recall",
    "row_scores",
    "scores",
]

# A number, or an array of numbers.
Numbers = Any


class Confusion(NamedTuple):
    """Ids that were predicted and are gold, predicted only, gold only, neither; of a row, or summed over rows."""

    tp: Numbers
    fp: Numbers
    fn: Numbers
    tn: Numbers


class Scores(NamedTuple):
    """The four metrics; precision, recall and f1 in [0, 1], mcc in [-1, 1]."""

    precision: Numbers
    recall: Numbers
    f1: Numbers
    mcc: Numbers


def confusion(predicted: Iterable[int], gold: Iterable[int], *, universe: int) -> Confusion:
    """Compare two sets of ids in the universe `0 … universe - 1`; ids beyond it count as false, not as neither.

    Args:
        predicted: ids; repeats do not count.
        gold: ids.
        universe: number of ids that there are.

    Source: published.

    Example:
        >>> confusion([1, 2, 3], [2, 3, 4], universe=10)
        Confusion(tp=2, fp=1, fn=1, tn=6)
    """
    guess, truth = set(predicted), set(gold)
    hits, either = len(guess & truth), guess | truth
    outside = sum(not 0 <= one < universe for one in either)
    return Confusion(hits, len(guess) - hits, len(truth) - hits, universe - len(either) + outside)


def _ratio(numerator: Numbers, denominator: Numbers) -> Numbers:
    """0 where the denominator is 0."""
    numerator, denominator = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    result = np.divide(numerator, denominator, out=np.zeros(np.shape(denominator)), where=denominator != 0)
    return float(result) if result.ndim == 0 else result


def precision(counts: Confusion) -> Numbers:
    """Share of the predicted ids that are gold, `tp / (tp + fp)`; 0 when none was predicted.

    Example:
        >>> precision(Confusion(tp=2, fp=1, fn=2, tn=5))
        0.6666666666666666
    """
    return _ratio(counts.tp, counts.tp + counts.fp)


def recall(counts: Confusion) -> Numbers:
    """Share of the gold ids that were predicted, `tp / (tp + fn)`; 0 when there is no gold id.

    Example:
        >>> recall(Confusion(tp=2, fp=1, fn=2, tn=5))
        0.5
    """
    return _ratio(counts.tp, counts.tp + counts.fn)


def f1(counts: Confusion) -> Numbers:
    """Harmonic mean of precision and recall, `2 tp / (2 tp + fp + fn)`; 0 when nothing was predicted and nothing gold.

    Example:
        >>> round(f1(Confusion(tp=2, fp=1, fn=2, tn=5)), 4)
        0.5714
    """
    return _ratio(2 * counts.tp, 2 * counts.tp + counts.fp + counts.fn)


def mcc(counts: Confusion) -> Numbers:
    """Matthews correlation coefficient; 0 when a factor of its denominator is 0.

    `(tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn))`

    Returns:
        A value in [-1, 1]; 0 is what guessing gives.

    Example:
        >>> round(mcc(Confusion(tp=2, fp=1, fn=2, tn=5)), 4)
        0.3563
    """
    tp, fp, fn, tn = (np.asarray(count, dtype=np.float64) for count in counts)
    return _ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn)) * np.sqrt((tn + fp) * (tn + fn)))


def scores(counts: Confusion) -> Scores:
    """All four metrics.

    Example:
        >>> scores(Confusion(tp=1, fp=1, fn=0, tn=0))
        Scores(precision=0.5, recall=1.0, f1=0.6666666666666666, mcc=0.0)
    """
    return Scores(precision(counts), recall(counts), f1(counts), mcc(counts))


def row_scores(counts: Confusion) -> Scores:
    """The four metrics of one row: `scores`, and 1 where nothing was predicted and nothing is gold.

    Source: ours; the same convention as the F1 and MCC rewards.

    Example:
        >>> row_scores(Confusion(tp=0, fp=0, fn=0, tn=9))
        Scores(precision=1.0, recall=1.0, f1=1.0, mcc=1.0)
        >>> row_scores(Confusion(tp=0, fp=2, fn=0, tn=7))
        Scores(precision=0.0, recall=0.0, f1=0.0, mcc=0.0)
    """
    is_empty = (np.asarray(counts.tp) + counts.fp + counts.fn) == 0
    if is_empty.ndim == 0:
        return Scores(1.0, 1.0, 1.0, 1.0) if is_empty else scores(counts)
    return Scores(*[np.where(is_empty, 1.0, value) for value in scores(counts)])


def joint_scores(utterances: Scores, images: Scores) -> Scores:
    """Utterances and images in one: precision and recall are harmonic means of the two, f1 and mcc arithmetic means.

    Source: published.

    Example:
        >>> joint_scores(Scores(1.0, 0.5, 0.6, 0.4), Scores(0.5, 0.0, 0.2, 0.0))
        Scores(precision=0.6666666666666666, recall=0.0, f1=0.4, mcc=0.2)
    """
    return Scores(
        _ratio(2 * utterances.precision * images.precision, utterances.precision + images.precision),
        _ratio(2 * utterances.recall * images.recall, utterances.recall + images.recall),
        (utterances.f1 + images.f1) / 2,
        (utterances.mcc + images.mcc) / 2,
    )
