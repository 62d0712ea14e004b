"""The online curriculum: rows are drawn by how well the current policy does on them.

Every row has an expected score in [0, 1]: at first the f1 of the SFT model's answer, later the decayed mean of its
groups' scores. A row's weight is a bell around a target score with a floor below it, so rows that the policy gets
half right, whose answers differ most inside a group, come most often, and none is forgotten. Source: ours.

Rows lie in 128 bins of equal expected score, so a draw and an observation cost the same for any number of rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import numpy as np

from ffr_verl.samplers.curriculum_config import OnlineConfig

__all__ = ["OnlineDraws"]

_BINS = 128
_CENTRES = (np.arange(_BINS) + 0.5) / _BINS


class OnlineDraws:
    """Draws rows without repeating one before it was observed, and learns from the observed scores.

    About 13 bytes a row.

    Args:
        scores: expected score of each row before it was ever observed; shape `(rows,)`, in [0, 1].
        config: target, width, floor and decay.
        seed: equal seeds and equal observations give equal draws.

    Example:
        >>> draws = OnlineDraws(np.array([0.0, 0.5, 1.0]), OnlineConfig(floor=1e-9, width=0.1), seed=0)
        >>> draws.draw()
        1
        >>> draws.update({1: 1.0})
        >>> round(draws.expected_score(1), 2)
        0.75
    """

    def __init__(self, scores: np.ndarray, config: OnlineConfig, *, seed: int) -> None:
        self._config = config
        self._scores = np.clip(np.asarray(scores, dtype=np.float32), 0.0, 1.0)
        self._random = np.random.default_rng(seed)
        self._in_flight: dict[int, None] = {}  # in the order of drawing
        bins = self._bin_of(self._scores)
        order = np.argsort(bins, kind="stable").astype(np.int32)
        counts = np.bincount(bins, minlength=_BINS)
        self._fill(order, counts)

    def _fill(self, order: np.ndarray, counts: np.ndarray) -> None:
        """Put the rows of `order` into the bins, so many into each."""
        self._counts = counts.astype(np.int64)
        self._members = [array("i", part.tobytes()) for part in np.split(order, np.cumsum(counts)[:-1])]
        self._places = np.zeros(len(self._scores), dtype=np.int32)
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        self._places[order] = np.arange(len(order)) - starts
        self._weigh()

    @staticmethod
    def _bin_of(scores: Any) -> Any:
        return np.minimum((np.asarray(scores) * _BINS).astype(np.int64), _BINS - 1)

    def __len__(self) -> int:
        return len(self._scores)

    @property
    def target(self) -> float:
        """Expected score that is drawn most, in [0, 1]."""
        return self._target

    def expected_score(self, row: int) -> float:
        """What is known of a row, in [0, 1]."""
        return float(self._scores[row])

    def expected_scores(self, rows: np.ndarray) -> np.ndarray:
        """What is known of rows; float32 in [0, 1]."""
        return self._scores[rows]

    def _weigh(self) -> None:
        """Weights of the bins for the rows as they are now."""
        self._aim(self._middle() if self._config.target is None else self._config.target)

    def _aim(self, target: float) -> None:
        self._target = target
        bell = np.exp(-0.5 * ((_CENTRES - target) / self._config.width) ** 2)
        self._weights = self._config.floor + (1.0 - self._config.floor) * bell

    def _middle(self) -> float:
        """Half way between the 5th and the 95th percentile of the expected scores, to the width of a bin."""
        total = np.cumsum(self._counts)
        if not len(total) or not total[-1]:
            return 0.5
        low, high = np.searchsorted(total, [0.05 * total[-1], 0.95 * total[-1]])
        return float((_CENTRES[low] + _CENTRES[min(high, _BINS - 1)]) / 2)

    def draw(self) -> int:
        """A row that is not in flight; it is in flight until the next `update`.

        When all rows are in flight they all may be drawn again.

        Raises:
            IndexError: when there are no rows.
        """
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
        number = int(self._bin_of(self._scores[row]))
        self._places[row] = len(self._members[number])
        self._members[number].append(row)
        self._counts[number] += 1

    def _land(self) -> None:
        for row in self._in_flight:
            self._put(row)
        self._in_flight.clear()

    def update(self, scores: Mapping[int, float]) -> None:
        """End a step: learn the observed scores, and let all rows be drawn again.

        Args:
            scores: mean score of the groups of each observed row; clipped to [0, 1]. The order does not matter.
        """
        decay = self._config.decay
        for row in sorted(scores):
            if row not in self._in_flight:
                self._take(row, int(self._bin_of(self._scores[row])))
                self._in_flight[row] = None
            observed = min(1.0, max(0.0, scores[row]))
            self._scores[row] = decay * float(self._scores[row]) + (1.0 - decay) * observed
        self._land()
        self._weigh()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next draws depend on: about 8 bytes a row."""
        return {
            "scores": self._scores.copy(),
            "order": np.concatenate([np.frombuffer(part, dtype=np.int32) for part in self._members if part])
            if self._counts.sum()
            else np.empty(0, np.int32),
            "counts": self._counts.copy(),
            "in_flight": list(self._in_flight),
            "random": self._random.bit_generator.state,
            "target": self._target,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a `state_dict` of as many rows was taken."""
        self._scores = np.array(state["scores"], dtype=np.float32)
        self._fill(np.asarray(state["order"], dtype=np.int32), np.asarray(state["counts"]))
        self._in_flight = dict.fromkeys(state["in_flight"])
        self._random.bit_generator.state = state["random"]
        self._aim(state["target"])
