"""`ffr-verl evaluate`: what it shows, writes and refuses."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from drawn_predictions import NONE, Row, drawn

from ffr_verl.cli import main
from ffr_verl.evaluation import BootstrapSettings, EvaluationResult, evaluate
from ffr_verl.evaluation.reward_settings import read_reward_kwargs
from ffr_verl.recipes import recipe_path

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`ffr-verl evaluate` with arguments: exit status, and what was written to the terminal."""

    def run(*arguments: Any) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["ffr-verl", "evaluate", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return run


def saved(path: Path, rows: Sequence[Row | str]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_the_command_writes_tables_json_and_csv(tmp_path: Path, command: Command) -> None:
    path = saved(tmp_path / "pred.jsonl", drawn(60))
    status, text = command(path, "--json", tmp_path / "new" / "r.json", "--csv", tmp_path / "r.csv", "--seed", 3)
    assert status == 0, text
    expected = evaluate(drawn(60), bootstrap=BootstrapSettings(1000, 3))
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == json.loads(json.dumps(expected.to_dict()))
    with (tmp_path / "r.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(expected.to_rows())
    assert float(lines[0]["f1"]) == expected.micro["utterance"]["f1"]
    for word in ("micro", "macro", "joint", f"{expected.micro['joint']['f1']:.3f}", "missing_tag", "dispersion", "60"):
        assert word in text, word
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "pred.jsonl", "r.csv"]


def test_the_command_compares(tmp_path: Path, command: Command) -> None:
    rows = drawn(60)
    pred, other = saved(tmp_path / "pred.jsonl", rows), saved(tmp_path / "other.jsonl", rows[:50])
    to_csv = ("--csv", tmp_path / "r.csv")
    status, text = command(pred, "--compare", other, "--bootstrap", 100, "--json", tmp_path / "r.json", *to_csv)
    assert status == 0, text
    assert "50 rows are in both files, 10 in pred.jsonl only, 0 in other.jsonl only" in text
    found = json.loads((tmp_path / "r.json").read_text())["comparison"]
    assert found["other"] == str(other)
    assert found["difference"]["micro"]["joint"] == {"precision": 0, "recall": 0, "f1": 0, "mcc": 0}
    assert found["intervals"]["micro"]["joint"]["f1"] == [0, 0]
    assert (found["skipped"], found["unanswered"]) == (0, 0)
    shared = evaluate(rows[:50], bootstrap=NONE).micro["joint"]["f1"]
    assert f"{shared:.3f} | {shared:.3f}" in text, "the values that the difference is of"
    with (tmp_path / "r.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["breakdown"] == "comparison"]
    assert [line["part"] for line in lines] == [part for part in ("first", "second", "difference") for _ in range(6)]
    assert {(line["part"] == "difference", bool(line["f1_low"])) for line in lines} == {(True, True), (False, False)}
    assert float(lines[2]["f1"]) == shared


def test_the_command_counts_what_it_leaves_out(tmp_path: Path, command: Command) -> None:
    path = saved(tmp_path / "pred.jsonl", [*drawn(3), "{", *drawn(3), *["x"] * 6])
    status, text = command(path)
    assert status == 2
    assert f"ffr-verl: error: {path}: line 4: cut off, or not JSON" in text
    status, text = command(path, "--lenient", "--bootstrap", 0, "--json", tmp_path / "r.json")
    assert status == 0, text
    assert "line 4 left out: cut off" in text
    assert "2 more lines left out" in text
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["samples"], found["skipped"]) == (6, 7)


def test_the_command_does_not_overwrite_the_predictions(tmp_path: Path, command: Command) -> None:
    path = saved(tmp_path / "pred.jsonl", drawn(3))
    before = path.read_bytes()
    other = saved(tmp_path / "other.jsonl", drawn(3))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for arguments, message in (
        (("--json", path), "is read by this command; give another name"),
        (("--csv", tmp_path / ".." / tmp_path.name / "pred.jsonl"), "is read by this command"),
        (("--json", tmp_path), "a folder; give the name of a file"),
        (("--json", tmp_path / "r", "--csv", tmp_path / "r"), "given for --json and for --csv"),
        (("--json", path / "r.json"), f"{path} is no folder"),
        (("--compare", tmp_path / "missing"), "no such file or directory"),
        (("--json", other), "is there already; choose another --json, or replace it with --force"),
        (("--compare", pipe), "a pipe or a device, which is not read"),
    ):
        status, text = command(path, *arguments)
        assert (status, message in text) == (2, True), text
    assert path.read_bytes() == other.read_bytes() == before


def test_errors_are_shown_as_one_printable_line(tmp_path: Path, command: Command) -> None:
    errors = ["bad \ud800 text", "\x1b[31mred\nline", "z" * 5000, "any"]
    path = saved(
        tmp_path / "pred.jsonl", [{**row, "error": error} for row, error in zip(drawn(4), errors, strict=True)]
    )
    status, text = command(path, "--bootstrap", 0, "--json", tmp_path / "r.json")
    assert status == 0, text
    assert "1: bad text" in text
    assert "\x1b" not in text
    found = json.loads((tmp_path / "r.json").read_text())["unanswered"]
    assert (found["any"], found["z" * 300]) == (4, 1)


def test_what_the_numbers_do_not_show_is_told(tmp_path: Path, command: Command) -> None:
    rows = drawn(8)
    marked: list[Row | str] = [{**row, "error": f"reason {number % 5}"} for number, row in enumerate(rows[:7])]
    path = saved(tmp_path / "pred.jsonl", [*marked, rows[7]])
    thoughts = [{**row, "response": f"<think>so</think><answer>{row['labels']}</answer>"} for row in rows]
    messages = [{"role": "user", "content": "What is in it?"}]
    other = saved(tmp_path / "other.jsonl", [*thoughts, {**rows[0], "messages": messages}])
    status, text = command(path, "--compare", other, "--bootstrap", 0)
    assert status == 0, text
    assert f"{path}: 7 of 8 rows have no answer, or no whole one (field error): 0 in macro and rewards" in text
    assert f"{path}:   2: reason 0" in text
    assert "and 2 more reasons" in text
    assert f"{other}: 8 of 9 answers have text around the ids; if that is <think>" in text
    assert f"{other}: in 1 of 9 prompts there is no utterance" in text


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path, command: Command) -> None:
    path = saved(tmp_path / "a[red]b.jsonl", drawn(3))
    status, text = command(path, "--bootstrap", 0, "--csv", tmp_path / "c[/x].csv")
    assert status == 0, text
    assert "a[red]b.jsonl: 3 answers" in text
    assert "c[/x].csv" in text


def test_files_are_written_before_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of the tables that closes early, as `head` does, takes nothing away."""
    path, result = saved(tmp_path / "pred.jsonl", drawn(3)), tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["ffr-verl", "evaluate", str(path), "--json", str(result)])
    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115  # closing it fails too
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(SystemExit, match="2"):
        main()
    with contextlib.suppress(OSError):
        full.close()
    assert json.loads(result.read_text())["samples"] == 3


def test_the_command_reads_what_verl_writes(tmp_path: Path, command: Command) -> None:
    rows = drawn(20)
    dump = [
        {
            "input": row["messages"][0]["content"],
            "output": row["response"],
            "gts": row["labels"],
            "score": 0.0,
            "step": 1,
        }
        for row in rows
    ]
    path = saved(tmp_path / "1.jsonl", dump)
    status, text = command(path, "--format", "verl", "--json", tmp_path / "r.json", "--bootstrap", 0)
    assert status == 0, text
    expected: EvaluationResult = evaluate(rows, bootstrap=NONE)
    assert json.loads((tmp_path / "r.json").read_text())["rewards"] == pytest.approx(expected.rewards)


RECIPE = """defaults:
  - ffr_grpo
  - _self_
reward:
  custom_reward_function:
    reward_kwargs: {length_penalty: 0.5, utterance_weight: 1.0, image_weight: 0.0, weights: {format: 0.1}}
"""


@pytest.mark.parametrize("kind", ["recipe", "run", "folder of a run", "alone"])
def test_rewards_are_those_of_the_run(tmp_path: Path, command: Command, kind: str) -> None:
    path = saved(tmp_path / "pred.jsonl", drawn(40))
    kwargs = {"length_penalty": 0.5, "utterance_weight": 1.0, "image_weight": 0.0}
    file = tmp_path / ".hydra" / "config.yaml" if "run" in kind else tmp_path / "my.yaml"
    file.parent.mkdir(exist_ok=True)
    run = {"trainer": {}, "reward": {"custom_reward_function": {"reward_kwargs": kwargs}}}
    file.write_text(RECIPE if kind == "recipe" else json.dumps(run if "run" in kind else kwargs))
    given = tmp_path if kind == "folder of a run" else file
    status, text = command(path, "--bootstrap", 0, "--json", tmp_path / "r.json", "--reward-kwargs", given)
    assert status == 0, text
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rewards"] == evaluate(drawn(40), bootstrap=NONE, reward_kwargs=kwargs).rewards
    assert found["reward_settings"] == {"from": f"settings of {given}", **kwargs}
    assert "length_penalty 0.5" in " ".join(text.split())


def test_what_a_recipe_inherits_is_read_too() -> None:
    found = read_reward_kwargs(recipe_path("ffr_grpo_published_cpu"))
    assert (found["f1_mode"], found["weights"]) == ("published", {"f1": 1.0, "coherence": 1.0, "format": 0.3})


@pytest.mark.parametrize(
    "text",
    [
        "defaults: [ours]\nreward: {reward_manager: {name: ffr}, reward_kwargs: {length_penalty: 0.5}}",
        "defaults: [ours]\nreward: {custom_reward_function: {reward_kwargs: {length_penalty: 0.5}}}",
        "defaults: [ffr_grpo]\nreward: {custom_reward_function: {path: null}, reward_kwargs: {length_penalty: 0.5}}",
        "defaults: [_self_, theirs]\nreward_kwargs: {length_penalty: 0.9}",
    ],
)
def test_settings_of_rewards_are_read_as_hydra_merges_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "ours.yaml").write_text("trainer: {nnodes: 2}")
    (tmp_path / "theirs.yaml").write_text("reward_kwargs: {length_penalty: 0.5}")
    (tmp_path / "my.yaml").write_text(text)
    assert read_reward_kwargs(tmp_path / "my.yaml") == {"length_penalty": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("length_penality: 0.5", "reward_kwargs.length_penality: unknown key; did you mean 'length_penalty'"),
        ("length_penalty: two", "reward_kwargs.length_penalty: found 'two', expected a number from 0 to 1"),
        ("reward: {custom_reward_function: 5, reward_manager: 5}", "no reward.custom_reward_function.reward_kwargs"),
        ("reward: {}", "no reward.custom_reward_function.reward_kwargs; give a recipe"),
        ("defaults: [mine]", "inherits mine, which is neither beside it nor packaged"),
        ("- 1", "found no mapping"),
        ("a: [", "my.yaml: while parsing a flow node expected the node content"),
        ("defaults: 5", "defaults: found 5, expected a list of recipes"),
        ("reward_kwargs: {weights: 5}", "reward_kwargs.weights: found 5, expected"),
    ],
)
def test_settings_of_rewards_that_are_refused(tmp_path: Path, command: Command, text: str, message: str) -> None:
    path = saved(tmp_path / "pred.jsonl", drawn(3))
    (tmp_path / "my.yaml").write_text(text)
    status, told = command(path, "--reward-kwargs", tmp_path / "my.yaml")
    assert (status, message in told) == (2, True), told


def test_the_defaults_and_repeated_rows_are_told(tmp_path: Path, command: Command) -> None:
    rows = drawn(6)
    path = saved(tmp_path / "pred.jsonl", [*rows, *rows[:2]])
    status, text = command(path, "--bootstrap", 0)
    assert status == 0, text
    assert "with the defaults: length_penalty 0.95" in " ".join(text.split())
    assert "2 of 8 rows are repeats of another (same dialogue, query and gold answer)" in text
    assert "repeat" not in command(saved(tmp_path / "once.jsonl", rows), "--bootstrap", 0)[1]


def test_a_comparison_needs_dialogue_ids(tmp_path: Path, command: Command) -> None:
    rows = drawn(6)
    without = [{name: value for name, value in row.items() if name != "dialogue_id"} for row in rows]
    path, other = saved(tmp_path / "pred.jsonl", rows), saved(tmp_path / "other.jsonl", [rows[0], *without[1:]])
    assert command(other, "--bootstrap", 0)[0] == 0
    for files in ((path, other), (other, path)):
        status, text = command(files[0], "--compare", files[1], "--bootstrap", 0)
        assert (status, f"{other}: line 2: no dialogue_id, by which --compare" in text) == (2, True), text
