"""The sampler of a curriculum: which row comes next, and how far training has come.

`FFRDataset` asks it for the row at each position and `FFRReplayBuffer` tells it the rewards; both find it through
`activate` and `active_sampler`, since verl builds them apart from each other in one process.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ffr_verl.errors import FFRError
from ffr_verl.samplers.curriculum import RowDifficulty, ascending_order, order_rows, shuffled_order
from ffr_verl.samplers.curriculum_config import CurriculumConfig
from ffr_verl.samplers.difficulty import LEVELS
from ffr_verl.samplers.online import OnlineDraws

__all__ = ["CurriculumSampler", "activate", "active_sampler"]


class CurriculumSampler:
    """Gives the rows of a curriculum one after another, and can be stopped and gone on with at any row.

    A torch `Sampler` as far as data loaders look (`__iter__`, `__len__`, `state_dict`, `load_state_dict`), without
    torch. `benchmarks/curriculum.py` measures its memory.

    Args:
        rows: the difficulty of every row.
        config: which order.

    Raises:
        FFRError: when the order leaves no row.

    Example:
        >>> rows = RowDifficulty(np.array([0.2, 1.0]), np.ones(2), np.array(["hard"] * 2), np.zeros(2, bool))
        >>> sampler = CurriculumSampler(rows, CurriculumConfig(order="ascending"))
        >>> next(iter(sampler)), sampler.state_dict()["position"], list(sampler)
        (1, 1, [0])
    """

    def __init__(self, rows: RowDifficulty, config: CurriculumConfig) -> None:
        self.config = config
        self._f1 = np.asarray(rows.f1, dtype=np.float32)
        self._levels = np.zeros(len(rows), dtype=np.uint8)
        for number, level in enumerate(LEVELS):
            self._levels[np.asarray(rows.levels) == level] = number
        self._ranks = np.empty(len(rows), dtype=np.int32)
        self._ranks[ascending_order(rows)] = np.arange(len(rows), dtype=np.int32)
        self._draws = np.zeros(len(rows), dtype=np.uint16)
        self._coverage = 0
        self._position = 0
        self._epoch = 0
        self._step_rows: list[int] = []
        self._online: OnlineDraws | None = None
        if config.order == "online":
            self._online = OnlineDraws(rows.f1, config.online, seed=config.seed)
            self._order = np.empty(0, np.int32)
            content = self._f1.tobytes()
        else:
            self._order = order_rows(rows, config).astype(np.int32)
            content = self._order.tobytes()
        self._first_order = self._order
        self._fingerprint = zlib.crc32(f"{config.order} {config.seed}".encode(), zlib.crc32(content))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._f1) if self._online is not None else len(self._order)

    def __iter__(self) -> Iterator[int]:
        """What is left of this epoch; a further call begins the next one."""
        if self._position >= len(self):
            self._begin_epoch(self._epoch + 1)
        while self._position < len(self):
            yield self.row_at(self._position)

    def row_at(self, position: int) -> int:
        """The row at a position of the epoch; asked for in rising order, as a data loader does.

        Position 0 after another one begins the next epoch. With `online` every call draws anew.

        Raises:
            IndexError: for a position that an epoch does not have.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        if position == 0 and self._position:
            self._begin_epoch(self._epoch + 1)
        self._position = position + 1
        row = int(self._order[position]) if self._online is None else self._online.draw()
        self._coverage += not self._draws[row]
        self._draws[row] = min(int(self._draws[row]) + 1, 65_535)
        self._step_rows.append(row)
        return row

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._order = self._first_order
        if epoch and self.config.order in ("competence", "shuffled"):
            self._order = shuffled_order(len(self._f1), self.config.seed, epoch)

    def update(self, scores: Mapping[int, float]) -> dict[str, float]:
        """End a training step: learn how the policy did, and tell what was drawn for it.

        Args:
            scores: mean score of the groups of each row, of the metric `config.online.metric`; not read by static
                orders.

        Returns:
            `ffr/curriculum/…` of the rows drawn since the last call: `difficulty` (1 minus the expected score, mean),
            `share/LEVEL`, `coverage` (share of all rows drawn so far), `distance` (mean distance of the rows' ranks
            in the ascending order from the share of the epoch that is over; 0 for the ascending order, 1/3 by chance)
            and with `online` the `target`.
        """
        rows = np.array(self._step_rows, dtype=np.int64)
        self._step_rows = []
        metrics: dict[str, float] = {}
        if len(rows):
            expected = self._f1[rows] if self._online is None else self._online.expected_scores(rows)
            places = (self._position - len(rows) + np.arange(len(rows))) % max(1, len(self)) / max(1, len(self))
            metrics["ffr/curriculum/difficulty"] = float(1.0 - expected.mean())
            metrics["ffr/curriculum/distance"] = float(np.abs(self._ranks[rows] / len(self._f1) - places).mean())
            for number, level in enumerate(LEVELS):
                metrics[f"ffr/curriculum/share/{level}"] = float((self._levels[rows] == number).mean())
        metrics["ffr/curriculum/coverage"] = self._coverage / max(1, len(self._f1))
        if self._online is not None:
            metrics["ffr/curriculum/target"] = self._online.target
            self._online.update({row: score / self.config.online.scale for row, score in scores.items()})
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Where it is: epoch, position in it, how often each row came, a fingerprint; with `online` its state too."""
        return {
            "order": self._fingerprint,
            "epoch": self._epoch,
            "position": self._position,
            "draws": self._draws.copy(),
            "step_rows": list(self._step_rows),
            "online": None if self._online is None else self._online.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a `state_dict` was taken.

        Raises:
            FFRError: when it was taken of another order.
        """
        if state["order"] != self._fingerprint:
            raise FFRError(
                "the state of the curriculum belongs to another order: the difficulty file or data.ffr.curriculum "
                "has changed since the checkpoint; start anew, or give what it was"
            )
        if state["epoch"] != self._epoch:
            self._begin_epoch(state["epoch"])
        self._position = state["position"]
        self._draws = np.array(state["draws"], dtype=np.uint16)
        self._coverage = int((self._draws > 0).sum())
        self._step_rows = list(state["step_rows"])
        if self._online is not None:
            self._online.load_state_dict(state["online"])


_active: CurriculumSampler | None = None


def activate(sampler: CurriculumSampler | None) -> None:
    """Make a sampler the one of this process's training run; the newest counts."""
    global _active
    _active = sampler


def active_sampler() -> CurriculumSampler | None:
    """The sampler of this process's training run; `None` where the rows come in the order of the file."""
    return _active
