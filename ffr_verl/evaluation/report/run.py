"""`ffr-verl report --training`: what a run does, as a page: its curves, and the answers that it wrote down."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ffr_verl.errors import FFRError
from ffr_verl.evaluation.report.charts import run_charts, run_table
from ffr_verl.evaluation.report.page import page_data, render_page
from ffr_verl.evaluation.report.pictures import make_pictures
from ffr_verl.evaluation.report.rollouts import read_rollouts
from ffr_verl.evaluation.report.rows import UNANSWERED, ReportRows, reward_settings
from ffr_verl.evaluation.report.training import files_of, read_runs
from ffr_verl.files import check_output, whole_or_nothing
from ffr_verl.fragments import AnswerStyle

_TRAITS = (
    ("malformed", "malformed answers"),
    ("flat", "no spread"),
    ("empty", "empty gold"),
    ("outside", "ids outside"),
    (UNANSWERED, "no answer"),
)


@dataclass(frozen=True, slots=True)
class RunPageSettings:
    """What a run's page shows; `ffr-verl report --help` describes the options of these names."""

    training: tuple[Path, ...]
    rollouts: tuple[Path, ...] = ()  # those of `training` by default
    images_root: Path | None = None
    answer_style: AnswerStyle | None = None
    most_rows: int = 5_000
    thumbnail_size: int = 240
    title: str = "Training run"
    follow: int = 0  # seconds after which the page loads itself again; 0 for never


@dataclass(frozen=True, slots=True)
class RunPageSummary:
    """What `write_run_page` did."""

    runs: int
    charts: int
    groups: int
    size: int  # of the file, in bytes
    seconds: float


def write_run_page(
    output: Path,
    settings: RunPageSettings,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> RunPageSummary:
    """Write the page of one or more runs: one HTML file that needs no other and no network.

    Raises:
        FFRError: for a folder without metrics, or an output that exists and shall not be replaced (`force`).
    """
    started = time.monotonic()
    runs = read_runs(settings.training, say=say)
    check_output(output, force=force, example="run.html", inputs=files_of(runs))
    charts = run_charts(runs)
    rows = ReportRows(reward_settings(answer_style=settings.answer_style))
    places = settings.rollouts or settings.training
    for place in settings.rollouts:
        if not place.is_dir():
            raise FFRError(f"--rollouts {place}: no such folder; give one that verl writes STEP.jsonl into")
    found = read_rollouts([place for place in places if place.is_dir()], rows, most=settings.most_rows)
    root = settings.images_root or Path()
    if not root.is_dir():
        raise FFRError(f"--images-root {root}: no such folder; give the one of the training data's images")
    pictures = make_pictures(rows.image_names, root, size=settings.thumbnail_size)
    names = [run.name for run in runs]
    page = render_page(
        data=page_data(rows, pictures, steps=found.steps),
        charts=charts,
        pictures=[one._asdict() for one in pictures.thumbnails],
        title=settings.title,
        source=", ".join(names),
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S"),
        runs=(*run_table(runs), names),
        files=[path.name for path in files_of(runs)],
        traits=_TRAITS,
        steps=found.steps,
        notices=found.notices,
        follow=settings.follow,
    )
    with whole_or_nothing([output]) as (temporary,):
        temporary.write_text(page, encoding="utf-8")
    count = sum(len(section.charts) for section in charts.sections)
    return RunPageSummary(len(runs), count, len(rows.rows), output.stat().st_size, time.monotonic() - started)
