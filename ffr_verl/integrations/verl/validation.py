"""The published micro metrics in verl's validation, and the results that `BestCheckpoint` chooses by.

verl averages what the reward returned for each row; a micro metric is no such average. `FFRReplayBuffer`, which sees
every answer before verl averages, puts the metric itself into each row, so that their mean is the metric.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ffr_verl.files import whole_or_nothing
from ffr_verl.integrations.verl.checkpoint_folders import RESULTS, read_results
from ffr_verl.metrics import Confusion, joint_scores, scores


def micro_metrics(totals: np.ndarray) -> dict[str, float]:
    """`micro_KIND_f1` and `micro_KIND_mcc` of utterance, image and joint, as `ffr-verl evaluate` has them.

    `totals`, of shape `(2, 4)`, has true and false positives, false and true negatives of utterances and of images.
    """
    utterances, images = (scores(Confusion(*[float(one) for one in kind])) for kind in totals)
    joint = joint_scores(utterances, images)
    return {
        f"micro_{kind}_{name}": float(getattr(found, name))
        for kind, found in (("utterance", utterances), ("image", images), ("joint", joint))
        for name in ("f1", "mcc")
    }


MICRO_METRICS = tuple(micro_metrics(np.zeros((2, 4))))


class ValidationTotals:
    """Counts of one validation, which verl may ask for in several batches."""

    def __init__(self) -> None:
        self._step: int | None = None
        self._totals: dict[str, np.ndarray] = {}
        self._rows: dict[str, int] = {}
        self._rewards: dict[str, float] = defaultdict(float)

    def add(
        self, step: int, sources: Sequence[str], answers: Sequence[Mapping[str, Any]]
    ) -> dict[str, dict[str, float]]:
        """Count the answers of a batch: `data_source` of each, which verl averages by, and `reward_extra_info`.

        Another `step` begins from nothing. Returns for each source what its rows of this batch must hold for verl's
        mean over all of its rows so far to be the metric; of a single batch it is the metric.
        """
        if step != self._step:
            self._step, self._totals, self._rows, self._rewards = step, {}, {}, defaultdict(float)
        batches: dict[str, list[Any]] = defaultdict(list)
        for source, answer in zip(sources, answers, strict=True):
            batches[source].append(json.loads(answer["confusion"]))
            for name, value in answer.items():
                if isinstance(value, (int, float)):
                    self._rewards[name] += value
        found = {}
        for source, batch in batches.items():
            before, rows = self._totals.get(source, np.zeros((2, 4), np.int64)), self._rows.get(source, 0)
            after = before + np.asarray(batch, dtype=np.int64).sum(axis=0)
            self._totals[source], self._rows[source] = after, rows + len(batch)
            old, new = micro_metrics(before), micro_metrics(after)
            found[source] = {name: (new[name] * (rows + len(batch)) - old[name] * rows) / len(batch) for name in new}
        return found

    def metrics(self) -> dict[str, float]:
        """Of all answers of this validation so far, whatever their source: micro metrics, and means of what the reward
        returned."""
        rows = sum(self._rows.values())
        means = {name: value / rows for name, value in self._rewards.items()}
        return {**micro_metrics(np.sum(list(self._totals.values()), axis=0)), **means}


_folder: Path | None = None


def results_go_to(folder: Path) -> None:
    """Where this process's training run keeps what its validations found."""
    global _folder
    _folder = folder


def note_result(step: int, metrics: Mapping[str, float]) -> None:
    """Keep what the validation after a step found; nothing without `results_go_to`."""
    if _folder is None:
        return
    results = {**read_results(_folder), step: dict(metrics)}
    with whole_or_nothing([_folder / RESULTS]) as (temporary,):
        temporary.write_text(json.dumps({str(key): results[key] for key in sorted(results)}, indent=1), "utf-8")
