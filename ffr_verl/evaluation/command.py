"""`ffr-verl evaluate`: files in, tables and files out."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ffr_verl.errors import FFRError
from ffr_verl.evaluation.bootstrap import BootstrapSettings
from ffr_verl.evaluation.comparison import compare as compare_counts
from ffr_verl.evaluation.counts import FAULTS, RowCounts
from ffr_verl.evaluation.result import count_file, result_of
from ffr_verl.evaluation.reward_settings import read_reward_kwargs
from ffr_verl.evaluation.tables import comparison_tables, counted, result_tables
from ffr_verl.files import whole_or_nothing
from ffr_verl.fragments import AnswerStyle, MalformedReason
from ffr_verl.predictions import PredictionFormat, UnusableLines
from ffr_verl.rewards.ffr import RewardConfig

__all__ = ["evaluate_command", "repeated_rows", "require_ids"]

_LINES_SHOWN = 5
_REASONS_SHOWN = 3
_TEXT_OUTSIDE = FAULTS.index(MalformedReason.TEXT_OUTSIDE) + 1


def evaluate_command(
    predictions: Path,
    *,
    console: Console,
    compare: Path | None = None,
    json_file: Path | None = None,
    csv_file: Path | None = None,
    lenient: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    row_format: PredictionFormat = "ffr",
    style: AnswerStyle | None = None,
    reward_kwargs: Path | None = None,
) -> None:
    """Evaluate a file of predictions, show tables and write the files asked for; the options are those of the command.

    Raises:
        FFRError: for a file that cannot be read or written, and as `read_predictions`.
    """
    _refuse_to_overwrite([predictions, compare, reward_kwargs], [json_file, csv_file])
    settings = BootstrapSettings(resamples=resamples, seed=seed)
    reward = RewardConfig.from_kwargs({} if reward_kwargs is None else read_reward_kwargs(reward_kwargs))
    style = style or reward.answer_style
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())

    def warn(text: str) -> None:
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:

        def task(description: str, total: int) -> Callable[[int], None]:
            number = progress.add_task(description, total=max(total, 1))
            return lambda done: progress.update(number, completed=done)

        def counts_of(path: Path) -> tuple[RowCounts, UnusableLines]:
            skipped: list[str] = []

            def note(line: int, reason: str) -> None:
                if len(skipped) < _LINES_SHOWN:
                    skipped.append(f"{path}: line {line} left out: {reason}")

            unusable = UnusableLines(path, lenient=lenient, on_skipped=note)
            on_position = task(f"reading {path.name}", path.stat().st_size if path.is_file() else 0)
            counts = count_file(
                path, unusable, row_format=row_format, style=style, reward=reward, on_position=on_position
            )
            if compare is not None and row_format == "ffr":
                require_ids(path, counts)
            more = unusable.count - len(skipped)
            for line in [*skipped, *([f"{path}: {more:,} more lines left out"] if more else [])]:
                warn(line)
            return counts, unusable

        counts, unusable = counts_of(predictions)
        result = result_of(counts, skipped=unusable.count, bootstrap=settings, on_rows=task("resampling", len(counts)))
        comparison = None
        if compare is not None:
            others, unusable_others = counts_of(compare)
            on_rows = task("comparing", min(len(counts), len(others)))
            comparison = compare_counts(counts, others, bootstrap=settings, on_rows=on_rows)
    if reward_kwargs is not None:
        origin = {**result.reward_settings, "from": f"settings of {reward_kwargs}"}
        result = dataclasses.replace(result, reward_settings=origin)
    found: dict[str, Any] = result.to_dict()
    if comparison is not None:
        found["comparison"] = {
            "other": str(compare),
            "skipped": unusable_others.count,
            "unanswered": int(others.is_unanswered.sum()),
            **comparison.to_dict(),
        }
    # Before the tables: a pager or `head` that closes early takes nothing away.
    if json_file is not None:
        with whole_or_nothing([json_file]) as (temporary,):
            temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if csv_file is not None:
        with whole_or_nothing([csv_file]) as (temporary,):
            _write_csv(temporary, result.to_rows() + ([] if comparison is None else comparison.to_rows()))
    for table in result_tables(result, title=predictions.name):
        console.print(table)
    for line in _not_shown(predictions, unusable.count, counts, style):
        warn(line)
    if comparison is not None and compare is not None:
        for table in comparison_tables(comparison, title=f"{predictions.name} less {compare.name}"):
            console.print(table)
        console.print(
            f"{comparison.matched:,} rows are in both files, {comparison.only_first:,} in {predictions.name} only, "
            f"{comparison.only_second:,} in {compare.name} only",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        for line in _not_shown(compare, unusable_others.count, others, style):
            warn(line)
    for path in (json_file, csv_file):
        if path is not None:
            console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def require_ids(path: Path, counts: RowCounts) -> None:
    """Refuse to find rows again in another file when they do not say their dialogue.

    Raises:
        FFRError: names the first such line.
    """
    if counts.without_id is not None:
        raise FFRError(
            f"{path}: line {counts.without_id}: no dialogue_id, by which --compare finds the row in the other file; "
            "ms-swift keeps the column with --remove_unused_columns false"
        )


def repeated_rows(counts: RowCounts) -> str:
    """Says that rows come more than once; nothing where none does."""
    if not counts.repeated:
        return ""
    are = "row is a repeat" if counts.repeated == 1 else "rows are repeats"
    return (
        f"{counts.repeated:,} of {len(counts):,} {are} of another (same dialogue, query and gold answer), as in a "
        "file that was padded or appended to itself: they count again, and make the intervals too narrow"
    )


def _not_shown(path: Path, skipped: int, counts: RowCounts, style: AnswerStyle) -> Iterator[str]:
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


def _refuse_to_overwrite(sources: Sequence[Path | None], outputs: Sequence[Path | None]) -> None:
    read = {source.expanduser().resolve() for source in sources if source is not None}
    for output in outputs:
        if output is not None and output.expanduser().resolve() in read:
            raise FFRError(f"{output}: holds the predictions; choose another name for the result")
        if output is not None and output.is_dir():
            raise FFRError(f"{output}: a folder; give the name of a file")
        if output is not None and output.exists() and output.suffix.lower() not in (".json", ".csv"):
            raise FFRError(f"{output}: is there already; a result replaces only files named .json or .csv")
        if output is not None and output.parent.exists() and not output.parent.is_dir():
            raise FFRError(f"{output}: {output.parent} is no folder")
    if outputs[0] is not None and outputs[0] == outputs[1]:
        raise FFRError(f"{outputs[0]}: given for --json and for --csv; choose two names")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
