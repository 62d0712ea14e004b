"""The curves of verl runs, out of the files that its loggers write: `file` (JSONL) and `tensorboard`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ffr_verl.errors import FFRError
from ffr_verl.files import refuse_special

_EVENTS = "events.out.tfevents.*"
_HOW_TO_LOG = "train with trainer.logger=[console,file] (VERL_FILE_LOGGER_PATH says where) or with tensorboard"

Curve = list[tuple[int, float]]  # step and value, in order of steps


class Run(NamedTuple):
    """What one run logged."""

    name: str
    metrics: dict[str, Curve]
    files: tuple[Path, ...]


def files_of(runs: Sequence[Run]) -> list[Path]:
    """What was read of the runs."""
    return [path for run in runs for path in run.files]


class _Log(NamedTuple):
    place: Path  # that the run is named by
    files: tuple[Path, ...]
    metrics: dict[str, dict[int, float]]

    @property
    def steps(self) -> set[int]:
        return {step for values in self.metrics.values() for step in values}


def read_runs(places: Sequence[Path], *, say: Callable[[str], None] = lambda text: None) -> list[Run]:
    """The runs whose logs lie in folders, and in those below them, or are the given files.

    A log of verl's file logger (`*.jsonl`) is a run. One that begins later than at step 1 resumes the run before it,
    by time of the last change, that comes so far; of a step that both have the later file counts. Event files are read
    where a place has no such log; those of one folder are one run.

    Raises:
        FFRError: when a place is not there, or holds no metrics.
    """
    logs = [log for place in dict.fromkeys(places) for log in _logs_in(place, say)]
    names = short_names([log.place for log in logs])
    return [
        Run(name, {metric: sorted(log.metrics[metric].items()) for metric in sorted(log.metrics)}, log.files)
        for name, log in zip(names, logs, strict=True)
    ]


def short_names(paths: Sequence[Path]) -> list[str]:
    """The parts of paths by which they differ.

    Example:
        >>> short_names([Path("runs/a/logs"), Path("runs/b/logs")]), short_names([Path("runs/a")])
        (['a', 'b'], ['a'])
    """
    parts = [list(path.absolute().parts) for path in paths]
    for end in (-1, 0) if len(parts) > 1 else (0,):
        while all(len(one) > 1 for one in parts) and len({one[end] for one in parts}) == 1:
            for one in parts:
                del one[end]
    return ["/".join(one) for one in parts]


def _logs_in(place: Path, say: Callable[[str], None]) -> list[_Log]:
    if not place.exists():
        raise FFRError(f"--training {place}: no such folder; give the one that holds the run's metrics")
    refuse_special(place)
    found = [place] if place.is_file() else [*place.rglob("*.jsonl"), *place.rglob(_EVENTS)]
    found = sorted([path for path in found if path.is_file()], key=lambda path: (path.stat().st_mtime, path))
    runs: list[_Log] = []
    for path in [path for path in found if path.suffix == ".jsonl"]:
        log = _Log(path.with_suffix(""), (path,), _by_step(_json_lines(path)))
        if log.metrics:
            runs = _with_resumed(runs, log)
    if not runs:
        events: dict[Path, _Log] = {}
        for path in [path for path in found if path.suffix != ".jsonl"]:
            try:
                log = _Log(path.parent, (path,), _by_step(_event_file(path)))
            except ImportError as error:
                say(f"{path}: left out: event files need the package tensorboard ({error}); pip install tensorboard")
                continue
            events[path.parent] = _joined(events[path.parent], log) if path.parent in events else log
        runs = [log for log in events.values() if log.metrics]
    if not runs:
        raise FFRError(
            f"--training {place}: no metrics in {len(found)} files; expected *.jsonl of verl's file logger "
            f"or {_EVENTS}; {_HOW_TO_LOG}"
        )
    return sorted(runs, key=lambda log: log.place)


def _with_resumed(runs: list[_Log], log: _Log) -> list[_Log]:
    first = min(log.steps)
    for at in reversed(range(len(runs))):
        if first > 1 and min(runs[at].steps) < first <= max(runs[at].steps) + 1:
            return [*runs[:at], _joined(runs[at], log), *runs[at + 1 :]]
    return [*runs, log]


def _joined(one: _Log, later: _Log) -> _Log:
    names = [*one.metrics, *later.metrics]
    both = {name: {**one.metrics.get(name, {}), **later.metrics.get(name, {})} for name in names}
    return _Log(one.place, (*one.files, *later.files), both)


def _by_step(points: Iterator[tuple[str, int, float]]) -> dict[str, dict[int, float]]:
    metrics: dict[str, dict[int, float]] = {}
    for name, step, value in points:
        if math.isfinite(value):
            metrics.setdefault(name, {})[step] = value
    return metrics


def json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Those of a JSONL file that may still be written; lines that hold none, such as a cut last one, are left out."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                yield found


def _json_lines(path: Path) -> Iterator[tuple[str, int, float]]:
    """Metrics of verl's file logger; nothing from another JSONL file."""
    for entry in json_objects(path):
        if set(entry) != {"step", "data"} or not isinstance(entry["data"], dict):
            return
        if type(entry["step"]) is int:
            for name, value in entry["data"].items():
                # NaN was written as null; a number beyond a float is no metric.
                if type(value) is float or (type(value) is int and abs(value) < 2**63):
                    yield name, entry["step"], float(value)


def _event_file(path: Path) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(path), size_guidance={SCALARS: 0})
    events.Reload()
    for name in events.Tags()[SCALARS]:
        for event in events.Scalars(name):
            yield name, event.step, event.value
