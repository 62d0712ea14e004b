"""The metrics of a comparison together, and the joint values of utterances and images; formulas: `ffr_verl.metrics`.

Every function takes numbers or arrays of them; arrays stand for many rows or resamples at once.
"""

from __future__ import annotations

from typing import NamedTuple

from ffr_verl.metrics import Confusion, Numbers, confusion, f1, mcc, one_where, precision, ratio, recall

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


class Scores(NamedTuple):
    """The four metrics; precision, recall and f1 in [0, 1], mcc in [-1, 1]."""

    precision: Numbers
    recall: Numbers
    f1: Numbers
    mcc: Numbers


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
    is_empty = counts.tp + counts.fp + counts.fn == 0
    return Scores(*[one_where(is_empty, value) for value in scores(counts)])


def joint_scores(utterances: Scores, images: Scores) -> Scores:
    """Utterances and images in one: precision and recall are harmonic means of the two, f1 and mcc arithmetic means.

    Source: published.

    Example:
        >>> joint_scores(Scores(1.0, 0.5, 0.6, 0.4), Scores(0.5, 0.0, 0.2, 0.0))
        Scores(precision=0.6666666666666666, recall=0.0, f1=0.4, mcc=0.2)
    """
    return Scores(
        ratio(2 * utterances.precision * images.precision, utterances.precision + images.precision),
        ratio(2 * utterances.recall * images.recall, utterances.recall + images.recall),
        (utterances.f1 + images.f1) / 2,
        (utterances.mcc + images.mcc) / 2,
    )
