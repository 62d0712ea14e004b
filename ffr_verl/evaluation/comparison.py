"""Two models on the same rows: the difference of their metrics, with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ffr_verl.errors import FFRError
from ffr_verl.evaluation.bootstrap import BootstrapSettings, resampled_metrics
from ffr_verl.evaluation.counts import RowCounts
from ffr_verl.evaluation.row_statistics import chunks, metric_rows, metrics_of_sums, nested, row_statistics


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the rows that both answered."""

    # Rows that both answered: `dialogue_id`, query and gold answer are the same. Of rows that are there several times
    # the first is matched with the first, and so on.
    matched: int
    only_first: int  # rows of the first that the second lacks
    only_second: int
    first: Mapping[str, Any]  # the metrics on the matched rows
    second: Mapping[str, Any]
    difference: Mapping[str, Any]  # the first less the second
    # Of the difference, `(low, high)` for each number, from resamples in which both models are asked the same rows;
    # `None` when no resamples were asked for.
    intervals: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the file of `ffr-verl evaluate --compare --json`, under `comparison`."""
        return dataclasses.asdict(self)

    def to_rows(self) -> list[dict[str, Any]]:
        """Lines as of `EvaluationResult.to_rows`, with `comparison` as the break-down and `first`, `second` and
        `difference` as its parts."""
        lines = []
        for part in ("first", "second", "difference"):
            about = {"breakdown": "comparison", "part": part, "samples": self.matched}
            lines += metric_rows(about, getattr(self, part), self.intervals if part == "difference" else None)
        return lines


def compare(
    first: RowCounts,
    second: RowCounts,
    *,
    bootstrap: BootstrapSettings | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> Comparison:
    """Compare two models.

    Args:
        first: counts of one model's answers; `second` those of the other's.
        bootstrap: how intervals are made; `on_rows` is told how many rows the resamples have seen.

    Raises:
        FFRError: when no row is in both.

    Source: ours, a paired bootstrap of rows.
    """
    _, places, others = np.intersect1d(_numbered(first), _numbered(second), assume_unique=True, return_indices=True)
    if not len(places):
        raise FFRError(
            f"none of {len(first)} and {len(second)} rows is in both: dialogue_id, query and gold answer (labels) "
            "must be the same; compare answers to the same data"
        )
    order = np.argsort(places)
    tables = [first.of(places[order]), second.of(others[order])]
    settings = BootstrapSettings() if bootstrap is None else bootstrap
    ours, theirs = (_metrics(table) for table in tables)
    own = [one.name for one in first.reward.components]
    intervals = None
    if settings.resamples:
        one, other = resampled_metrics(tables, settings, on_rows=on_rows)
        intervals = settings.intervals(one - other, own)
    return Comparison(
        matched=len(places),
        only_first=len(first) - len(places),
        only_second=len(second) - len(places),
        first=nested(ours.tolist(), own),
        second=nested(theirs.tolist(), own),
        difference=nested((ours - theirs).tolist(), own),
        intervals=intervals,
    )


def require_ids(path: Path, counts: RowCounts) -> None:
    """Refuse to find rows again in another file when they do not say their dialogue."""
    if counts.without_id is not None:
        raise FFRError(
            f"{path}: line {counts.without_id}: no dialogue_id, by which --compare finds the row in the other file; "
            "ms-swift keeps the column as docs/other_trainers.md says"
        )


def _metrics(counts: RowCounts) -> np.ndarray:
    total = sum([row_statistics(counts.of(chunk)).sum(axis=0) for chunk in chunks(len(counts))])
    return metrics_of_sums(np.asarray(total), len(counts))


def _numbered(counts: RowCounts) -> np.ndarray:
    """The keys, made different where one stands several times: with its how-manieth it is mixed in."""
    keys = counts.keys
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    is_first = np.concatenate([[True], ranked[1:] != ranked[:-1]])
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(ranked)), 0))
    repeat = np.empty(len(keys), dtype=np.uint64)
    repeat[order] = (np.arange(len(ranked)) - starts).astype(np.uint64)
    return keys.view(np.uint64) ^ (repeat * np.uint64(0x9E3779B97F4A7C15))
