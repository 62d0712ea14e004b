"""The training curves of the report: out of verl's loggers, into charts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl.errors import FFRError
from ffr_verl.evaluation.report.charts import LineChart, histogram, line_charts, nice_ticks
from ffr_verl.evaluation.report.training import read_training


def write_log(path: Path, steps: dict[int, dict[str, Any]], *, modified: int = 0) -> None:
    path.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in steps.items()))
    os.utime(path, (modified, modified))


def write_events(folder: Path, values: dict[int, float]) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for step, value in values.items():
        summary = Summary(value=[Summary.Value(tag="ffr/reward/f1/mean", simple_value=value)])
        writer.add_event(Event(step=step, wall_time=float(step), summary=summary))
    writer.close()


def test_the_file_logger_is_read(tmp_path: Path) -> None:
    wanted = {"ffr/reward/f1/mean": 0.5, "critic/score/mean": 1, "val-core/ffr/mldr/reward/mean@1": 0.25}
    write_log(tmp_path / "a.jsonl", {3: {**wanted, "actor/kl_loss": 0.1, "ffr/reward/f1/std": None}, 1: wanted})
    curves = read_training(tmp_path)
    assert curves.metrics == {name: [(1, float(value)), (3, float(value))] for name, value in sorted(wanted.items())}
    assert curves.files == (tmp_path / "a.jsonl",)


def test_of_a_resumed_run_the_later_file_counts(tmp_path: Path) -> None:
    write_log(tmp_path / "b.jsonl", {1: {"critic/score/mean": 0.1}, 2: {"critic/score/mean": 0.2}}, modified=100)
    write_log(tmp_path / "a.jsonl", {2: {"critic/score/mean": 0.9}, 3: {"critic/score/mean": 0.3}}, modified=200)
    assert read_training(tmp_path).metrics == {"critic/score/mean": [(1, 0.1), (2, 0.9), (3, 0.3)]}


def test_other_files_and_a_cut_line_are_passed_over(tmp_path: Path) -> None:
    write_log(tmp_path / "run.jsonl", {1: {"critic/score/mean": 0.5, "critic/score/max": float("nan")}})
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"step": 2, "data": {"critic/sco')
    (tmp_path / "rollouts.jsonl").write_text('{"input": "x", "step": 1, "data": 3}\n[1]\n')
    assert read_training(tmp_path).metrics == {"critic/score/mean": [(1, 0.5)]}
    assert read_training(tmp_path / "run.jsonl").metrics == {"critic/score/mean": [(1, 0.5)]}


def test_event_files_are_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tb").mkdir()
    write_events(tmp_path / "tb", {1: 0.25, 2: 0.5})
    assert read_training(tmp_path).metrics == {"ffr/reward/f1/mean": [(1, 0.25), (2, 0.5)]}


def test_a_missing_tensorboard_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    said: list[str] = []
    with pytest.raises(FFRError, match="no reward curves"):
        read_training(tmp_path, say=said.append)
    assert "pip install tensorboard" in said[0]
    write_log(tmp_path / "a.jsonl", {1: {"critic/score/mean": 0.5}})
    assert read_training(tmp_path).metrics == {"critic/score/mean": [(1, 0.5)]}


def test_a_folder_without_curves_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FFRError, match="no such folder"):
        read_training(tmp_path / "none")
    with pytest.raises(FFRError, match=r"no reward curves in 0 files.*trainer\.logger"):
        read_training(tmp_path)


def test_a_chart_has_training_and_held_out_curves() -> None:
    charts = line_charts(
        {
            "ffr/reward/f1/mean": [(step, step / 10) for step in range(11)],
            "ffr/reward/f1/std": [(step, 0.2) for step in range(11)],
            "ffr/reward/f1/max": [(step, 1.0) for step in range(11)],
            "val-aux/ffr/mldr/f1/mean@1": [(0, 0.1), (10, 0.6)],
            "val-aux/ffr/mldr/f1/mean@8": [(0, 0.2)],
            "val-core/ffr/mldr/reward/mean@1": [(0, 0.3)],
            "critic/score/mean": [(1, 0.5)],
        }
    )
    assert [chart.title for chart in charts] == ["reward", "critic/score/mean", "f1"]
    train, held_out, eight = charts[-1].series
    assert (train.label, train.is_validation, train.first, train.last) == ("training answers", False, 0.0, 1.0)
    assert (held_out.label, held_out.is_validation, len(held_out.dots)) == ("held-out (ffr/mldr)", True, 2)
    assert eight.label == "held-out (ffr/mldr, mean@8)"
    assert train.band.count(",") == 22
    assert charts[1].series[0].dots, "one step alone is a dot"
    points = [tuple(map(float, point.split(","))) for point in (train.line + " " + train.band).split()]
    assert all(LineChart.LEFT <= x <= LineChart.RIGHT and LineChart.TOP <= y <= LineChart.BOTTOM for x, y in points)


def test_a_long_run_is_drawn_from_few_points() -> None:
    [chart] = line_charts({"critic/score/mean": [(step, 0.5) for step in range(100_000)]})
    assert len(chart.series[0].line.split()) <= 300


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_span_the_range_and_are_few(least: float, width: float) -> None:
    ticks = nice_ticks(least, least + width)
    assert ticks == sorted(ticks)
    assert 2 <= len(ticks) <= 6
    slack = 1e-6 * max(1.0, abs(least) + width)
    assert ticks[0] <= least + slack
    assert ticks[-1] >= least + width - slack


@given(st.lists(st.floats(0, 1)))
def test_every_row_is_in_one_bar(values: list[float]) -> None:
    bars = histogram(values)
    assert sum(bar.count for bar in bars) == len(values)
    assert bars[-1].count == sum(value >= 0.9 - 1e-9 for value in values)
