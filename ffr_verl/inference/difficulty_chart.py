"""The closing chart of `ffr-verl score`: how the levels split, and f1 against the dispersion of the gold fragment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from ffr_verl.files import whole_or_nothing
from ffr_verl.samplers.difficulty import LEVELS

__all__ = ["draw_difficulty"]

# Told apart by lightness too, for print and for eyes that mix up red and green.
_COLOURS = {"easy": "#9ecae1", "middle": "#6baed6", "confusing": "#2171b5", "hard": "#08306b"}
_MOST_POINTS = 20_000


def draw_difficulty(table: pa.Table, path: Path) -> None:
    """Write a chart of a table of `difficulty_table` as PNG; the file appears whole.

    Args:
        table: a line for each row.
        path: the file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = np.array(table.column("level").to_pylist())
    f1, dispersion = table.column("f1").to_numpy(), table.column("dispersion").to_numpy()
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    bars, points = figure.subplots(1, 2)
    counts = [int((levels == level).sum()) for level in LEVELS]
    drawn = bars.bar(LEVELS, counts, color=[_COLOURS[level] for level in LEVELS])
    bars.bar_label(drawn, [f"{count:,}\n{count / max(1, len(levels)):.0%}" for count in counts])
    bars.margins(y=0.18)
    bars.set_title("rows by level")
    source = np.random.default_rng(0)
    chosen = np.flatnonzero(dispersion > 0)
    if len(chosen) > _MOST_POINTS:
        chosen = source.choice(chosen, _MOST_POINTS, replace=False)
    # A little noise keeps the many equal values from hiding each other.
    moved = source.uniform(-0.015, 0.015, (2, len(chosen)))
    for level in LEVELS:
        mine = levels[chosen] == level
        points.scatter(
            dispersion[chosen][mine] + moved[0][mine],
            f1[chosen][mine] + moved[1][mine],
            s=8,
            alpha=0.5,
            linewidths=0,
            color=_COLOURS[level],
            label=level,
        )
    points.set_title("f1 against dispersion (rows with a fragment)")
    points.set_xlabel("dispersion: span of the gold utterances over their number")
    points.set_ylabel("f1 of the greedy answer")
    points.set_ylim(-0.05, 1.05)
    points.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axes in (bars, points):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing([path]) as (temporary,):
        figure.savefig(temporary, format="png")
