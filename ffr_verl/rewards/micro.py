"""What an id is worth to the published micro metrics, as a reward of one answer.

A micro metric is a ratio of sums over all rows, so no mean of per-row values rises with it. To first order it rises by
the sum over the rows of `hit` for each right id and `miss` for each wrong one, where `hit` and `miss` are its
derivatives at the present sums; for F1 that is Dinkelbach's way of maximising a ratio. Sources: Dinkelbach (1967) and
its use for F-measures (Parambath et al., 2014); the reward is ours.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from ffr_verl.errors import FFRError

MODALITIES = ("utterance", "image")
LOWEST = -1.0


class MicroCounts(NamedTuple):
    """Where a policy stands: ids of one kind in an answer, mean over rows."""

    hits: float  # right
    predicted: float
    gold: float  # above 0
    universe: float  # that the dialogue has

    @property
    def f1(self) -> float:
        """Micro F1, in [0, 1]."""
        return 2 * self.hits / (self.predicted + self.gold)


NEUTRAL = MicroCounts(hits=0.5, predicted=1.0, gold=1.0, universe=4.0)


def id_values(counts: MicroCounts, *, mcc_share: float = 0.0) -> tuple[float, float]:
    """What a right and a wrong id add to micro F1 or MCC, times the mean number of gold ids.

    For F1 they are `(2 - F) / 2g` and `-F / 2g` with F the present F1 and g the gold ids of a row, so that a list is
    worth `(2 hits - F predicted) / 2g`: naming an id pays when its chance of being right is above F / 2. For MCC they
    are its derivatives at the present counts, on the same scale; there the chance must be higher. `mcc_share` is 0 for
    F1, 1 for MCC, between them the weighted mean of both.

    Returns:
        `(hit, miss)`; hit above 0, miss at most 0 for F1.

    Example:
        >>> id_values(MicroCounts(hits=1.0, predicted=2.0, gold=2.0, universe=8.0))
        (0.375, -0.125)
    """
    f1 = counts.f1
    hit, miss = (2.0 - f1) / (2.0 * counts.gold), -f1 / (2.0 * counts.gold)
    if not mcc_share:
        return hit, miss
    gold = min(counts.gold, 0.95 * counts.universe)
    # Away from the ends, where the coefficient has no derivative: nothing named, everything named.
    predicted = min(max(counts.predicted, 0.1 * gold), 0.95 * counts.universe)
    universe, hits = counts.universe, min(counts.hits, predicted, gold)
    root = math.sqrt(predicted * gold * (universe - predicted) * (universe - gold))
    value = (hits * universe - predicted * gold) / root
    bend = 0.5 * value * (1.0 / predicted - 1.0 / (universe - predicted))
    scale = (predicted + gold) / (2.0 * counts.gold)
    mcc_hit, mcc_miss = scale * ((universe - gold) / root - bend), scale * (-gold / root - bend)
    return hit + mcc_share * (mcc_hit - hit), miss + mcc_share * (mcc_miss - miss)


def micro_value(predicted: Sequence[int], gold: Collection[int], values: tuple[float, float]) -> float:
    """What a list of ids is worth: `hit` of `id_values` for each right id, `miss` for each other one, repeats being
    misses; at least -1, 0 for an empty list."""
    hits = len(set(predicted).intersection(gold))
    return max(LOWEST, values[0] * hits + values[1] * (len(predicted) - hits))


def micro_counts(given: Mapping[str, Any], *, where: str) -> dict[str, MicroCounts]:
    """Read `{"utterance": [hits, predicted, gold, universe], "image": [...]}`.

    Raises `FFRError` for another shape or a number out of range; the message names `where` and the kind.
    """
    found = {}
    for kind in MODALITIES:
        try:
            counts = MicroCounts(*[float(one) for one in given[kind]])
        except (TypeError, KeyError, ValueError):
            counts = MicroCounts(-1, -1, -1, -1)
        if not (0 <= counts.hits <= counts.predicted + 1e-9 and 0 < counts.gold <= counts.universe < math.inf):
            shown = given.get(kind) if isinstance(given, Mapping) else given
            raise FFRError(
                f"{where}.{kind}: found {shown!r}; expected the mean numbers of right, named, gold and all ids of a "
                "row: [hits, predicted, gold, universe], gold above 0"
            )
        found[kind] = counts
    return found
