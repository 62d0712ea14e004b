"""Static curricula: the order in which the rows of a file are trained, computed once from their difficulty."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ffr_verl.samplers.curriculum_config import CurriculumConfig
from ffr_verl.samplers.difficulty import select_rows

__all__ = ["RowDifficulty", "ascending_order", "competence", "order_rows", "shuffled_order"]


@dataclass(frozen=True, slots=True)
class RowDifficulty:
    """The difficulty of every row of a file, in its order.

    Attributes:
        f1: shape `(rows,)`, in [0, 1].
        entropy: the same shape, at least 0.
        levels: the same shape, strings, see `assign_levels`.
        is_negative: the same shape, whether the gold is empty.
    """

    f1: np.ndarray
    entropy: np.ndarray
    levels: np.ndarray
    is_negative: np.ndarray

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


def order_rows(rows: RowDifficulty, config: CurriculumConfig) -> np.ndarray:
    """Row numbers in the order of training, for the first epoch; `CurriculumSampler` knows the later ones.

    Args:
        rows: the difficulty of every row.
        config: which order; not `online`, which has no order of its own beforehand.

    Returns:
        int64; every row once, but for `published`, which leaves rows out.

    Example:
        >>> rows = RowDifficulty(np.array([0.2, 1.0, 0.5]), np.ones(3), np.array(["hard"] * 3), np.zeros(3, bool))
        >>> order_rows(rows, CurriculumConfig(order="ascending")).tolist()
        [1, 2, 0]
    """
    if config.order == "published":
        return select_rows(rows.levels, rows.f1, rows.is_negative, shares=config.shares)
    if config.order == "shuffled":
        return shuffled_order(len(rows), config.seed, 0)
    ascending = ascending_order(rows)
    return _by_competence(ascending, config) if config.order == "competence" else ascending


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
