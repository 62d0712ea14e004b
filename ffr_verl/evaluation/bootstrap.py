"""Resamples of rows, for intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ffr_verl.errors import FFRError
from ffr_verl.evaluation.counts import RowCounts
from ffr_verl.evaluation.row_statistics import chunks, metrics_of_sums, nested, row_statistics, width

_AT_A_TIME = 128


@dataclass(frozen=True, slots=True)
class BootstrapSettings:
    """How intervals are made."""

    resamples: int = 1000  # how often the rows are drawn again; 0 for no intervals
    seed: int = 0  # equal seeds give equal intervals
    level: float = 0.95  # share of the resamples inside an interval

    def __post_init__(self) -> None:
        if self.resamples < 0 or self.seed < 0 or not 0.0 < self.level < 1.0:
            raise FFRError(
                f"bootstrap: found {self.resamples} resamples, seed {self.seed}, level {self.level}; expected numbers "
                "of at least 0 and a level between 0 and 1"
            )

    def intervals(self, values: np.ndarray, own: Sequence[str] = ()) -> dict[str, Any]:
        """The interval of each metric from resampled ones, shape `(resamples, metrics)`, and these settings; `own` are
        the names of components of one's own."""
        bounds = nested(interval(values, level=self.level).tolist(), own)
        return {"level": self.level, "resamples": self.resamples, "seed": self.seed, **bounds}


def resampled_metrics(
    tables: Sequence[RowCounts], settings: BootstrapSettings, *, on_rows: Callable[[int], None] = lambda rows: None
) -> list[np.ndarray]:
    """The metrics of resamples, rows drawn with replacement, as many as there are: for each table, shape
    `(resamples, metrics)`.

    The tables count the same rows, in the same order, under one or several models; they are drawn together.
    """
    rows, resamples = len(tables[0]), settings.resamples
    generator = np.random.default_rng(settings.seed)
    parts = list(chunks(rows))
    # Rows are drawn part by part, so that the statistics of one part only are held: first how many of each resample
    # fall into each part, then which.
    shares = [(part.stop - part.start) / rows for part in parts]
    drawn = generator.multinomial(rows, shares, size=resamples)
    sums = [np.zeros((resamples, width(table))) for table in tables]
    for number, part in enumerate(parts):
        statistics = [row_statistics(table.of(part)) for table in tables]
        size = part.stop - part.start
        for first in range(0, resamples, _AT_A_TIME):
            counts = drawn[first : first + _AT_A_TIME, number]
            times = np.empty((len(counts), size))
            for place, count in enumerate(counts):
                times[place] = np.bincount(generator.integers(0, size, count), minlength=size)
            for total, one in zip(sums, statistics, strict=True):
                total[first : first + _AT_A_TIME] += times @ one
        on_rows(part.stop)
    return [metrics_of_sums(total, np.full(resamples, rows)) for total in sums]


def interval(values: np.ndarray, *, level: float) -> np.ndarray:
    """The middle `level` of resampled values; shape `(resamples, metrics)` becomes `(metrics, 2)`."""
    outside = 50 * (1 - level)
    return np.percentile(values, [outside, 100 - outside], axis=0).T
