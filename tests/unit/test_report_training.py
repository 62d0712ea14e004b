"""The page of a run: out of verl's loggers into charts, and out of its dumps into groups of answers."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from ffr_verl.cli import app
from ffr_verl.errors import FFRError
from ffr_verl.evaluation.report import RunPageSettings, write_run_page
from ffr_verl.evaluation.report.charts import histogram, run_charts, run_table
from ffr_verl.evaluation.report.training import Run, read_runs
from ffr_verl.samplers.rollout_dump import write_rollouts

GOLD = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[0]<|img_ids_end|>"
NONE = "<|utt_ids_start|>[]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
PROMPT = (
    "system\nFind it.\nuser\n<|query_start|>tea<|query_end|>\n<|utt_id_start|>0<|utt_id_end|> a: hello\n"
    "<|utt_id_start|>1<|utt_id_end|> b: my tea<|img_id_start|>0<|img_id_end|>\nassistant\n"
)


def write_log(path: Path, steps: dict[int, dict[str, Any]], *, modified: int = 0) -> Path:
    path.write_text("".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in steps.items()))
    os.utime(path, (modified, modified))
    return path


def write_events(folder: Path, values: dict[int, float]) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for step, value in values.items():
        summary = Summary(value=[Summary.Value(tag="ffr/reward/f1/mean", simple_value=value)])
        writer.add_event(Event(step=step, wall_time=float(step), summary=summary))
    writer.close()


# ---- logs


def test_the_file_logger_is_read(tmp_path: Path) -> None:
    values = {"ffr/reward/f1/mean": 0.5, "critic/score/mean": 1, "val-core/ffr/mldr/reward/mean@1": 0.25}
    write_log(tmp_path / "a.jsonl", {3: {**values, "ffr/reward/f1/std": None}, 1: values})
    [run] = read_runs([tmp_path])
    assert run.metrics == {name: [(1, float(value)), (3, float(value))] for name, value in sorted(values.items())}
    assert (run.name, run.files) == ("a", (tmp_path / "a.jsonl",))


def test_of_a_resumed_run_the_later_file_counts(tmp_path: Path) -> None:
    write_log(tmp_path / "b.jsonl", {1: {"critic/score/mean": 0.1}, 2: {"critic/score/mean": 0.2}}, modified=100)
    write_log(tmp_path / "a.jsonl", {2: {"critic/score/mean": 0.9}, 3: {"critic/score/mean": 0.3}}, modified=200)
    [run] = read_runs([tmp_path])
    assert run.metrics == {"critic/score/mean": [(1, 0.1), (2, 0.9), (3, 0.3)]}


def test_runs_of_one_folder_are_not_mixed(tmp_path: Path) -> None:
    for number, name in enumerate(("long", "short", "validated_first")):
        first = 0 if name == "validated_first" else 1
        steps = {step: {"critic/score/mean": float(number)} for step in range(first, 9 - number)}
        write_log(tmp_path / f"{name}.jsonl", steps, modified=100 * number)
    runs = read_runs([tmp_path])
    assert [(run.name, {value for _, value in run.metrics["critic/score/mean"]}) for run in runs] == [
        ("long", {0.0}),
        ("short", {1.0}),
        ("validated_first", {2.0}),
    ]


def test_runs_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    for seed in ("seed_0", "seed_1"):
        (tmp_path / seed / "logs").mkdir(parents=True)
        write_log(tmp_path / seed / "logs" / "default.jsonl", {1: {"actor/entropy": 0.5}})
    assert [run.name for run in read_runs([tmp_path / "seed_0", tmp_path / "seed_1"])] == ["seed_0", "seed_1"]


def test_other_files_and_a_cut_line_are_passed_over(tmp_path: Path) -> None:
    write_log(tmp_path / "run.jsonl", {1: {"critic/score/mean": 0.5, "critic/score/max": float("nan")}})
    with (tmp_path / "run.jsonl").open("a") as file:
        file.write('{"step": 2, "data": {"critic/sco')
    (tmp_path / "rollouts.jsonl").write_text('{"input": "x", "step": 1, "data": 3}\n[1]\n')
    for place in (tmp_path, tmp_path / "run.jsonl"):
        [run] = read_runs([place])
        assert run.metrics == {"critic/score/mean": [(1, 0.5)]}


def test_event_files_are_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tb").mkdir()
    write_events(tmp_path / "tb", {1: 0.25, 2: 0.5})
    [run] = read_runs([tmp_path])
    assert (run.name, run.metrics) == ("tb", {"ffr/reward/f1/mean": [(1, 0.25), (2, 0.5)]})


def test_a_missing_tensorboard_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"")
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    said: list[str] = []
    with pytest.raises(FFRError, match="no metrics"):
        read_runs([tmp_path], say=said.append)
    assert "pip install tensorboard" in said[0]
    write_log(tmp_path / "a.jsonl", {1: {"critic/score/mean": 0.5}})
    assert [run.name for run in read_runs([tmp_path])] == ["a"]


def test_a_folder_without_curves_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FFRError, match="no such folder"):
        read_runs([tmp_path / "none"])
    with pytest.raises(FFRError, match=r"no metrics in 0 files.*trainer\.logger"):
        read_runs([tmp_path])


# ---- charts

CURVES = {
    "ffr/reward/f1/mean": [(step, step / 10) for step in range(11)],
    "ffr/reward/f1/std": [(step, 0.2) for step in range(11)],
    "ffr/reward/f1/max": [(step, 1.0) for step in range(11)],
    "val-aux/ffr/mldr/f1/mean@1": [(0, 0.1), (10, 0.6)],
    "val-aux/ffr/mldr/micro_joint_f1/mean@1": [(0, 0.2), (10, 0.4)],
    "val-aux/ffr/mldr/micro_image_f1/mean@1": [(0, 0.3), (10, 0.5)],
    "ffr/malformed/any": [(1, 0.5), (2, 0.25)],
    "ffr/malformed/missing_tag": [(1, 0.5), (2, 0.0)],
    "ffr/malformed/empty": [(1, 0.0), (2, 0.0)],
    "train/loss": [(1, 2.0), (2, 1.0)],
    "timing_s/step": [(1, 30.0), (2, 20.0)],
}


def charts_of(*runs: Run) -> dict[str, dict[str, list[str]]]:
    return {
        section.title: {chart.title: [one["name"] for one in chart.data["series"]] for chart in section.charts}
        for section in run_charts(runs).sections
    }


def test_curves_of_one_matter_share_a_chart() -> None:
    run = Run("mine", CURVES, ())
    assert charts_of(run) == {
        "Validation": {"Micro F1": ["joint", "image"]},
        "Rewards": {"f1": ["training answers", "held-out"]},
        "Policy": {"SFT: loss": ["training rows"]},
        "Faults and sizes of answers": {"Malformed answers": ["any", "missing_tag"]},
        "Everything else": {"timing_s/step": ["timing_s/step"]},
    }
    charts = run_charts([run])
    assert charts.constants == [("ffr/malformed/empty", ["0.000"])], "what never changes is folded away"
    validated_once = Run("mine", {**CURVES, "val-aux/ffr/mldr/cut_off/mean@1": [(2, 0.0)]}, ())
    assert charts_of(validated_once) == charts_of(run), "and so is a component that was validated once"
    first_step = Run("mine", {"val-aux/ffr/mldr/cut_off/mean@1": [(1, 0.0)]}, ())
    assert charts_of(first_step) == {"Rewards": {"cut_off": ["held-out"]}}
    [f1] = charts.sections[1].charts
    assert f1.lines[0] == "training answers: first 0.000, last 1.000, highest 1.000"
    train, held_out = f1.data["series"]
    assert (train["heldOut"], held_out["heldOut"]) == (False, True)
    assert held_out["y"] == [0.1, *[None] * 9, 0.6]
    assert train["band"][1][-3:] == [1.0, 1.0, 1.0], "the band ends at the greatest value"


def test_runs_are_overlaid_metric_by_metric() -> None:
    other = Run("b", {**CURVES, "ffr/malformed/empty": [(1, 0.0), (2, 0.5)]}, ())
    found = charts_of(Run("a", CURVES, ()), other)
    assert found["Validation"]["Micro F1: joint"] == ["a, held-out", "b, held-out"]
    assert found["Rewards"]["f1"] == ["a", "b", "a, held-out", "b, held-out"]
    assert found["Faults and sizes of answers"]["Malformed answers: empty"] == ["a", "b"]
    sft, grpo = {"train/loss": [(1, 2.0), (2, 1.0)]}, {"ffr/reward/f1/mean": [(1, 0.1)]}
    alone = charts_of(Run("a", sft, ()), Run("b", grpo, ()))
    assert alone["Policy"] == {"SFT: loss": ["training rows"]}, "what one run has is not split"
    heads, rows = run_table([other])
    assert dict(zip(heads, rows[0][1], strict=True)) == {
        "step": "10",
        "joint micro F1, best": "0.400 at step 10",
        "joint micro F1, last": "0.400",
        "malformed": "0.250",
        "loss": "1.000",
    }


def test_a_long_run_is_drawn_from_few_points() -> None:
    [section] = run_charts([Run("a", {"actor/entropy": [(step, step / 1e5) for step in range(100_000)]}, ())]).sections
    [chart] = section.charts
    assert len(chart.data["x"]) == len(chart.data["series"][0]["y"]) <= 400


@given(st.lists(st.floats(0, 1)))
def test_every_row_is_in_one_bar(values: list[float]) -> None:
    counts = [int(count) for _, count, _, _ in histogram(values)]
    assert sum(counts) == len(values)
    assert counts[-1] == sum(value >= 0.9 - 1e-9 for value in values)


# ---- answers


def dump(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer(uid: str, output: str, score: float, step: int = 3) -> dict[str, Any]:
    return {"input": PROMPT, "output": output, "gts": GOLD, "score": score, "step": step, "uid": uid}


def page_of(folder: Path, **settings: Any) -> tuple[str, dict[str, Any]]:
    write_run_page(folder / "run.html", RunPageSettings((folder,), **settings), force=True)
    page = (folder / "run.html").read_text(encoding="utf-8")
    found = re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return page, json.loads(found.group(1))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with its log, two steps of verl's dump, and the replay buffer's of one of them."""
    write_log(tmp_path / "log.jsonl", {1: {"actor/entropy": 0.5}, 3: {"actor/entropy": 0.25}})
    dump(
        tmp_path / "rollouts" / "3.jsonl",
        [answer("p_0_0", GOLD, 7.5), answer("p_1_0", NONE, -2.0), answer("q_0_0", "no", 1.0)],
    )
    dump(tmp_path / "rollouts" / "1.jsonl", [answer("r_0_0", GOLD, 1.0, step=1)])
    told = {"dialogue_id": "d7", "images": ["cup.png"], "f1": np.float64(1.0), "reward": 7.5, "malformed": ""}
    write_rollouts(tmp_path / "own", 3, [{"uid": "p_0_0", "advantage": 4.75, **told}])
    Image.new("RGB", (4, 4), "red").save(tmp_path / "cup.png")
    return tmp_path


def test_answers_come_in_groups_with_verls_own_score(run: Path) -> None:
    _, data = page_of(run, images_root=run)
    assert [(row["line"], row["step"], len(row["group"])) for row in data["rows"]] == [
        ("rollouts-3-1", "rollouts 3", 2),
        ("rollouts-3-2", "rollouts 3", 1),
        ("rollouts-1-1", "rollouts 1", 1),
    ]
    first = data["rows"][0]
    assert [one["rewards"] for one in first["group"]] == [
        {"score": 7.5, "advantage": 4.75, "f1": 1.0},
        {"score": -2.0},
    ]
    assert (first["id"], first["rewards"], first["query"]) == ("d7", {"score": 2.75}, "tea")
    assert data["images"] == [{"name": "cup.png", "picture": 0}]
    assert [one["fault"] for one in data["rows"][1]["group"]] == ["missing_tag"]


def test_no_word_of_the_chat_template_is_in_a_turn(run: Path) -> None:
    _, data = page_of(run)
    assert [turn["text"] for turn in data["dialogues"][0]["turns"]] == ["hello", "my tea"]


def test_the_first_and_the_last_step_stay_when_there_are_too_many(run: Path) -> None:
    for step in range(4, 40):
        dump(
            run / "rollouts" / f"{step}.jsonl", [answer(f"s{number}_0_0", GOLD, 0.5, step=step) for number in range(5)]
        )
    page, data = page_of(run, most_rows=20)
    steps = list(dict.fromkeys(row["step"] for row in data["rows"]))
    assert (steps[0], steps[-1], len(steps)) == ("rollouts 39", "rollouts 1", 4)
    assert "Steps whose answers are not shown (--most-rows): 34." in page


def test_steps_have_the_same_share(run: Path) -> None:
    for step in (3, 2, 1):
        dump(run / "rollouts" / f"{step}.jsonl", [answer(f"s{one}_0_0", GOLD, 0.5, step=step) for one in range(60)])
    page, data = page_of(run, most_rows=50)
    assert Counter(row["step"] for row in data["rows"]) == {"rollouts 3": 25, "rollouts 1": 25}
    assert "Answers in the page: 50; steps have more than --most-rows allows." in page


def test_an_output_inside_what_is_read_is_refused(run: Path) -> None:
    with pytest.raises(FFRError, match=r"log\.jsonl: is read by this command"):
        write_run_page(run / "log.jsonl", RunPageSettings((run,)), force=True)


def test_a_reward_that_only_verl_logged_stays() -> None:
    curve = [(1, 0.0), (2, 1.0)]
    ours = Run("ours", {"critic/score/mean": curve, "ffr/reward/score/mean": curve}, ())
    plain = Run("plain", {"critic/score/mean": curve, "val-aux/a/micro_joint_f1/mean@1": curve,
                          "val-aux/b/micro_joint_f1/mean@1": [(2, 0.5)]}, ())  # fmt: skip
    shown = [name for section in charts_of(ours, plain).values() for names in section.values() for name in names]
    assert "plain" in " ".join(shown)
    heads, [(_, cells)] = run_table([plain])
    assert dict(zip(heads, cells, strict=True))["joint micro F1, last"] == "1.000 (a); 0.500 (b)"


def test_a_run_page_by_the_command(run: Path) -> None:
    arguments = ["report", "--training", str(run), "--output", str(run / "r.html")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "1 run, 1 charts, 3 groups of answers" in found.output
    assert "data-follow" not in (run / "r.html").read_text().partition("<body>")[0].partition("<style>")[0]
    for refused, why in (
        (["report", "--output", "x.html"], "--training RUN"),
        ([*arguments, "--force", "--lenient"], "--lenient is of predictions"),
        ([*arguments, "--force", "--rollouts", str(run / "none")], "no such folder"),
        (["report", str(run / "p.jsonl"), "--output", "x.html", "--follow", "3"], "--follow is of a run's page"),
        (arguments, "is there already"),
    ):
        found = CliRunner().invoke(app, refused)
        assert found.exit_code != 0
        assert why in " ".join(str(found.exception or found.output).split())
