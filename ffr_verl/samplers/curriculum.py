"""Static curricula: the order in which the rows of a file are trained, computed once from their difficulty."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec
import numpy as np

from ffr_verl.samplers.difficulty import select_rows
from ffr_verl.settings import CurriculumConfig

__all__ = [
    "GOLD_STRATA",
    "RowDifficulty",
    "ascending_order",
    "competence",
    "interleaved",
    "order_rows",
    "shuffled_order",
]

GOLD_STRATA = ("no_gold", "utterances_only", "with_images")


@dataclass(frozen=True, slots=True)
class RowDifficulty:
    """The difficulty of every row of a file, in its order.

    Attributes:
        f1: shape `(rows,)`, in [0, 1].
        entropy: the same shape, at least 0.
        levels: the same shape, strings, see `assign_levels`.
        is_negative: the same shape, whether the gold is empty.
        strata: the same shape, the number of each row's stratum; `None`: all rows are one.
        strata_names: of the strata.
        spread: the same shape, how far answers to the row are expected to differ in reward, in whatever unit; `None`:
            all alike. Of `online` only.
    """

    f1: np.ndarray
    entropy: np.ndarray
    levels: np.ndarray
    is_negative: np.ndarray
    strata: np.ndarray | None = None
    strata_names: tuple[str, ...] = ("all",)
    spread: np.ndarray | None = None

    @classmethod
    def unknown(cls, is_negative: np.ndarray) -> RowDifficulty:
        """Of rows that no model has answered: all alike.

        Example:
            >>> len(RowDifficulty.unknown(np.zeros(3, bool)))
            3
        """
        count = len(is_negative)
        return cls(np.full(count, 0.5), np.zeros(count), np.full(count, "hard", "<U9"), is_negative)

    def __len__(self) -> int:
        return len(self.f1)


def competence(time: float, config: CurriculumConfig) -> float:
    """Share of the rows, easiest first, that may be drawn at a time in [0, 1].

    Source: competence-based curricula (Platanios et al., 2019) for `linear` and `root`; `steps` is ours.

    Example:
        >>> config = CurriculumConfig(order="competence", pacing="linear", start=0.2)
        >>> [round(competence(time, config), 6) for time in (0.0, 0.5, 1.0)]
        [0.2, 0.6, 1.0]
    """
    if config.pacing == "root":
        return math.sqrt(config.start**2 + (1 - config.start**2) * time)
    if config.pacing == "steps":
        time = min(1.0, (math.floor(time * config.steps) + 1) / config.steps)
    return config.start + (1 - config.start) * time


def ascending_order(rows: RowDifficulty) -> np.ndarray:
    """Row numbers from easy to hard: by falling f1, of equals by rising entropy; int64."""
    return np.lexsort((rows.entropy, -rows.f1))


def shuffled_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Row numbers by chance; another order in every epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count)


def interleaved(order: np.ndarray, strata: np.ndarray | None) -> np.ndarray:
    """Rows in an order that gives every stretch of them the strata's shares, to a row of each; inside a stratum they
    keep the order.

    Args:
        order: row numbers.
        strata: of every row, its stratum's number; `None` leaves the order as it is.

    Example:
        >>> interleaved(np.array([0, 1, 2, 3, 4, 5]), np.array([0, 0, 0, 0, 1, 1])).tolist()
        [0, 4, 1, 2, 5, 3]
    """
    if strata is None or not len(order):
        return order
    numbers = strata[order]
    sizes = np.bincount(numbers)
    by_stratum = np.argsort(numbers, kind="stable")
    ranks = np.empty(len(order))
    ranks[by_stratum] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[np.argsort((ranks + 0.5) / sizes[numbers], kind="stable")]


def order_rows(rows: RowDifficulty, config: CurriculumConfig) -> np.ndarray:
    """Row numbers in the order of training, for the first epoch; `CurriculumSampler` knows the later ones.

    Args:
        rows: the difficulty of every row.
        config: which order; not `online`, which has no order of its own beforehand.

    Returns:
        int64; every row once, but for `published`, which leaves rows out. Strata have the same share in every stretch,
        but for `file` and `published`.

    Example:
        >>> rows = RowDifficulty(np.array([0.2, 1.0, 0.5]), np.ones(3), np.array(["hard"] * 3), np.zeros(3, bool))
        >>> order_rows(rows, CurriculumConfig(order="ascending")).tolist()
        [1, 2, 0]
    """
    if config.order == "file":
        return np.arange(len(rows))
    if config.order == "published":
        return select_rows(rows.levels, rows.f1, rows.is_negative, shares=msgspec.structs.asdict(config.shares))
    if config.order == "shuffled":
        return interleaved(shuffled_order(len(rows), config.seed, 0), rows.strata)
    # Easy to hard inside each stratum, so that ease is no matter of what a gold fragment is made of.
    ascending = interleaved(ascending_order(rows), rows.strata)
    return interleaved(_by_competence(ascending, config), rows.strata) if config.order == "competence" else ascending


def _by_competence(ascending: np.ndarray, config: CurriculumConfig) -> np.ndarray:
    """Each row once: at every place one of the easiest that may be drawn then and was not drawn before."""
    count = len(ascending)
    chances = np.random.default_rng(config.seed).random(count).tolist()
    waiting: list[int] = []
    order: list[int] = []
    rows, opened = ascending.tolist(), 0
    for place, chance in enumerate(chances):
        limit = min(count, max(place + 1, math.ceil(competence(place / count, config) * count)))
        if limit > opened:
            waiting += rows[opened:limit]
            opened = limit
        drawn = int(chance * len(waiting))
        waiting[drawn], waiting[-1] = waiting[-1], waiting[drawn]
        order.append(waiting.pop())
    return np.array(order, dtype=np.int64)
