"""Where the policy stands in the published micro metric while it is trained: the reward `f1_mode: micro` asks for it.

`FFRDataset` writes it into the rows that it hands out, `FFRReplayBuffer` keeps it up, and `CurriculumSampler` saves
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ffr_verl.rewards.micro import MODALITIES, MicroCounts

_DECAY = 0.8
SCORED_ANSWERS = 256.0  # what the estimate of a difficulty file weighs at the start


class MicroEstimate:
    """Running means of what answers name and have right, the answers of a step counting `0.8 ** age`.

    `start` are the mean counts of each kind before any answer was seen, shape `(2, 4)`: hits, predicted, gold,
    universe; it counts for `weight` answers.
    """

    def __init__(self, start: np.ndarray, weight: float = SCORED_ANSWERS) -> None:
        self._means = np.array(start, dtype=np.float64)
        self._weight = weight

    def observe(self, confusions: Sequence[Sequence[Sequence[int]]]) -> None:
        """Count the answers of a step: of each, for each kind, true and false positives, false and true negatives."""
        if not confusions:
            return
        tp, fp, fn, tn = np.moveaxis(np.asarray(confusions, dtype=np.float64), -1, 0)
        means = np.stack([tp, tp + fp, tp + fn, tp + fp + fn + tn], axis=-1).mean(axis=0)
        total = self._weight + len(confusions)
        self._means += (means - self._means) * len(confusions) / total
        self._weight = _DECAY * total

    def counts(self) -> dict[str, list[float]]:
        """As `extra_info` holds them, see `ffr_verl.rewards.micro.micro_counts`."""
        tiny = 1e-3  # a kind that no gold has yet
        found = {}
        for kind, (hits, predicted, gold, universe) in zip(MODALITIES, self._means.tolist(), strict=True):
            found[kind] = [hits, predicted, max(gold, tiny), max(universe, gold, tiny)]
        return found

    def f1(self) -> dict[str, float]:
        """Micro F1 of each kind."""
        return {kind: MicroCounts(*counts).f1 for kind, counts in self.counts().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"means": self._means.copy(), "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._means, self._weight = np.array(state["means"], dtype=np.float64), float(state["weight"])
