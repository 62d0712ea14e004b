"""What an order of the training rows is, and those that are known before training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import numpy as np

from ffr_verl.samplers.difficulty import select_rows
from ffr_verl.settings import CurriculumConfig

GOLD_STRATA = ("no_gold", "utterances_only", "with_images")


@dataclass(frozen=True, slots=True)
class RowDifficulty:
    """The difficulty of every row of a file, in its order; arrays of shape `(rows,)`."""

    f1: np.ndarray  # in [0, 1]
    entropy: np.ndarray  # at least 0
    levels: np.ndarray  # strings, see `assign_levels`
    is_negative: np.ndarray  # whether the gold is empty
    strata: np.ndarray | None = None  # the number of each row's stratum; `None`: all rows are one
    strata_names: tuple[str, ...] = ("all",)
    # Of `online`: how far answers to the row are expected to differ in reward, in whatever unit; `None`: all alike.
    spread: np.ndarray | None = None
    turns: np.ndarray | None = None  # utterances of each row's dialogue; `None` where nobody has counted them

    @classmethod
    def unknown(cls, is_negative: np.ndarray) -> RowDifficulty:
        """Of rows that no model has answered: all alike."""
        count = len(is_negative)
        return cls(np.full(count, 0.5), np.zeros(count), np.full(count, "hard", "<U9"), is_negative)

    def __len__(self) -> int:
        return len(self.f1)


def competence(time: float, config: CurriculumConfig) -> float:
    """Share of the rows, easiest first, that may be drawn at a time in [0, 1].

    Source: competence-based curricula (Platanios et al., 2019) for `linear` and `root`; `steps` is ours.
    """
    if config.pacing == "root":
        return math.sqrt(config.start**2 + (1 - config.start**2) * time)
    if config.pacing == "steps":
        time = min(1.0, (math.floor(time * config.steps) + 1) / config.steps)
    return config.start + (1 - config.start) * time


def ascending_order(rows: RowDifficulty) -> np.ndarray:
    """Row numbers from easy to hard: by falling f1, of equals by rising entropy; int64."""
    return np.lexsort((rows.entropy, -rows.f1))


def interleaved(order: np.ndarray, strata: np.ndarray | None) -> np.ndarray:
    """The rows of `order` so that every stretch has the strata's shares, to a row of each; inside a stratum they keep
    the order. `strata` are those of every row; `None` leaves the order as it is."""
    if strata is None or not len(order):
        return order
    numbers = strata[order]
    sizes = np.bincount(numbers)
    by_stratum = np.argsort(numbers, kind="stable")
    ranks = np.empty(len(order))
    ranks[by_stratum] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[np.argsort((ranks + 0.5) / sizes[numbers], kind="stable")]


class Order(ABC):
    """Which row comes at which position of an epoch.

    `CurriculumSampler` asks the classes of `ORDERS`, and those of one's own: any class that is made with these
    arguments and has these methods, be it a subclass or not. The same rows, settings and observations must give the
    same rows, and a new order that was given a `state_dict` must continue with the rows that the
    first one would have given.
    """

    needs_difficulty: ClassVar[bool] = False  # whether it is nothing without a difficulty file
    fingerprint: bytes = b""  # tells it from an order of other rows or settings, for checkpoints

    def __init__(self, rows: RowDifficulty, config: CurriculumConfig) -> None:
        self._count, self._seed = len(rows), config.seed
        self._strata = None if rows.strata is None else np.asarray(rows.strata, dtype=np.int32)

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self._count

    @abstractmethod
    def row_at(self, epoch: int, position: int) -> int:
        """The row at a position, asked for in rising order: a number from 0 to `len(rows) - 1`."""

    def observe(self, rows: Sequence[int], deviations: Mapping[int, float]) -> dict[str, float]:
        """End a step: the rows drawn for it, and the standard deviation of the answers to each row in the observed
        metric. Returns further `ffr/curriculum/…` metrics."""
        return {}

    def state_dict(self) -> Any:
        """What the next rows depend on beside epoch and position; it is pickled into verl's checkpoint."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """Resume from a `state_dict`."""
        return None


class StaticOrder(Order):
    """An order that is known before training: `first` is that of the first epoch, `later` that of the others."""

    def __init__(self, rows: RowDifficulty, config: CurriculumConfig) -> None:
        super().__init__(rows, config)
        self._epoch = 0
        self._rows = self._first = self.first(rows, config).astype(np.int32)
        self.fingerprint = self._first.tobytes()

    @abstractmethod
    def first(self, rows: RowDifficulty, config: CurriculumConfig) -> np.ndarray:
        """Row numbers in the order of the first epoch; shape `(rows,)`, integers."""

    def later(self, epoch: int) -> np.ndarray:
        """Row numbers in the order of a later epoch."""
        return self._first

    def __len__(self) -> int:
        return len(self._first)

    def row_at(self, epoch: int, position: int) -> int:
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self.later(epoch) if epoch else self._first
        return int(self._rows[position])


class FileOrder(StaticOrder):
    """As the rows stand in the file."""

    def first(self, rows: RowDifficulty, config: CurriculumConfig) -> np.ndarray:
        return np.arange(len(rows))


class PublishedOrder(StaticOrder):
    """The levels one after another, parts of them kept, see `select_rows`."""

    needs_difficulty = True

    def first(self, rows: RowDifficulty, config: CurriculumConfig) -> np.ndarray:
        return select_rows(rows.levels, rows.f1, rows.is_negative, shares=msgspec.structs.asdict(config.shares))


class AscendingOrder(StaticOrder):
    """Easy to hard inside each stratum, so that ease is no matter of what a gold fragment is made of."""

    needs_difficulty = True

    def first(self, rows: RowDifficulty, config: CurriculumConfig) -> np.ndarray:
        return interleaved(ascending_order(rows), rows.strata)


class ShuffledOrder(StaticOrder):
    """By chance, another order in every epoch."""

    def first(self, rows: RowDifficulty, config: CurriculumConfig) -> np.ndarray:
        return self.later(0)

    def later(self, epoch: int) -> np.ndarray:
        return interleaved(np.random.default_rng([self._seed, epoch]).permutation(self._count), self._strata)


class CompetenceOrder(ShuffledOrder):
    """Each row once: at every place one of the easiest that may be drawn then and was not drawn before."""

    needs_difficulty = True

    def first(self, rows: RowDifficulty, config: CurriculumConfig) -> np.ndarray:
        return interleaved(_by_competence(interleaved(ascending_order(rows), rows.strata), config), rows.strata)


def order_rows(rows: RowDifficulty, config: CurriculumConfig) -> np.ndarray:
    """Row numbers in the order of the first epoch, int64; not of `online`, which has no order beforehand.

    Every row is there once, but for `published`, which leaves rows out. Strata have the same share in every stretch,
    but for `file` and `published`.

    Example:
        >>> rows = RowDifficulty(np.array([0.2, 1.0, 0.5]), np.ones(3), np.array(["hard"] * 3), np.zeros(3, bool))
        >>> order_rows(rows, CurriculumConfig(order="ascending")).tolist()
        [1, 2, 0]
    """
    order = STATIC_ORDERS[config.order](rows, config)
    return np.array([order.row_at(0, position) for position in range(len(order))], dtype=np.int64)


STATIC_ORDERS: Mapping[str, type[StaticOrder]] = {
    "file": FileOrder,
    "published": PublishedOrder,
    "ascending": AscendingOrder,
    "competence": CompetenceOrder,
    "shuffled": ShuffledOrder,
}


def _by_competence(ascending: np.ndarray, config: CurriculumConfig) -> np.ndarray:
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
