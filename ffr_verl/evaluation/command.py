"""`ffr-verl evaluate`: files in, tables and files out."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ffr_verl.errors import FFRError
from ffr_verl.evaluation.answered import PredictionFormat
from ffr_verl.evaluation.bootstrap import BootstrapSettings
from ffr_verl.evaluation.comparison import compare as compare_counts
from ffr_verl.evaluation.counts import FAULTS, RowCounts
from ffr_verl.evaluation.predictions import UnusableLines
from ffr_verl.evaluation.result import count_file, result_of
from ffr_verl.evaluation.tables import comparison_tables, counted, result_tables
from ffr_verl.files import whole_or_nothing
from ffr_verl.fragments import AnswerStyle, MalformedReason

__all__ = ["evaluate_command"]

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
    style: AnswerStyle = "plain",
) -> None:
    """Evaluate a file of predictions, show tables and write the files asked for.

    Args:
        predictions: the file.
        console: where tables and progress are shown.
        compare: another model's predictions.
        json_file: gets every number.
        csv_file: gets the metrics and those of the break-downs.
        lenient: leave out lines that cannot be used.
        resamples: for the intervals; 0 for none.
        seed: of the resamples.
        row_format: of both files.
        style: of the answers in both files.

    Raises:
        FFRError: for a file that cannot be read or written, and as `read_predictions`.
    """
    _refuse_to_overwrite([predictions, compare], [json_file, csv_file])
    settings = BootstrapSettings(resamples=resamples, seed=seed)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
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
            counts = count_file(
                path,
                unusable,
                row_format=row_format,
                style=style,
                with_keys=compare is not None,
                on_position=task(f"reading {path.name}", path.stat().st_size if path.is_file() else 0),
            )
            for line in skipped:
                console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
            if unusable.count > len(skipped):
                more = f"{path}: {unusable.count - len(skipped):,} more lines left out"
                console.print(more, style="yellow", markup=False, highlight=False, soft_wrap=True)
            return counts, unusable

        counts, unusable = counts_of(predictions)
        result = result_of(counts, skipped=unusable.count, bootstrap=settings, on_rows=task("resampling", len(counts)))
        comparison = None
        if compare is not None:
            others, unusable_others = counts_of(compare)
            comparison = compare_counts(
                counts, others, bootstrap=settings, on_rows=task("comparing", min(len(counts), len(others)))
            )
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
        _write(json_file, lambda file: file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8"))
    if csv_file is not None:
        lines = result.to_rows() + ([] if comparison is None else comparison.to_rows())
        _write(csv_file, lambda file: _write_csv(file, lines))
    for table in result_tables(result, title=predictions.name):
        console.print(table)
    _warn(console, predictions, unusable.count, counts, style)
    if comparison is not None:
        for table in comparison_tables(comparison, title=f"{predictions.name} less {compare and compare.name}"):
            console.print(table)
        console.print(
            f"{comparison.matched:,} rows are in both files, {comparison.only_first:,} in {predictions.name} only, "
            f"{comparison.only_second:,} in {compare and compare.name} only",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        _warn(console, compare, unusable_others.count, others, style)
    for path in (json_file, csv_file):
        if path is not None:
            console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def _warn(console: Console, path: Path | None, skipped: int, counts: RowCounts, style: AnswerStyle) -> None:
    """Say what the numbers of a file do not show."""
    lines = []
    if skipped:
        lines.append(f"{counted(skipped, 'line')} left out")
    if unanswered := int(counts.is_unanswered.sum()):
        lines.append(
            f"{unanswered:,} of {len(counts):,} rows have no answer, or no whole one (field error): 0 in macro and "
            "rewards"
        )
        reasons = list(counts.errors.items())
        lines += [f"  {count:,}: {reason}" for reason, count in reasons[:_REASONS_SHOWN]]
        if len(reasons) > _REASONS_SHOWN:
            lines.append(f"  and {len(reasons) - _REASONS_SHOWN:,} more reasons")
    around = int((counts.column("fault") == _TEXT_OUTSIDE).sum())
    if style == "plain" and around > len(counts) / 2:
        lines.append(
            f"{around:,} of {len(counts):,} answers have text around the ids; if that is "
            "<think>…</think><answer>…</answer>, give --answer-style reasoning"
        )
    if unread := int((counts.column("turns") == 0).sum()):
        lines.append(
            f"in {unread:,} of {len(counts):,} prompts there is no utterance: ids outside the dialogue are not "
            "counted there, and MCC takes 0 to 20 as all ids"
        )
    for line in lines:
        console.print(f"{path}: {line}", style="yellow", markup=False, highlight=False, soft_wrap=True)


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


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    with whole_or_nothing([path]) as (temporary,):
        write(temporary)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
