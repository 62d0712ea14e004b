"""`ffr-verl report`: predictions into one HTML file."""

from __future__ import annotations

import dataclasses
import datetime
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ffr_verl.data.parquet_files import check_columns
from ffr_verl.data.parquet_files import images_root as recorded_images_root
from ffr_verl.errors import FFRError
from ffr_verl.evaluation.comparison import compare, require_ids
from ffr_verl.evaluation.counts import RowCounts
from ffr_verl.evaluation.report.charts import RunCharts, histogram, run_charts
from ffr_verl.evaluation.report.page import WORST_BELOW, page_data, render_page
from ffr_verl.evaluation.report.pictures import Pictures, make_pictures
from ffr_verl.evaluation.report.rows import UNANSWERED, ReportRows, reward_settings
from ffr_verl.evaluation.report.summary import (
    breakdown_charts,
    difference_table,
    figures,
    metric_table,
    overview_charts,
)
from ffr_verl.evaluation.report.training import files_of, read_runs
from ffr_verl.evaluation.result import count_records, result_of
from ffr_verl.evaluation.reward_settings import read_reward_kwargs
from ffr_verl.evaluation.tables import repeated_rows
from ffr_verl.files import check_output, whole_or_nothing
from ffr_verl.fragments import AnswerStyle
from ffr_verl.predictions import Prediction, PredictionFormat, read_predictions
from ffr_verl.rewards.coherence import CoherenceMode
from ffr_verl.rewards.ffr import open_scorer
from ffr_verl.settings import DataConfig

_TRAITS = (
    ("worst", f"F1 below {WORST_BELOW}"),
    ("malformed", "malformed"),
    ("empty", "empty gold"),
    ("outside", "ids outside"),
)
_MOST_LISTED = 50

Notice = tuple[str, list[str]]  # a sentence that a reader of the report must know, and its details, one a line


@dataclass(frozen=True, slots=True)
class ReportSettings:
    """What the report shows, and from where; `ffr-verl report --help` describes the options of these names."""

    images_root: Path | None = None  # `None` for the one recorded in `data`, or else that of the predictions
    data: Path | None = None
    embeddings: Path | None = None
    reward_kwargs: Path | None = None  # see `read_reward_kwargs`; the defaults otherwise
    coherence_mode: CoherenceMode | None = None  # that of `reward_kwargs` by default, as the style of the answers
    answer_style: AnswerStyle | None = None
    row_format: PredictionFormat = "ffr"
    compare: Path | None = None
    training: tuple[Path, ...] = ()
    lenient: bool = False
    most_rows: int = 5_000  # dialogues in the file; of more rows the worst are kept
    thumbnail_size: int = 240  # most pixels of a picture's longer side
    title: str = "Fragment retrieval report"


@dataclass(frozen=True, slots=True)
class ReportSummary:
    """What `write_report` did."""

    rows: int  # of the predictions
    shown: int  # of them in the file
    skipped: int  # lines left out
    pictures: int  # different pictures in the file
    missing: Counter[str]  # image paths by their problem
    size: int  # of the file, in bytes
    seconds: float


def write_report(
    predictions: Path,
    output: Path,
    settings: ReportSettings | None = None,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[str, int, int | None], None] = lambda phase, done, total: None,
) -> ReportSummary:
    """Write the report of a file of predictions: one HTML file that needs no other and no network.

    Args:
        predictions: see `read_predictions`.
        output: the HTML file; replaced with `force` only.
        settings: what to show.
        say: told what the user should know.
        on_progress: told the phase, how much of it is done, and of how much where that is known.

    Raises:
        FFRError: for predictions, a store or a training folder that cannot be used, or an output that exists.
    """
    started = time.monotonic()
    settings = settings or ReportSettings()
    others_files = (settings.data, settings.compare, settings.reward_kwargs)
    runs = read_runs(settings.training, say=say) if settings.training else []
    inputs = [predictions, *[file for file in others_files if file is not None], *files_of(runs)]
    check_output(output, force=force, example="report.html", inputs=inputs)
    if not output.parent.is_dir():
        raise FFRError(f"--output {output}: no folder {output.parent}; make it first")
    root = _images_root(predictions, settings)
    rewards = reward_settings(
        None if settings.reward_kwargs is None else read_reward_kwargs(settings.reward_kwargs),
        embeddings=None if settings.embeddings is None else str(settings.embeddings),
        coherence_mode=settings.coherence_mode,
        answer_style=settings.answer_style,
    )
    store = rewards.get("embeddings")
    if store is not None:
        try:
            open_scorer(store)
        except FFRError as error:
            raise FFRError(f"--embeddings {error}") from None
    skipped: list[str] = []
    f1: list[float] = []
    rows = ReportRows(rewards)

    def read(path: Path, skipped: list[str]) -> Iterator[Prediction]:
        return read_predictions(
            path,
            row_format=settings.row_format,
            lenient=settings.lenient,
            on_skipped=lambda line, reason: skipped.append(f"line {line}: {reason}"),
        )

    def counted(path: Path, predictions: Iterator[Prediction]) -> RowCounts:
        counts = count_records(predictions, style=rewards["answer_style"], reward_kwargs=rewards)
        if settings.compare is not None and settings.row_format == "ffr":
            require_ids(path, counts)
        return counts

    def scored() -> Iterator[Prediction]:
        for prediction in read(predictions, skipped):
            f1.append(rows.f1(prediction.rewarded, prediction.labels))
            on_progress("evaluating", len(f1), None)
            yield prediction

    counts = counted(predictions, scored())
    result = result_of(counts, skipped=len(skipped))
    bounds = result.intervals or {}
    intervals = f"{100 * bounds['level']:g} % intervals of {bounds['resamples']:,} resamples"
    if repeats := repeated_rows(counts):
        intervals += f"; {repeats}"
    notices, traits, keys = _unanswered(counts), list(_TRAITS), counts.keys.tolist()
    if counts.errors:
        traits.append((UNANSWERED, "no answer"))
    comparison: dict[str, Any] | None = None
    theirs: dict[int, deque[Prediction]] = {}
    if settings.compare is not None:
        left_out: list[str] = []
        name, others = settings.compare.name, counted(settings.compare, read(settings.compare, left_out))
        if left_out:
            say(f"{settings.compare}: {len(left_out):,} lines left out, the first is {left_out[0]}")
        notices += _unanswered(others, of=f" of {name}")
        traits.append(("worse", f"F1 below that of {name}"))
        compared = compare(counts, others)
        comparison = {"name": name, "matched": compared.matched, "lines": difference_table(compared)}
        theirs = _of_same_rows(read(settings.compare, []), others.keys.tolist(), wanted=set(keys))
    # All rows are shown, or those of least F1, earlier ones first where they are equal.
    kept = set(np.argsort(np.array(f1), kind="stable")[: settings.most_rows].tolist())
    for position, prediction in enumerate(read(predictions, [])):
        same = theirs.get(keys[position])
        other = same.popleft() if same else None  # of rows that are there several times the first is the first's
        if position in kept:
            rows.add(prediction, other)
        on_progress("reading dialogues", position + 1, len(f1))
    pictures = make_pictures(
        rows.image_names,
        root,
        size=settings.thumbnail_size,
        on_done=lambda done, total: on_progress("shrinking images", done, total),
    )
    if rows.image_names and not pictures.thumbnails:
        say(f"none of the images was found below {root}; --images-root says where they are")
    coherence = None
    if store is not None and len(rows.rows) == len(f1):
        coherence = float(np.mean([row["rewards"]["coherence"] for row in rows.rows]))
    named = "the defaults" if settings.reward_kwargs is None else f"the settings of {settings.reward_kwargs.name}"
    page = render_page(
        data=page_data(
            rows,
            pictures,
            most_reward=sum(rewards["weights"].values()),
            other=None if comparison is None else comparison["name"],
        ),
        charts=run_charts(runs) if runs else RunCharts([], []),
        pictures=[one._asdict() for one in pictures.thumbnails],
        title=settings.title,
        source=predictions.name,
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        summary={
            "samples": result.samples,
            "figures": figures(result),
            "metric_table": metric_table(result),
            "comparison": comparison,
            "intervals": intervals,
            "f1_bars": histogram(f1),
            "overview_charts": overview_charts(result, coherence=coherence, settings=named),
            "breakdown_charts": breakdown_charts(result),
        },
        runs=([], [], [run.name for run in runs]),
        files=[path.name for path in files_of(runs)],
        traits=traits,
        notices=[*_notices(len(f1), rows, pictures, skipped), *notices],
    )
    with whole_or_nothing([output]) as (temporary,):
        temporary.write_text(page, encoding="utf-8")
    return ReportSummary(
        len(f1),
        len(rows.rows),
        len(skipped),
        len(pictures.thumbnails),
        pictures.problems,
        output.stat().st_size,
        time.monotonic() - started,
    )


def _images_root(predictions: Path, settings: ReportSettings) -> Path:
    root = settings.images_root
    if root is None and settings.data is not None:
        check_columns([str(settings.data)], "rl")
        root = recorded_images_root([str(settings.data)], DataConfig(), option="--images-root FOLDER")
    if root is None:
        root = Path(os.path.realpath(predictions)).parent
    if not root.is_dir():
        raise FFRError(
            f"--images-root {root}: no such folder; give the one that the rows' image paths are relative to"
        )
    return Path(os.path.realpath(root))


def _notices(count: int, rows: ReportRows, pictures: Pictures, skipped: list[str]) -> list[Notice]:
    notices: list[Notice] = []
    if len(rows.rows) < count:
        text = f"The {len(rows.rows):,} rows of least F1 are shown below; the summary is of all {count:,}."
        notices.append((text, []))
    if skipped:
        notices.append((f"Lines that could not be used and count nowhere: {len(skipped):,}.", _some(skipped)))
    unread = [f"line {row['line']}" for row in rows.rows if rows.dialogues[row["dialogue"]].get("problem")]
    if unread:
        text = f"Rows that show their prompt, because no dialogue could be read out of it: {len(unread):,}."
        notices.append((text, _some(unread)))
    missing = [f"{name}: {found}" for name, found in pictures.of_name.items() if isinstance(found, str)]
    if missing:
        text = f"Images that could not be shown: {len(missing):,} of {len(pictures.of_name):,}."
        notices.append((text, _some(missing)))
    return notices


def _unanswered(counts: RowCounts, *, of: str = "") -> list[Notice]:
    if not counts.errors:
        return []
    text = (
        f"Rows{of} without an answer, or without a whole one, which count as 0 in macro and rewards: "
        f"{sum(counts.errors.values()):,}."
    )
    return [(text, _some([f"{count:,}: {reason}" for reason, count in counts.errors.items()]))]


def _of_same_rows(
    predictions: Iterator[Prediction], keys: Sequence[int], *, wanted: Collection[int]
) -> dict[int, deque[Prediction]]:
    """Another model's predictions by the key of their row, without what the page does not show."""
    found: dict[int, deque[Prediction]] = {}
    for key, prediction in zip(keys, predictions, strict=True):
        if key in wanted:
            slim = dataclasses.replace(prediction, messages=(), images=(), logprobs=(), extra={})
            found.setdefault(key, deque()).append(slim)
    return found


def _some(lines: list[str]) -> list[str]:
    rest = len(lines) - _MOST_LISTED
    return lines if rest <= 0 else [*lines[:_MOST_LISTED], f"and {rest:,} more"]
