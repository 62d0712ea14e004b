"""The curves of a verl run, out of the files that its loggers write: `file` (JSONL) and `tensorboard`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ffr_verl.errors import FFRError
from ffr_verl.files import refuse_special

__all__ = ["TrainingCurves", "read_training"]

_WANTED = re.compile(r"ffr/reward/[^/]+/(?:mean|std|min|max)|critic/score/mean|val-[^/]+/.+/mean@\d+")
_EVENTS = "events.out.tfevents.*"
_HOW_TO_LOG = "train with trainer.logger=[console,file] (VERL_FILE_LOGGER_PATH says where) or with tensorboard"


class TrainingCurves(NamedTuple):
    """Curves of one run: for each name its `(step, value)`, in order of steps; and the files that were read."""

    metrics: dict[str, list[tuple[int, float]]]
    files: tuple[Path, ...]


def read_training(folder: Path, *, say: Callable[[str], None] = lambda text: None) -> TrainingCurves:
    """The reward curves of a run: `ffr/reward/*`, `critic/score/mean` and the means of `val-*`.

    The folder is looked through with its folders for `*.jsonl` of verl's file logger and for event files; or it is one
    such file. Where several files have a metric of one step, as after a resumption, the one changed last counts.

    Raises:
        FFRError: when there is no such folder, or nothing that could be drawn in it.
    """
    if not folder.exists():
        raise FFRError(f"--training {folder}: no such folder; give the one that holds the run's metrics")
    refuse_special(folder)
    found = [folder] if folder.is_file() else [*folder.rglob("*.jsonl"), *folder.rglob(_EVENTS)]
    found = [path for path in found if path.is_file()]
    metrics: dict[str, dict[int, float]] = {}
    files = []
    for path in sorted(found, key=lambda path: (path.stat().st_mtime, path)):
        reader = _json_lines if path.suffix == ".jsonl" else _event_files
        try:
            points = [point for point in reader(path) if _WANTED.fullmatch(point[0]) and math.isfinite(point[2])]
        except ImportError as error:
            say(f"{path}: left out: event files need the package tensorboard ({error}); pip install tensorboard")
            continue
        for name, step, value in points:
            metrics.setdefault(name, {})[step] = value
        files += [path] if points else []
    if not metrics:
        raise FFRError(
            f"--training {folder}: no reward curves in {len(found)} files; expected *.jsonl of verl's file logger "
            f"or {_EVENTS} with ffr/reward/*, critic/score/mean or val-*; {_HOW_TO_LOG}"
        )
    return TrainingCurves({name: sorted(metrics[name].items()) for name in sorted(metrics)}, tuple(files))


def _json_lines(path: Path) -> Iterator[tuple[str, int, float]]:
    """Metrics of verl's file logger; nothing from another JSONL file. A cut last line, of a running job, is left."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                entry: Any = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(entry, dict) or set(entry) != {"step", "data"} or not isinstance(entry["data"], dict):
                return
            if type(entry["step"]) is int:
                for name, value in entry["data"].items():
                    # NaN was written as null; a number beyond a float is no metric.
                    if type(value) is float or (type(value) is int and abs(value) < 2**63):
                        yield name, entry["step"], float(value)


def _event_files(path: Path) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(path), size_guidance={SCALARS: 0})
    events.Reload()
    for name in events.Tags()[SCALARS]:
        for event in events.Scalars(name):
            yield name, event.step, event.value
