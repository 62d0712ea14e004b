"""Parts of the rows, whose metrics tell where a model fails: by dialogue length, fragment size, dispersion, gold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from ffr_verl.evaluation.counts import RowCounts
from ffr_verl.metrics import ratio

_EMPTY = 0.0
Edges = tuple[tuple[str, float], ...]  # of each part its name and the greatest value in it

_TURNS: Edges = (
    ("up to 10", 10),
    ("11 to 20", 20),
    ("21 to 30", 30),
    ("31 to 50", 50),
    ("51 to 100", 100),
    ("above 100", math.inf),
)
_SIZE: Edges = (("none", _EMPTY), ("1 to 2", 2), ("3 to 5", 5), ("6 to 10", 10), ("above 10", math.inf))
DISPERSION: Edges = (
    ("no utterances", _EMPTY),
    ("1 (dense)", 1.0),
    ("1 to 1.5", 1.5),
    ("1.5 to 2", 2.0),
    ("2 to 3", 3.0),
    ("above 3", math.inf),
)
_GOLD: Edges = (("empty", _EMPTY), ("a fragment", math.inf))


def _size(counts: RowCounts) -> np.ndarray:
    return counts.column("utterance_gold") + counts.column("image_gold")


def _dispersion(counts: RowCounts) -> np.ndarray:
    """`ffr_verl.metrics.dispersion`, of many rows."""
    return np.asarray(ratio(counts.column("gold_span"), counts.column("utterance_gold")))


# Turns of the dialogue; ids in the gold; its span over its utterances; whether it has ids.
BREAKDOWNS: Mapping[str, tuple[Callable[[RowCounts], np.ndarray], Edges]] = {
    "dialogue_length": (lambda counts: counts.column("turns"), _TURNS),
    "fragment_size": (_size, _SIZE),
    "dispersion": (_dispersion, DISPERSION),
    "gold": (_size, _GOLD),
}


def part_names(breakdown: str) -> list[str]:
    """The parts of a break-down, in order."""
    return [name for name, _ in BREAKDOWNS[breakdown][1]]


def parts_of(counts: RowCounts, breakdown: str) -> np.ndarray:
    """The number of each row's part; shape `(rows,)`."""
    values, edges = BREAKDOWNS[breakdown]
    return np.searchsorted([greatest for _, greatest in edges], values(counts), side="left")
