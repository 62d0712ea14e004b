"""`ffr-verl evaluate`: files in, tables and files out."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ffr_verl.cli.console import bar, console, say, warn, wrote
from ffr_verl.cli.options import Compare, Force, RewardedStyle, RewardKwargs, RowFormat
from ffr_verl.errors import FFRError
from ffr_verl.files import check_output, is_same_file, whole_or_nothing

if TYPE_CHECKING:
    from ffr_verl.evaluation.counts import RowCounts

_LINES_SHOWN = 5


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="JSONL of predictions, gzipped or not; or a JSON list.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every number there, as JSON.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the metrics there, break-downs too.")] = None,
    compare: Compare = None,
    lenient: Annotated[
        bool, typer.Option("--lenient", help="Leave out lines that cannot be used, and count them.")
    ] = False,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples for the 95 % intervals; 0 for none.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resamples.")] = 0,
    row_format: RowFormat = "ffr",
    answer_style: RewardedStyle = None,
    reward_kwargs: RewardKwargs = None,
    force: Force = False,
) -> None:
    """Say how good predictions are, and where they fail.

    Precision, recall, F1 and MCC, with intervals, and faults of the answers. Micro averages are the published ones;
    docs/evaluation.md defines every number. With --compare the difference is shown too, on the rows that both files
    have (dialogue_id, query and gold answer are the same).

    Example: ffr-verl evaluate pred.jsonl --compare baseline.jsonl --json result.json
    """
    from rich.progress import TaskProgressColumn

    from ffr_verl.evaluation.bootstrap import BootstrapSettings
    from ffr_verl.evaluation.comparison import compare as compare_counts
    from ffr_verl.evaluation.comparison import require_ids
    from ffr_verl.evaluation.result import count_file, result_of
    from ffr_verl.evaluation.reward_settings import read_reward_kwargs
    from ffr_verl.evaluation.tables import comparison_tables, not_shown, result_tables
    from ffr_verl.predictions import UnusableLines
    from ffr_verl.rewards.ffr import RewardConfig

    _check_outputs([predictions, compare, reward_kwargs], {"--json": json_file, "--csv": csv_file}, force=force)
    settings = BootstrapSettings(resamples=bootstrap, seed=seed)
    reward = RewardConfig.from_kwargs({} if reward_kwargs is None else read_reward_kwargs(reward_kwargs))
    style = answer_style or reward.answer_style
    with bar(TaskProgressColumn()) as progress:

        def task(description: str, total: int) -> Callable[[int], None]:
            number = progress.add_task(description, total=max(total, 1))
            return lambda done: progress.update(number, completed=done)

        def counts_of(path: Path) -> tuple[RowCounts, int]:
            def note(line: int, reason: str) -> None:
                if len(skipped) < _LINES_SHOWN:
                    skipped.append(f"{path}: line {line} left out: {reason}")

            skipped: list[str] = []
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
            return counts, unusable.count

        counts, skipped = counts_of(predictions)
        result = result_of(counts, skipped=skipped, bootstrap=settings, on_rows=task("resampling", len(counts)))
        if compare is not None:
            others, skipped_others = counts_of(compare)
            on_rows = task("comparing", min(len(counts), len(others)))
            comparison = compare_counts(counts, others, bootstrap=settings, on_rows=on_rows)
    if reward_kwargs is not None:
        origin = {**result.reward_settings, "from": f"settings of {reward_kwargs}"}
        result = dataclasses.replace(result, reward_settings=origin)
    found, rows = result.to_dict(), result.to_rows()
    if compare is not None:
        unanswered = int(others.is_unanswered.sum())
        about = {"other": str(compare), "skipped": skipped_others, "unanswered": unanswered}
        found["comparison"] = {**about, **comparison.to_dict()}
        rows += comparison.to_rows()
    # Before the tables: a pager or `head` that closes early takes nothing away.
    if json_file is not None:
        with whole_or_nothing([json_file], mend="give another --json") as (temporary,):
            temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if csv_file is not None:
        with (
            whole_or_nothing([csv_file], mend="give another --csv") as (temporary,),
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    for table in result_tables(result, title=predictions.name):
        console.print(table)
    for line in not_shown(predictions, skipped, counts, style):
        warn(line)
    if compare is not None:
        for table in comparison_tables(comparison, title=f"{predictions.name} less {compare.name}"):
            console.print(table)
        say(
            f"{comparison.matched:,} rows are in both files, {comparison.only_first:,} in {predictions.name} only, "
            f"{comparison.only_second:,} in {compare.name} only"
        )
        for line in not_shown(compare, skipped_others, others, style):
            warn(line)
    for path in (json_file, csv_file):
        if path is not None:
            wrote(path)


def _check_outputs(sources: Sequence[Path | None], outputs: Mapping[str, Path | None], *, force: bool) -> None:
    given = {option: path for option, path in outputs.items() if path is not None}
    for option, path in given.items():
        check_output(path, force=force, example=f"result.{option.strip('-')}", inputs=sources, option=option)
        if path.parent.exists() and not path.parent.is_dir():
            raise FFRError(f"{path}: {path.parent} is no folder")
    if len(given) > 1 and is_same_file(*given.values()):
        raise FFRError(f"{given['--json']}: given for --json and for --csv; choose two names")
