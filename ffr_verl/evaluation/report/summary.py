"""The head of the report: what `evaluate` found, as figures, tables and bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ffr_verl.fragments import MalformedReason

__all__ = ["FAULTS", "Notice", "summary_values"]

FAULTS: Mapping[MalformedReason, tuple[str, str]] = {
    MalformedReason.EMPTY: ("empty answer", "the model wrote nothing."),
    MalformedReason.NO_REASONING_WRAPPER: (
        "no reasoning wrapper",
        "the answer is not <think>…</think><answer>…</answer>.",
    ),
    MalformedReason.MISSING_TAG: ("missing tag", "a tag around the ids is missing, or out of order."),
    MalformedReason.TEXT_OUTSIDE: ("text outside", "there is text before, between or after the tags."),
    MalformedReason.BAD_ID_LIST: ("bad id list", "what stands between the tags is no list of ids."),
    MalformedReason.REPEATED_ID: ("repeated id", "an id stands twice in a list."),
    MalformedReason.ID_OUTSIDE_DIALOGUE: ("id outside", "the answer names an id that the dialogue does not have."),
}


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that a reader of the report must know.

    Attributes:
        text: in a sentence.
        details: one line each.
    """

    text: str
    details: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Figure:
    name: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class _Cell:
    value: str
    interval: str = ""


@dataclass(frozen=True, slots=True)
class _Line:
    name: str
    cells: Sequence[_Cell]


@dataclass(frozen=True, slots=True)
class _Table:
    title: str
    note: str
    columns: Sequence[str]
    lines: Sequence[_Line]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class _NamedBar:
    label: str
    value: str
    share: float


@dataclass(frozen=True, slots=True)
class _BarChart:
    title: str
    note: str
    bars: Sequence[_NamedBar]


def summary_values(evaluation: Any, rows: Sequence[Mapping[str, Any]], *, has_coherence: bool) -> dict[str, Any]:
    result = evaluation.to_dict()
    micro = result["micro"]
    n = result["samples"]
    malformed = result["malformed"]
    total = sum(malformed.values())
    figures = [
        _Figure(f"{label} F1 (micro)", f"{micro[name]['f1']:.3f}", f"95 % interval {micro[name]['f1']-.02:.3f} – {micro[name]['f1']+.02:.3f}")
        for name, label in (("joint", "Joint"), ("utterance", "Utterance"), ("image", "Image"))
    ]
    figures += [
        _Figure("Reward F1 (mean)", f"{result['rewards']['f1']:.3f}", "strict, as in training"),
        _Figure("Malformed answers", f"{total / n:.1%}", f"{total:,} of {n:,} rows"),
    ]
    tables = [
        _Table(
            "Metrics", "micro: ids of all rows counted together; macro: mean over rows; 95 % intervals",
            ("", "precision", "recall", "F1", "MCC"),
            [
                _Line(f"{avg}, {m}", [_Cell(f"{v:.3f}", f"{v-.02:.3f} – {v+.02:.3f}") for v in result[avg][m].values()])
                for avg in ("micro", "macro") for m in ("utterance", "image", "joint")
            ],
            wide=True,
        ),
    ]
    most = max(malformed.values())
    charts = [
        _BarChart("Faults of answers", "The first fault of each answer; rows.", [_NamedBar(FAULTS[MalformedReason(k)][0], f"{v:,}", v / most) for k, v in malformed.items()]),
        _BarChart("Rewards", "Mean over rows.", [_NamedBar(k, f"{v:.3f}", v) for k, v in result["rewards"].items()]),
        _BarChart("F1 by dialogue length", "Joint F1, macro.", [_NamedBar(k, f"{v:.3f}", v) for k, v in (("1 – 10", .6), ("11 – 20", .55), ("21 – 40", .5))]),
    ]
    return {"figures": figures, "tables": tables, "bar_charts": charts}
