"""The formulas, each once: counts of a comparison, precision, recall, F1, Matthews correlation, dispersion; the four
metrics together, and of utterances and images in one.

Every function of counts takes numbers or arrays of them; arrays stand for many rows or resamples at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

# A number, or an array of numbers.
Numbers = Any


class Confusion(NamedTuple):
    """Ids that were predicted and are gold, predicted only, gold only, neither; of a row, or summed over rows."""

    tp: Numbers
    fp: Numbers
    fn: Numbers
    tn: Numbers


def confusion(predicted: Iterable[int], gold: Iterable[int], *, universe: int | Collection[int]) -> Confusion:
    """Compare two sets of ids; those outside the universe count as false, not as neither.

    The universe is the ids that there are, or their number: then they are `0 … universe - 1`. Repeats do not count.

    Source: published.

    Example:
        >>> confusion([1, 2, 3], [2, 3, 4], universe=10)
        Confusion(tp=2, fp=1, fn=1, tn=6)
        >>> confusion([21, 5], [21, 22], universe=[20, 21, 22])
        Confusion(tp=1, fp=1, fn=1, tn=1)
    """
    guess, truth = set(predicted), set(gold)
    hits, ids = len(guess & truth), universe if isinstance(universe, Collection) else range(universe)
    inside = sum([one in ids for one in guess | truth])
    return Confusion(hits, len(guess) - hits, len(truth) - hits, len(ids) - inside)


def ratio(numerator: Numbers, denominator: Numbers) -> Numbers:
    """The quotient; 0 where the denominator is 0."""
    if isinstance(denominator, (int, float)):
        return numerator / denominator if denominator else 0.0
    numerator, denominator = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    result = np.divide(numerator, denominator, out=np.zeros(np.shape(denominator)), where=denominator != 0)
    return float(result) if result.ndim == 0 else result


def _one_where(is_empty: Any, value: Numbers) -> Numbers:
    """1 where there was nothing to find and nothing was named, else the value."""
    if isinstance(is_empty, (bool, np.bool_)):
        return 1.0 if is_empty else value
    return np.where(is_empty, 1.0, value)


def precision(counts: Confusion) -> Numbers:
    """Share of the predicted ids that are gold, `tp / (tp + fp)`; 0 when none was predicted.

    Example:
        >>> precision(Confusion(tp=2, fp=1, fn=2, tn=5))
        0.6666666666666666
    """
    return ratio(counts.tp, counts.tp + counts.fp)


def recall(counts: Confusion) -> Numbers:
    """Share of the gold ids that were predicted, `tp / (tp + fn)`; 0 when there is no gold id.

    Example:
        >>> recall(Confusion(tp=2, fp=1, fn=2, tn=5))
        0.5
    """
    return ratio(counts.tp, counts.tp + counts.fn)


def f_score(hits: Numbers, predicted: Numbers, gold: Numbers, *, beta: float = 1.0) -> Numbers:
    """F-beta from the numbers of right, predicted and gold ids; 0 when there are none.

    With precision `hits / predicted` and recall `hits / gold` it is `(1 + beta²) hits / (beta² gold + predicted)`.
    """
    squared = beta * beta
    return ratio((1.0 + squared) * hits, squared * gold + predicted)


def list_f_score(
    hits: Numbers, predicted: Numbers, gold: Numbers, *, beta: float = 1.0, length_penalty: float = 0.95
) -> Numbers:
    """The F1 reward of lists: `f_score`, 1 when both lists are empty, times `length_penalty ** |predicted - gold|`.

    `hits` are different ids, `predicted` and `gold` lengths, repeats counted. With `beta` above 1 recall counts more.

    Source: the published F1 reward.

    Example:
        >>> round(list_f_score(2, 2, 3), 4), list_f_score(0, 0, 0)  # precision 1, recall 2/3, one id short
        (0.76, 1.0)
    """
    penalty = length_penalty ** abs(predicted - gold)
    return _one_where(predicted + gold == 0, penalty * f_score(hits, predicted, gold, beta=beta))


def f1(counts: Confusion) -> Numbers:
    """Harmonic mean of precision and recall, `2 tp / (2 tp + fp + fn)`; 0 when nothing was predicted and nothing gold.

    Example:
        >>> round(f1(Confusion(tp=2, fp=1, fn=2, tn=5)), 4)
        0.5714
    """
    return f_score(counts.tp, counts.tp + counts.fp, counts.tp + counts.fn)


def mcc(counts: Confusion) -> Numbers:
    """Matthews correlation coefficient, in [-1, 1]; 0 when a factor of its denominator is 0, and for guessing.

    `(tp tn - fp fn) / sqrt((tp + fp)(tp + fn)(tn + fp)(tn + fn))`

    Example:
        >>> round(mcc(Confusion(tp=2, fp=1, fn=2, tn=5)), 4)
        0.3563
    """
    root: Any = math.sqrt
    tp, fp, fn, tn = counts
    if not isinstance(tp, (int, float)):
        root = np.sqrt
        tp, fp, fn, tn = (np.asarray(count, dtype=np.float64) for count in counts)
    return ratio(tp * tn - fp * fn, root((tp + fp) * (tp + fn)) * root((tn + fp) * (tn + fn)))


class Scores(NamedTuple):
    """The four metrics; precision, recall and f1 in [0, 1], mcc in [-1, 1]."""

    precision: Numbers
    recall: Numbers
    f1: Numbers
    mcc: Numbers


def scores(counts: Confusion) -> Scores:
    """All four metrics."""
    return Scores(precision(counts), recall(counts), f1(counts), mcc(counts))


def row_scores(counts: Confusion) -> Scores:
    """The four metrics of one row: `scores`, and 1 where nothing was predicted and nothing is gold.

    Source: ours; the same convention as the F1 and MCC rewards.
    """
    is_empty = counts.tp + counts.fp + counts.fn == 0
    return Scores(*[_one_where(is_empty, value) for value in scores(counts)])


def joint_scores(utterances: Scores, images: Scores) -> Scores:
    """Utterances and images in one: precision and recall are harmonic means of the two, f1 and mcc arithmetic means.

    Source: published.
    """
    return Scores(
        ratio(2 * utterances.precision * images.precision, utterances.precision + images.precision),
        ratio(2 * utterances.recall * images.recall, utterances.recall + images.recall),
        (utterances.f1 + images.f1) / 2,
        (utterances.mcc + images.mcc) / 2,
    )


def dispersion(utterance_ids: Sequence[int]) -> float:
    """Span of the gold utterances over their number: 1 for a dense fragment, more for a sparse one, 0 for none.

    Example:
        >>> dispersion([3, 4, 5]), dispersion([3, 8]), dispersion([])
        (1.0, 3.0, 0.0)
    """
    if not len(utterance_ids):
        return 0.0
    return (max(utterance_ids) - min(utterance_ids) + 1) / len(set(utterance_ids))
