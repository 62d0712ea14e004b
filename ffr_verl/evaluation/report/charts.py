"""The charts of runs: which curve stands where, under which name; uPlot draws them in the page."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ffr_verl.evaluation.report.training import Curve, Run
from ffr_verl.rewards.table import REWARDS

_MOST_POINTS = 400
_HELD_OUT = r"val-[^/]+/(?P<source>.+)/"
_JOINT = _HELD_OUT + "micro_joint_f1/mean@1"
_VALIDATION, _REWARDS, _POLICY, _ANSWERS = "Validation", "Rewards", "Policy", "Faults and sizes of answers"
_CURRICULUM, _OTHERS = "Groups and curriculum", "Everything else"
_SECTIONS = (_VALIDATION, _REWARDS, _POLICY, _ANSWERS, _CURRICULUM, _OTHERS)
# A metric, its section, its chart, its name there, and the axis; the first pattern that fits. What none fits is a
# chart of its own.
# fmt: off
_TABLE = (
    (_HELD_OUT + r"micro_(?P<name>[a-z]+)_f1/mean@1", _VALIDATION, "Micro F1", "{name}", "published micro F1"),
    (_HELD_OUT + r"micro_(?P<name>[a-z]+)_mcc/mean@1", _VALIDATION, "Micro MCC", "{name}", "published micro MCC"),
    (_HELD_OUT + r"(?P<name>(?:predicted|gold)_[a-z]+)/mean@1", _ANSWERS, "Ids, held-out", "{name}", "ids a row"),
    (_HELD_OUT + r"(?P<name>[^/]+)/mean@1", _REWARDS, "{name}", "held-out", "reward"),
    (r"ffr/reward/(?P<name>[^/]+)/mean", _REWARDS, "{name}", "training answers", "reward"),
    (r"(?P<name>critic/score/mean)", _REWARDS, "{name}", "training answers", "reward"),
    (r"val/(?P<name>loss)", _POLICY, "SFT: {name}", "held-out rows", "{name}"),
    (r"train/(?P<name>.+)", _POLICY, "SFT: {name}", "training rows", "{name}"),
    (r"actor/kl_loss", _POLICY, "KL to the reference", "", "KL, nats a token"),
    (r"actor/ppo_kl", _POLICY, "KL of the update", "", "KL, nats a token"),
    (r"actor/entropy", _POLICY, "Entropy", "", "entropy, nats a token"),
    (r"actor/grad_norm", _POLICY, "Gradient norm", "", "norm"),
    (r"actor/lr", _POLICY, "Learning rate", "", "rate"),
    (r"actor/(?P<name>(?:pg_)?loss)", _POLICY, "Loss", "{name}", "loss"),
    (r"response_length/(?P<name>mean|min|max)", _POLICY, "Length of answers", "{name}", "tokens"),
    (r"response_length/clip_ratio", _POLICY, "Answers at the length limit", "", "share of answers"),
    (r"ffr/malformed/(?P<name>.+)", _ANSWERS, "Malformed answers", "{name}", "share of answers"),
    (r"ffr/cut_off", _ANSWERS, "Answers cut off", "", "share of answers"),
    (r"ffr/missing_embeddings", _ANSWERS, "Ids without a vector", "", "ids an answer"),
    (r"ffr/size/(?P<name>.+)", _ANSWERS, "Ids", "{name}", "ids a row"),
    (r"ffr/strata/(?P<of>.+)/(?P<name>[^/]+)", _ANSWERS, "Ids, {of}", "{name}", "ids a row"),
    (r"ffr/micro/(?P<name>.+)", _ANSWERS, "Micro F1 of training answers", "{name}", "micro F1"),
    (r"ffr/groups/without_spread", _CURRICULUM, "Groups without spread", "", "share of groups"),
    (r"ffr/groups/flat_in_f1_only", _CURRICULUM, "Groups flat in F1 only", "", "share of groups"),
    (r"ffr/curriculum/share/(?P<name>.+)", _CURRICULUM, "Rows by level", "{name}", "share of rows"),
    (r"ffr/curriculum/stratum/(?P<name>.+)", _CURRICULUM, "Rows by stratum", "{name}", "share of rows"),
    (r"ffr/curriculum/(?P<name>.+)", _CURRICULUM, "Curriculum: {name}", "", "{name}"),
)
# fmt: on
_PLACES = [(re.compile(pattern), place) for pattern, *place in _TABLE]
# Names of one matter each, of which several runs are overlaid as they stand.
_COMMON = ("", "training answers", "training rows", "held-out", "held-out rows")
_BAND = re.compile(r"ffr/reward/[^/]+/(?:std|min|max)")
_FIRST = (
    *("Micro F1: joint", "joint", "score", "reward", *[key for reward in REWARDS.values() for key in reward.keys]),
    *("SFT: loss", "KL to the reference", "Entropy", "Length of answers", "Gradient norm", "Malformed answers", "any"),
)


class Chart(NamedTuple):
    """Curves that are drawn together."""

    title: str
    lines: list[str]  # of each curve its name, and its first, last and highest value
    data: dict[str, Any]  # for the script: the axis' name, steps, and series


class Section(NamedTuple):
    """Charts of one matter; those of a folded one are drawn when it is opened."""

    title: str
    is_folded: bool
    charts: list[Chart]


class RunCharts(NamedTuple):
    """What the page shows of runs."""

    sections: list[Section]
    constants: list[tuple[str, list[str]]]  # metrics with one value, and that of each run


class _Series(NamedTuple):
    name: str
    run: int
    is_held_out: bool
    curve: Curve
    band: tuple[Curve, Curve] | None


def histogram(values: Sequence[float], *, bins: int = 10) -> list[tuple[str, str, float, str]]:
    """How many values lie in each of equal bins of [0, 1], as bars; the last one holds 1."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, math.floor(value * bins + 1e-9)))] += 1
    highest = max([*counts, 1])
    return [(f"{k / bins:.1f} – {(k + 1) / bins:.1f}", f"{n:,}", n / highest, "") for k, n in enumerate(counts)]


def _number(value: float) -> str:
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.3g}"


def run_charts(runs: Sequence[Run]) -> RunCharts:
    """The curves of the runs in their charts; several runs are overlaid, each metric in a chart of its own.

    Example:
        >>> curves = {"ffr/reward/f1/mean": [(1, 0.2), (2, 0.4)], "val-aux/a/f1/mean@1": [(2, 0.3)]}
        >>> [section] = run_charts([Run("mine", curves, ())]).sections
        >>> [(chart.title, chart.lines) for chart in section.charts]
        [('f1', ['training answers: first 0.200, last 0.400, highest 0.400', 'held-out: 0.300'])]
    """
    found: dict[tuple[str, str, str], list[_Series]] = {}
    constants: dict[str, list[str]] = {}
    names = dict.fromkeys(name for run in runs for name in run.metrics if not _BAND.fullmatch(name))
    if all("ffr/reward/score/mean" in run.metrics for run in runs if "critic/score/mean" in run.metrics):
        names.pop("critic/score/mean", None)  # the same numbers
    sources = {source for name in names if (source := _place(name)[-1])}
    owners: dict[tuple[str, str], set[int]] = {}
    for number, run in enumerate(runs):
        for name in run.metrics:
            owners.setdefault(_place(name)[:2], set()).add(number)
    charted = Counter(_place(name)[:2] for name in names)
    longest = max([len(curve) for run in runs for curve in run.metrics.values()], default=0)
    for name in names:
        curves = [run.metrics.get(name, []) for run in runs]
        section, title, label, axis, source = _place(name)
        # One validation of a component is a number, not a chart.
        least = 1 if section == _REWARDS and charted[section, title] == 1 and longest > 1 else 2
        if all(len(curve) >= least and len({value for _, value in curve}) == 1 for curve in curves if curve):
            constants[name] = [_number(curve[0][1]) if curve else "–" for curve in curves]
            continue
        is_shared, is_held_out = len(owners[section, title]) > 1, name.startswith("val")
        of = f" ({source})" if source and len(sources) > 1 else ""
        if is_shared and label not in _COMMON:
            title, label = f"{title}: {label}", ""
        for number, (run, curve) in enumerate(zip(runs, curves, strict=True)):
            if curve:
                text = f"{run.name}{', held-out' * is_held_out}" if is_shared else label or title
                band = None if is_shared else _band(run, name)
                one = _Series(text + of, number, is_held_out, curve, band)
                found.setdefault((section, title, axis), []).append(one)
    rank = {title: position for position, title in enumerate(_FIRST)}
    charts: dict[str, list[Chart]] = {section: [] for section in _SECTIONS}
    for section, title, axis in sorted(found, key=lambda key: (rank.get(key[1], len(rank)), key[1])):
        series = sorted(
            found[section, title, axis], key=lambda one: (one.is_held_out, one.run, rank.get(one.name, len(rank)))
        )
        charts[section].append(_chart(title, axis, series))
    sections = [Section(title, title == _OTHERS, charts[title]) for title in _SECTIONS if charts[title]]
    return RunCharts(sections, sorted(constants.items()))


def _place(name: str) -> tuple[str, str, str, str, str]:
    """Section, chart, name in it, axis and data source of a metric."""
    for pattern, (section, *texts) in _PLACES:
        if match := pattern.fullmatch(name):
            groups = match.groupdict()
            title, label, axis = (text.format(**groups) for text in texts)
            return section, title, label, axis, groups.get("source", "")
    return _OTHERS, name, "", name.rpartition("/")[2], ""


def _band(run: Run, name: str) -> tuple[Curve, Curve] | None:
    """One standard deviation around a reward's mean, within the least and greatest value of the step."""
    stem = name.removesuffix("mean")
    std, least, most = (dict(run.metrics.get(f"{stem}{kind}", ())) for kind in ("std", "min", "max"))
    known = [(step, value, std[step]) for step, value in run.metrics[name] if step in std]
    if not known:
        return None
    lower = [(step, max(value - spread, least.get(step, -math.inf))) for step, value, spread in known]
    return lower, [(step, min(value + spread, most.get(step, math.inf))) for step, value, spread in known]


def _chart(title: str, axis: str, series: Sequence[_Series]) -> Chart:
    by_run = len({one.run for one in series}) > 1
    steps = sorted({step for one in series for step, _ in one.curve})
    size = math.ceil(len(steps) / _MOST_POINTS)  # more are means of neighbours, for no screen shows them
    places = [steps[at : at + size] for at in range(0, len(steps), size)]
    bucket = {step: at for at, some in enumerate(places) for step in some}

    def spread(curve: Curve) -> list[float | None]:
        values: list[list[float]] = [[] for _ in places]
        for step, value in curve:
            values[bucket[step]].append(value)
        return [float(f"{np.mean(some):.5g}") if some else None for some in values]

    lines, drawn = [], []
    for at, one in enumerate(series):
        numbers = [value for _, value in one.curve]
        many = f"first {_number(numbers[0])}, last {_number(numbers[-1])}, highest {_number(max(numbers))}"
        lines.append(f"{one.name}: {many if len(numbers) > 1 else _number(numbers[0])}")
        drawn.append({
            "name": one.name, "colour": (one.run if by_run else at) % 8, "heldOut": one.is_held_out,
            "y": spread(one.curve), "band": one.band and [spread(curve) for curve in one.band],
        })  # fmt: skip
    x = [round(float(np.mean(some)), 2) for some in places]
    return Chart(title, lines, {"title": title, "axis": axis, "x": x, "series": drawn})


def run_table(runs: Sequence[Run]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The head of the page: what stands in its columns, and for each run its name and these numbers."""
    columns = {
        "joint micro F1, best": (_JOINT, lambda curve: "{1:.3f} at step {0}".format(*_best(curve))),
        "joint micro F1, last": (_JOINT, _last),
        "reward": ("critic/score/mean|ffr/reward/score/mean", _last),
        "malformed": ("ffr/malformed/any", _last),
        "groups without spread": ("ffr/groups/without_spread", _last),
        "KL": ("actor/kl_loss", _last),
        "entropy": ("actor/entropy", _last),
        "gradient norm": ("(?:actor|train)/grad_norm", _last),
        "loss": ("train/loss", _last),
        "held-out loss": ("val/loss", _last),
    }

    def cell(metrics: Mapping[str, Curve], pattern: str, show: Any) -> str:
        found = {name: show(curve) for name, curve in metrics.items() if re.fullmatch(pattern, name)}
        if len({_place(name)[-1] for name in found}) > 1:
            return "; ".join(f"{text} ({_place(name)[-1]})" for name, text in found.items())
        return next(iter(found.values()), "")

    rows = []
    for run in runs:
        last = max(step for curve in run.metrics.values() for step, _ in curve)
        rows.append((run.name, [f"{last:,}", *[cell(run.metrics, *column) for column in columns.values()]]))
    kept = [at for at in range(1 + len(columns)) if any(cells[at] for _, cells in rows)]
    heads = ["step", *columns]
    return [heads[at] for at in kept], [(name, [cells[at] or "–" for at in kept]) for name, cells in rows]


def _last(curve: Curve) -> str:
    return _number(curve[-1][1])


def _best(curve: Curve) -> tuple[int, float]:
    return max(curve, key=lambda point: (point[1], -point[0]))
