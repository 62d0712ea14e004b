"""The online curriculum: rows are drawn by how much the current policy's answers to them differ.

GRPO learns from differences inside a group. Every row has an expected spread: at first what its gold ids are worth,
later the decayed mean of what its groups had. Rows that stay solved or hopeless have none, and are drawn more and more
seldom, but never are forgotten. Source: ours.

Rows lie in 128 bins of equal spread, so a draw and an observation cost the same for any number of rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ffr_verl.samplers.curriculum import Order, RowDifficulty
from ffr_verl.settings import CurriculumConfig, OnlineConfig

_BINS = 128
_CENTRES = (np.arange(_BINS) + 0.5) / _BINS


class OnlineDraws:
    """Draws rows without repeating one before it was observed, and learns from the observed spreads.

    About 13 bytes a row. `spreads` are expected of each row before it was ever observed: in [0, 1], 0.5 is typical.
    Equal seeds and equal observations give equal draws.
    """

    def __init__(self, spreads: np.ndarray, config: OnlineConfig, *, seed: int | list[int]) -> None:
        self._config = config
        self._weights = config.floor + (1.0 - config.floor) * (2.0 * _CENTRES) ** 2  # 1 of a typical row
        self._spreads = np.clip(np.asarray(spreads, dtype=np.float32), 0.0, 1.0)
        self._random = np.random.default_rng(seed)
        self._in_flight: dict[int, None] = {}  # in the order of drawing
        bins = self._bin_of(self._spreads)
        order = np.argsort(bins, kind="stable").astype(np.int32)
        self._fill(order, np.bincount(bins, minlength=_BINS))

    def _fill(self, order: np.ndarray, counts: np.ndarray) -> None:
        """Put the rows of `order` into the bins, so many into each."""
        self._counts = counts.astype(np.int64)
        self._members = [array("i", part.tobytes()) for part in np.split(order, np.cumsum(counts)[:-1])]
        self._places = np.zeros(len(self._spreads), dtype=np.int32)
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        self._places[order] = np.arange(len(order)) - starts

    @staticmethod
    def _bin_of(spreads: Any) -> Any:
        return np.minimum((np.asarray(spreads) * _BINS).astype(np.int64), _BINS - 1)

    def __len__(self) -> int:
        return len(self._spreads)

    def spread(self, row: int) -> float:
        """What is expected of a row, in [0, 1]."""
        return float(self._spreads[row])

    def draw(self) -> int:
        """A row that is not in flight; it is in flight until the next `update`. When all rows are in flight they all
        may be drawn again. `IndexError` when there are no rows."""
        if not len(self):
            raise IndexError("no rows to draw from")
        if len(self._in_flight) == len(self):
            self._land()
        chances = np.cumsum(self._weights * self._counts)
        number = int(np.searchsorted(chances, self._random.random() * chances[-1], side="right"))
        members = self._members[number]
        row = members[int(self._random.random() * len(members))]
        self._take(row, number)
        self._in_flight[row] = None
        return row

    def _take(self, row: int, number: int) -> None:
        members, place = self._members[number], int(self._places[row])
        last = members.pop()
        if last != row:
            members[place] = last
            self._places[last] = place
        self._counts[number] -= 1

    def _put(self, row: int) -> None:
        number = int(self._bin_of(self._spreads[row]))
        self._places[row] = len(self._members[number])
        self._members[number].append(row)
        self._counts[number] += 1

    def _land(self) -> None:
        for row in self._in_flight:
            self._put(row)
        self._in_flight.clear()

    def update(self, spreads: Mapping[int, float]) -> None:
        """End a step: learn the observed spreads, in [0, 1], and let all rows be drawn again."""
        decay = self._config.decay
        for row in sorted(spreads):
            if row not in self._in_flight:
                self._take(row, int(self._bin_of(self._spreads[row])))
                self._in_flight[row] = None
            self._spreads[row] = decay * float(self._spreads[row]) + (1.0 - decay) * spreads[row]
        self._land()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draws depend on: about 8 bytes a row."""
        return {
            "spreads": self._spreads.copy(),
            "order": np.concatenate([np.frombuffer(part, dtype=np.int32) for part in self._members if part])
            if self._counts.sum()
            else np.empty(0, np.int32),
            "counts": self._counts.copy(),
            "in_flight": list(self._in_flight),
            "random": self._random.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._spreads = np.array(state["spreads"], dtype=np.float32)
        self._fill(np.asarray(state["order"], dtype=np.int32), np.asarray(state["counts"]))
        self._in_flight = dict.fromkeys(state["in_flight"])
        self._random.bit_generator.state = state["random"]


class OnlineOrder(Order):
    """Rows drawn again in every step: `OnlineDraws` inside each stratum; strata are drawn from in turns that keep the
    data's shares."""

    def __init__(self, rows: RowDifficulty, config: CurriculumConfig) -> None:
        super().__init__(rows, config)
        spreads = np.ones(len(rows)) if rows.spread is None else np.asarray(rows.spread, dtype=np.float64)
        self.fingerprint = spreads.tobytes() + (b"" if self._strata is None else self._strata.tobytes())
        self._stratum = np.zeros(len(rows), np.int32) if self._strata is None else self._strata
        self._rows = [np.flatnonzero(self._stratum == one) for one in range(int(self._stratum.max(initial=0)) + 1)]
        self._places = np.empty(len(rows), dtype=np.int32)
        for of_stratum in self._rows:
            self._places[of_stratum] = np.arange(len(of_stratum), dtype=np.int32)
        halves = np.minimum(1.0, spreads / max(2.0 * float(np.mean(spreads)), 1e-9)) if len(rows) else spreads
        self._parts = [
            OnlineDraws(halves[of_stratum], config.online, seed=[config.seed, number])
            for number, of_stratum in enumerate(self._rows)
        ]
        self._shares = np.array([len(of_stratum) for of_stratum in self._rows]) / max(1, len(rows))
        self._drawn = np.zeros(len(self._rows), dtype=np.int64)
        self._typical = 0.0  # spread of a group: the mean of those seen

    def row_at(self, epoch: int, position: int) -> int:
        """A row of the stratum that is most behind its share, see `OnlineDraws.draw`."""
        number = int(np.argmax(self._shares * (self._drawn.sum() + 1) - self._drawn))
        self._drawn[number] += 1
        return int(self._rows[number][self._parts[number].draw()])

    def spread(self, row: int) -> float:
        """What is expected of a row, in [0, 1]: 0.5 is typical."""
        return self._parts[self._stratum[row]].spread(int(self._places[row]))

    def observe(self, rows: Sequence[int], deviations: Mapping[int, float]) -> dict[str, float]:
        """Learn the standard deviations of the rows' groups, and let all rows be drawn again."""
        expected = [self.spread(row) for row in rows]
        if deviations:
            mean = float(np.mean(list(deviations.values())))
            self._typical = 0.9 * self._typical + 0.1 * mean if self._typical else mean
        found: list[dict[int, float]] = [{} for _ in self._parts]
        for row, deviation in deviations.items():
            spread = min(1.0, deviation / (2.0 * self._typical)) if deviation > 0 else 0.0
            found[self._stratum[row]][int(self._places[row])] = spread
        for part, spreads in zip(self._parts, found, strict=True):
            part.update(spreads)
        return {"ffr/curriculum/spread": float(np.mean(expected))} if expected else {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "parts": [part.state_dict() for part in self._parts],
            "drawn": self._drawn.copy(),
            "typical": self._typical,
        }

    def load_state_dict(self, state: Any) -> None:
        for part, one in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(one)
        self._drawn, self._typical = np.array(state["drawn"]), float(state["typical"])
