"""A result for the terminal: tables, and what they do not show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ffr_verl.errors import counted, printable
from ffr_verl.evaluation.comparison import Comparison
from ffr_verl.evaluation.counts import FAULTS, RowCounts
from ffr_verl.evaluation.result import EvaluationResult
from ffr_verl.evaluation.row_statistics import AVERAGES, MODALITIES
from ffr_verl.fragments import AnswerStyle, MalformedReason
from ffr_verl.metrics import Scores

_REASONS_SHOWN = 3
_TEXT_OUTSIDE = FAULTS.index(MalformedReason.TEXT_OUTSIDE) + 1


def result_tables(result: EvaluationResult, *, title: str) -> Iterator[Table]:
    """Metrics, rewards, faults and break-downs."""
    intervals = result.intervals
    level = f", with {intervals['level']:.0%} intervals" if intervals else ""
    averages = {"micro": result.micro, "macro": result.macro}
    heading = f"{title}: {counted(result.samples, 'answer')}{level}"
    yield _metrics_table(averages, intervals, title=_as_it_stands(heading))
    yield _answers_table(result.to_dict(), intervals)
    settings = ", ".join(f"{name} {value}" for name, value in result.reward_settings.items() if name != "from")
    origin = result.reward_settings["from"]
    heading = f"mean rewards (macro, strict), as verl's validation reports them, with the {origin}: {settings}"
    yield _rewards_table(result.rewards, intervals, title=_as_it_stands(heading))
    yield _faults_table(result)
    yield _breakdowns_table(result)


def _as_it_stands(text: str) -> str:
    return escape(printable(text))


def comparison_tables(comparison: Comparison, *, title: str) -> Iterator[Table]:
    """Differences of the metrics and of the rewards, and what they are differences of."""
    found = comparison.intervals
    level = f"its {found['level']:.0%} interval, " if found else ""
    heading = f"{title}: difference on {counted(comparison.matched, 'row')}, below it {level}both values"
    both = (comparison.first, comparison.second)
    yield _metrics_table(comparison.difference, found, title=_as_it_stands(heading), of=both)
    yield _answers_table(comparison.difference, found, of=both)
    rewards = (comparison.first["rewards"], comparison.second["rewards"])
    yield _rewards_table(comparison.difference["rewards"], found, title="difference of mean rewards", of=rewards)


def _table(title: str, left: Sequence[str], right: Sequence[str], *, no_wrap: bool = True, **options: Any) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, **options)
    for names, side in ((left, "left"), (right, "right")):
        for name in names:
            table.add_column(name, justify=side, no_wrap=no_wrap)  # type: ignore[arg-type]
    return table


def _metrics_table(
    averages: Mapping[str, Any], intervals: Any, *, title: str, of: tuple[Mapping[str, Any], ...] = ()
) -> Table:
    # The differences fit into 80 characters.
    table = _table(title, ("", ""), Scores._fields, pad_edge=False, show_edge=False, collapse_padding=True)
    for average in AVERAGES:
        for modality in MODALITIES:
            values = averages[average][modality]
            bounds = intervals[average][modality] if intervals else {}
            cells = [
                _cell(values[name], bounds.get(name), of=[one[average][modality][name] for one in of])
                for name in Scores._fields
            ]
            table.add_row(average if modality == MODALITIES[0] else "", modality, *cells)
    return table


def _rewards_table(
    rewards: Mapping[str, float], intervals: Any, *, title: str, of: tuple[Mapping[str, float], ...] = ()
) -> Table:
    table = _table(title, (), tuple(rewards), no_wrap=False, pad_edge=False, show_edge=False, collapse_padding=True)
    bounds = intervals["rewards"] if intervals else {}
    table.add_row(*[_cell(rewards[name], bounds.get(name), of=[one[name] for one in of]) for name in rewards])
    return table


_ANSWERS_LINES = {
    "utterances named, a row": ("answers", "utterances"),
    "images named, a row": ("answers", "images"),
    "empty": ("answers", "empty"),
    "malformed": ("answers", "malformed"),
    "ids outside the dialogue": ("answers", "outside"),
    "macro f1, gold with utterances": ("macro_where_gold", "utterance"),
    "macro f1, gold with images": ("macro_where_gold", "image"),
}


def _answers_table(values: Mapping[str, Any], intervals: Any, *, of: tuple[Mapping[str, Any], ...] = ()) -> Table:
    """What answers name beside what is gold."""
    columns = "difference" if of else "answers", "interval" if intervals else "", "both" if of else "golds"
    table = _table("answers beside their golds", ("",), columns, pad_edge=False, show_edge=False)
    sign = "+" if of else ""
    for title, (group, name) in _ANSWERS_LINES.items():
        low, high = intervals[group][name] if intervals else ("", "")
        gold = values[group].get(f"gold_{name}")
        table.add_row(
            title,
            f"{values[group][name]:{sign}.3f}",
            f"{low:{sign}.3f} {high:{sign}.3f}" if intervals else "",
            " | ".join([f"{one[group][name]:.3f}" for one in of]) if of else "" if gold is None else f"{gold:.3f}",
        )
    return table


def _breakdowns_table(result: EvaluationResult) -> Table:
    columns = ("answers", "micro\nf1", "macro\nf1", "utter-\nances", "images", "exact", "faults")
    table = _table("where they fail", ("",), columns, pad_edge=False)
    for name, parts in result.breakdowns.items():
        table.add_row(f"[bold]{name.replace('_', ' ')}[/bold]")
        for part in parts:
            table.add_row(
                f"  {part.name}",
                f"{part.samples:,}",
                # Without a gold id there is no recall, and the micro f1 says nothing.
                "-" if part.name in ("none", "empty", "no utterances") else f"{part.micro['joint']['f1']:.3f}",
                f"{part.macro['joint']['f1']:.3f}",
                f"{part.macro['utterance']['f1']:.3f}",
                f"{part.macro['image']['f1']:.3f}",
                f"{part.rewards['exact_match']:.1%}",
                f"{part.malformed / part.samples:.1%}",
            )
    return table


def _faults_table(result: EvaluationResult) -> Table:
    table = _table("faults of answers, the first of each", ("fault",), ("answers", ""), no_wrap=False)
    for name, count in result.malformed.items():
        if count or name == "any":
            table.add_row(name, f"{count:,}", f"{count / result.samples:.1%}")
    outside = result.ids_outside
    if outside["answers"]:
        table.caption = (
            f"{outside['utterance']:,} utterance and {outside['image']:,} image ids in {outside['answers']:,} answers "
            "are not of the dialogue"
        )
    return table


def _cell(value: float, bounds: Any, *, of: Sequence[float] = ()) -> str:
    """A value, its interval and, of a difference, the two values."""
    sign = "+" if of else ""
    lines = [f"{value:{sign}.3f}"]
    if bounds is not None:
        low, high = bounds
        lines.append(f"[dim]{low:{sign}.3f} {high:{sign}.3f}[/dim]" if of else f"[dim]{low:.3f}–{high:.3f}[/dim]")
    if of:
        lines.append("[dim]{:.3f} | {:.3f}[/dim]".format(*of))
    return "\n".join(lines)


def repeated_rows(counts: RowCounts) -> str:
    """Says that rows come more than once; nothing where none does."""
    if not counts.repeated:
        return ""
    are = "row is a repeat" if counts.repeated == 1 else "rows are repeats"
    return (
        f"{counts.repeated:,} of {len(counts):,} {are} of another (same dialogue, query and gold answer), as in a "
        "file that was padded or appended to itself: they count again, and make the intervals too narrow"
    )


def not_shown(path: Path, skipped: int, counts: RowCounts, style: AnswerStyle) -> Iterator[str]:
    """What the numbers of a file do not show."""
    if skipped:
        yield f"{path}: {counted(skipped, 'line')} left out"
    if repeats := repeated_rows(counts):
        yield f"{path}: {repeats}"
    if unanswered := int(counts.is_unanswered.sum()):
        yield (
            f"{path}: {unanswered:,} of {len(counts):,} rows have no answer, or no whole one (field error): 0 in "
            "macro and rewards"
        )
        reasons = list(counts.errors.items())
        for reason, count in reasons[:_REASONS_SHOWN]:
            yield f"{path}:   {count:,}: {reason}"
        if len(reasons) > _REASONS_SHOWN:
            yield f"{path}:   and {len(reasons) - _REASONS_SHOWN:,} more reasons"
    around = int((counts.column("fault") == _TEXT_OUTSIDE).sum())
    if style == "plain" and around > len(counts) / 2:
        yield (
            f"{path}: {around:,} of {len(counts):,} answers have text around the ids; if that is "
            "<think>…</think><answer>…</answer>, give --answer-style reasoning"
        )
    if unread := int((counts.column("turns") == 0).sum()):
        yield (
            f"{path}: in {unread:,} of {len(counts):,} prompts there is no utterance: ids outside the dialogue are "
            "not counted there, and MCC takes 0 to 20 as all ids"
        )
