"""The head of the report: what `evaluate` found, with its intervals, as figures, tables and bars."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ffr_verl.errors import counted
from ffr_verl.evaluation.comparison import Comparison
from ffr_verl.evaluation.result import EvaluationResult
from ffr_verl.evaluation.row_statistics import AVERAGES
from ffr_verl.fragments import MalformedReason
from ffr_verl.metrics import Scores

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


# What the template unpacks. A table's line: name, cells; a cell: number, its interval, whether that leaves out 0.
# A chart: title, note, bars; a bar: label, number, length from 0 to 1, note.
Cell = tuple[str, str, bool]
Line = tuple[str, list[Cell]]
Bar = tuple[str, str, float, str]
BarChart = tuple[str, str, list[Bar]]

_MODALITIES = {"utterance": "utterances", "image": "images", "joint": "joint"}
_REWARDS = {
    "f1": "F1",
    "f1_utterances": "F1 utterances",
    "f1_images": "F1 images",
    "format": "format",
    "exact_match": "exact match",
}


def _at(values: Any, *path: str) -> Any:
    return functools.reduce(operator.getitem, path, values)


def _interval(result: EvaluationResult, *path: str) -> str:
    low, high = _at(result.intervals, *path)
    return f"{low:.3f} – {high:.3f}"


def figures(result: EvaluationResult) -> list[tuple[str, str, str]]:
    """The numbers at the head of the page: name, value and note of each."""
    level = f"{100 * _at(result.intervals, 'level'):g} % interval\n"
    faults, outside = result.malformed["any"], result.ids_outside["answers"]
    found = []
    for title, *path in (
        ("Joint F1, micro", "micro", "joint", "f1"),
        ("Utterance F1, micro", "micro", "utterance", "f1"),
        ("Image F1, micro", "micro", "image", "f1"),
        ("Joint MCC, micro", "micro", "joint", "mcc"),
        ("Macro F1 of the reward", "rewards", "f1"),
    ):
        value = _at(getattr(result, path[0]), *path[1:])
        found.append((title, f"{value:.3f}", f"{level}{_interval(result, *path)}"))
    note = f"{faults:,} of {counted(result.samples, 'row')}; {outside:,} with ids outside the dialogue"
    return [
        *found,
        ("Exact answers", f"{result.rewards['exact_match']:.1%}", "both lists equal to the gold's"),
        ("Answers with a fault", f"{faults / result.samples:.1%}", note),
    ]


def _table(cell: Callable[..., Cell]) -> list[Line]:
    """Precision, recall, F1 and MCC: micro and macro, utterances, images and joint."""
    return [
        (f"{average}, {title}", [cell(average, modality, name) for name in Scores._fields])
        for average in AVERAGES
        for modality, title in _MODALITIES.items()
    ]


def metric_table(result: EvaluationResult) -> list[Line]:
    """The metrics, as a table."""

    def cell(average: str, *path: str) -> Cell:
        return f"{_at(getattr(result, average), *path):.3f}", _interval(result, average, *path), False

    return _table(cell)


def difference_table(comparison: Comparison) -> list[Line]:
    """The metrics of these predictions less those of the others, on the rows that both have."""

    def cell(*path: str) -> Cell:
        value = _at(comparison.difference, *path)
        low, high = _at(comparison.intervals, *path)
        return f"{value:+.3f}", f"{low:+.3f} to {high:+.3f}", low > 0 or high < 0

    return _table(cell)


def overview_charts(result: EvaluationResult, *, coherence: float | None, settings: str) -> list[BarChart]:
    """Faults, rewards by the named settings with the mean `coherence`, and rows with and without a gold fragment."""
    counts = {reason: result.malformed.get(reason.value, 0) for reason in FAULTS}
    most = max(1, *counts.values())
    faults = [(FAULTS[reason][0], f"{count:,}", count / most, "") for reason, count in counts.items() if count]
    rewards = {_REWARDS.get(name, name): value for name, value in result.rewards.items()}
    if coherence is not None:
        rewards["coherence"] = coherence
    bars = [(title, f"{value:.3f}", min(1.0, max(0.0, value)), "") for title, value in rewards.items()]
    note = "Rows by the first fault of the answer." if faults else "No answer has one."
    return [
        ("Faults of answers", note, faults),
        ("Rewards", f"Mean over the rows; strict, as in training with {settings}.", bars),
        _breakdown(result, "gold", "Empty and other gold fragments"),
    ]


def breakdown_charts(result: EvaluationResult) -> list[BarChart]:
    """F1 by length of the dialogue, by size and by dispersion of the gold fragment."""
    return [
        _breakdown(result, "dialogue_length", "By turns of the dialogue"),
        _breakdown(result, "fragment_size", "By ids in the gold fragment"),
        _breakdown(result, "dispersion", "By dispersion of the gold fragment"),
    ]


def _breakdown(result: EvaluationResult, name: str, title: str) -> BarChart:
    scored = [(part, part.macro["joint"]["f1"]) for part in result.breakdowns[name]]
    bars = [(part.name, f"{value:.3f}", value, counted(part.samples, "row")) for part, value in scored]
    return title, "Joint F1, mean over the rows.", bars
