"""Geometry of the report's charts; the template draws them as SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ffr_verl.rewards.table import REWARDS

__all__ = ["Bar", "LineChart", "Series", "histogram", "line_charts", "nice_ticks"]

_ORDER = ("score", "reward", "critic/score/mean", *[key for reward in REWARDS.values() for key in reward.keys])
_MOST_POINTS = 300
_BAND = ("std", "min", "max")
_TRAIN = re.compile(r"ffr/reward/([^/]+)/mean")
_VALIDATION = re.compile(r"val-[^/]+/(.+)/([^/]+)/(mean@\d+)")

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a chart; its share is that of the highest bar, 0 to 1."""

    label: str
    count: int
    share: float


class Series(NamedTuple):
    """A curve in the chart's units; validation is drawn with dashes and dots."""

    label: str
    is_validation: bool
    first: float
    last: float
    best: float  # the highest value
    line: str  # points of a polyline
    band: str  # points of the polygon of mean ± standard deviation; empty without one
    dots: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class LineChart:
    """One metric over the steps of a run; ticks are places and labels."""

    title: str
    series: list[Series]
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str]]

    WIDTH, HEIGHT = 300, 150
    LEFT, RIGHT, TOP, BOTTOM = 40, 290, 10, 128


class _Curve(NamedTuple):
    label: str
    is_validation: bool
    points: Sequence[tuple[int, float]]
    lower: Sequence[tuple[int, float]] = ()
    upper: Sequence[tuple[int, float]] = ()


def histogram(values: Sequence[float], *, bins: int = 10) -> list[Bar]:
    """How many values lie in each of equal bins of [0, 1]; the last one holds 1."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, math.floor(value * bins + 1e-9)))] += 1
    highest = max([*counts, 1])
    return [Bar(f"{k / bins:.1f} – {(k + 1) / bins:.1f}", count, count / highest) for k, count in enumerate(counts)]


def nice_ticks(least: float, most: float, *, count: int = 4) -> list[float]:
    """At most about `count` round numbers that span a range.

    Example:
        >>> nice_ticks(0.03, 0.97)
        [0.0, 0.5, 1.0]
        >>> nice_ticks(2.0, 2.0)
        [0.0, 1.0, 2.0]
    """
    if most - least < 1e-9 * max(1.0, abs(most)):
        least, most = (min(least, 0.0), max(most, 0.0)) if abs(most) > 1e-9 else (0.0, 1.0)
    rough = (most - least) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough - 1e-12)
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Means of neighbours, where a curve has more points than a screen shows."""
    size = max(1, math.ceil(len(points) / _MOST_POINTS))
    chunks = [points[at : at + size] for at in range(0, len(points), size)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def line_charts(metrics: Mapping[str, Sequence[tuple[int, float]]]) -> list[LineChart]:
    """A chart for each reward: its mean in training with its spread, and its mean on the held-out rows.

    Example:
        >>> [chart] = line_charts({"ffr/reward/f1/mean": [(1, 0.2), (2, 0.4)], "val-aux/a/f1/mean@1": [(2, 0.3)]})
        >>> chart.title, [(series.label, series.last) for series in chart.series]
        ('f1', [('training answers', 0.4), ('held-out (a)', 0.3)])
    """
    curves: dict[str, list[_Curve]] = {}
    for name, points in metrics.items():
        if train := _TRAIN.fullmatch(name):
            std, least, most = (dict(metrics.get(f"ffr/reward/{train[1]}/{kind}", ())) for kind in _BAND)
            known = [(step, value, std[step]) for step, value in points if step in std]
            lower = [(step, max(value - spread, least.get(step, -math.inf))) for step, value, spread in known]
            upper = [(step, min(value + spread, most.get(step, math.inf))) for step, value, spread in known]
            curves.setdefault(train[1], []).insert(0, _Curve("training answers", False, points, lower, upper))
        elif validation := _VALIDATION.fullmatch(name):
            source, component, kind = validation.groups()
            label = f"held-out ({source})" if kind == "mean@1" else f"held-out ({source}, {kind})"
            curves.setdefault(component, []).append(_Curve(label, True, points))
        elif name == "critic/score/mean":
            curves[name] = [_Curve("training answers", False, points)]
    rank = {title: position for position, title in enumerate(_ORDER)}
    return [_chart(title, curves[title]) for title in sorted(curves, key=lambda one: (rank.get(one, len(rank)), one))]


def _chart(title: str, curves: Sequence[_Curve]) -> LineChart:
    steps = [step for curve in curves for step, _ in curve.points]
    values = [value for curve in curves for part in (curve.points, curve.lower, curve.upper) for _, value in part]
    first, last = min(steps), max(steps)
    ticks = nice_ticks(min(values), max(values))
    low, high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return round(LineChart.LEFT + share * (LineChart.RIGHT - LineChart.LEFT), 1)

    def y(value: float) -> float:
        share = (min(high, max(low, value)) - low) / (high - low)
        return round(LineChart.BOTTOM - share * (LineChart.BOTTOM - LineChart.TOP), 1)

    def placed(points: Sequence[Point]) -> str:
        return " ".join(f"{x(step)},{y(value)}" for step, value in points)

    series = []
    for curve in curves:
        thin, lower, upper = _thinned(curve.points), _thinned(curve.lower), _thinned(curve.upper)
        dots = tuple((x(step), y(value)) for step, value in thin) if curve.is_validation or len(thin) == 1 else ()
        numbers = [value for _, value in curve.points]
        band = placed([*upper, *reversed(lower)]) if len(upper) > 1 else ""
        marks = numbers[0], numbers[-1], max(numbers)
        series.append(Series(curve.label, curve.is_validation, *marks, placed(thin), band, dots))
    x_ticks = [(x(step), f"{step:,}") for step in dict.fromkeys((first, (first + last) // 2, last))]
    return LineChart(title, series, [(y(tick), f"{tick:g}") for tick in ticks], x_ticks)
