"""Rows without gold answers: a model can be asked, and nothing takes them for rows whose gold is empty."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_server import FakeServer, completion, fake_server, user_text

from ffr_verl import cli
from ffr_verl.data.parquet_files import check_columns
from ffr_verl.data.prepare import PrepareSummary, prepare
from ffr_verl.data.sources.rows import read_queries
from ffr_verl.data.statistics import table_rows
from ffr_verl.errors import FFRError, counted
from ffr_verl.evaluation import evaluate, evaluate_file
from ffr_verl.inference.score import score
from ffr_verl.integrations.trl import trl_dataset
from ffr_verl.rewards import compute_score
from ffr_verl.rewards.batch import f1
from ffr_verl.samplers.difficulty_file import difficulty_table

GOLD = "<|utt_ids_start|>[0]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
RAW: dict[str, Any] = {
    "dialogue_id": "d",
    "dialogue": [{"speaker": "Ann", "utterance": f"turn {number}"} for number in range(6)],
    "query_text": "the first",
    "gt_turns": [0],
}
TELEGRAM = {
    "name": "Ann",
    "type": "personal_chat",
    "id": 1,
    "messages": [
        {"id": number, "type": "message", "date": "2024-05-01T10:00:00", "from": name, "from_id": "1", "text": "hello"}
        for number, name in enumerate(["Ann", "Ben"] * 40)
    ],
}  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> PrepareSummary:
    (tmp_path / "raw.jsonl").write_text(json.dumps(RAW))
    return prepare_raw(tmp_path)


def prepare_raw(folder: Path, **options: Any) -> PrepareSummary:
    known = {"images_root": folder, "output": folder / "out", "split": "t", "source_format": "dialogue"}
    return prepare(folder / "raw.jsonl", **{**known, "unlabelled": True, **options})


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["ffr-verl", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_there_is_one_file_and_no_gold_in_it(made: PrepareSummary) -> None:
    assert made.sft_path is None
    assert [path.name for path in made.rl_path.parent.iterdir()] == ["t.rl.parquet"]
    (row,) = pq.read_table(made.rl_path).to_pylist()
    assert row["reward_model"] == {"style": "rule", "ground_truth": None}
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert made.left_out == {"gold answers (--unlabelled)": 1}
    assert made.statistics["empty_gold_share"] is None
    assert "empty golds" not in [name for name, *_ in table_rows(made.statistics)]


def test_rows_with_prompts_lose_their_answers(tmp_path: Path, demo_set: Path) -> None:
    rows = json.loads((demo_set / "heldout.json").read_text())
    known: dict[str, Any] = {"images_root": demo_set, "output": tmp_path / "out"}
    labelled = prepare(demo_set / "heldout.json", split="a", **known)
    summary = prepare(demo_set / "heldout.json", split="b", unlabelled=True, **known)
    assert summary.left_out == {"gold answers (--unlabelled)": len(rows)}
    golds = []
    for one, other in zip(
        *[pq.read_table(path).to_pylist() for path in (labelled.rl_path, summary.rl_path)], strict=True
    ):
        golds.append(other["reward_model"].pop("ground_truth"))
        del one["reward_model"]["ground_truth"], one["extra_info"]["split"], other["extra_info"]["split"]
        assert one == other
    assert golds == [None] * len(rows)


PREDICTION = {"response": GOLD, "labels": None, "messages": [{"role": "user", "content": "…"}], "dialogue_id": "d"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rl, pred: check_columns([str(rl)], "rl"), "row 0 has no gold answer: rows of `ffr-verl prepare --unl"),
        (lambda rl, pred: score([rl], rl.with_name("d.parquet"), predictions=pred), "row 0 has no gold answer"),
        (lambda rl, pred: trl_dataset(str(rl)), "row 0 has no gold answer"),
        (lambda rl, pred: evaluate_file(pred), "line 1: field labels is null: an unlabelled row"),
        (lambda rl, pred: evaluate_file(pred, lenient=True), "no predictions, 1 lines left out"),
        (lambda rl, pred: evaluate([PREDICTION]), "field labels is null: an unlabelled row"),
        (lambda rl, pred: compute_score("ffr", GOLD, None), "ground_truth: found None, expected the gold answer"),
        (lambda rl, pred: f1([GOLD], [None]), "found None, expected the gold answer"),
    ],
)  # fmt: skip
def test_no_number_takes_them_for_empty_golds(
    made: PrepareSummary, tmp_path: Path, call: Callable[[Path, Path], Any], message: str
) -> None:
    predictions = tmp_path / "pred.jsonl"
    predictions.write_text(json.dumps(PREDICTION) + "\n")
    with pytest.raises(FFRError, match=message):
        call(made.rl_path, predictions)


def test_one_such_row_among_others_is_found(made: PrepareSummary, tmp_path: Path) -> None:
    """As after files were put together by hand."""
    labelled = prepare_raw(tmp_path, split="labelled", unlabelled=False)
    both = pa.concat_tables([pq.read_table(path) for path in (labelled.rl_path, made.rl_path)])
    pq.write_table(both, tmp_path / "both.parquet")
    with pytest.raises(FFRError, match=r"both\.parquet: row 1 has no gold answer"):
        check_columns([str(tmp_path / "both.parquet")], "rl")
    check_columns([str(tmp_path / "both.parquet")], "rl", unlabelled=True)
    with pytest.raises(FFRError, match=r"row 0: no gold answer; an unlabelled row has no difficulty"):
        difficulty_table(pq.read_table(made.rl_path).to_pylist(), [{"response": GOLD, "logprobs": []}], model="m")


def answer_with_first_id(server: FakeServer) -> None:
    def reply(body: dict[str, Any], number: int) -> Any:
        first = user_text(body).split("<|utt_id_start|>")[1].split("<|")[0]
        return completion(GOLD.replace("[0]", f"[{first}]"))

    server.reply = reply


@pytest.mark.parametrize("windows", [[], ["--window", "30"]])
def test_three_commands_from_an_export_to_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], windows: list[str]
) -> None:
    """A chat of 80 turns, as docs/data.md has it."""
    (tmp_path / "result.json").write_text(json.dumps(TELEGRAM, indent=1))
    monkeypatch.chdir(tmp_path)
    with fake_server() as server:
        answer_with_first_id(server)
        asked = ["--unlabelled", "--query", "the garden", "--images-root", ".", "--output", "data", "--split", "chat"]
        assert command(monkeypatch, "prepare", "result.json", *asked) == 0
        asked = ["--endpoint", server.url, "--model", "m", "--data", "data/chat.rl.parquet", "--output", "pred.jsonl"]
        assert command(monkeypatch, "infer", *asked, *windows) == 0
        capsys.readouterr()
        assert command(monkeypatch, "inspect", "pred.jsonl") == 0
    shown = capsys.readouterr().out
    (row,) = [json.loads(line) for line in (tmp_path / "pred.jsonl").read_text().splitlines()]
    assert row["labels"] is None
    starts = [0, 15, 30, 45, 50] if windows else [0]
    marked = [int(line.split("│")[2]) for line in shown.splitlines() if line.startswith("│ + │")]
    assert marked == starts
    assert f"answer (+): {counted(len(starts), 'utterance')}, 0 images" in " ".join(shown.split())
    assert command(monkeypatch, "report", "pred.jsonl", "--output", "report.html") == 2
    assert "field labels is null: an unlabelled row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (
            RAW,
            {"unlabelled": False, "queries": ["x"]},
            "--query: asks for what has no gold answer; it goes with --unl",
        ),
        ({**RAW, "query_text": ""}, {}, "missing or empty; expected a query, or give --query TEXT"),
        (RAW, {"queries": ["<image>"]}, "'--query': holds <image>"),
        (
            RAW,
            {"source_format": "photochat"},
            "--format photochat: has no queries; give --query TEXT, or --query-file",
        ),
        (RAW, {"source_format": "mldr", "queries": ["x"]}, "--query: read as rows of the format mldr, which bring"),
        (
            RAW,
            {"source_format": "mmdd", "unlabelled": False},
            "mmdd: has no queries and gold answers; give --unlabelled",
        ),
        (RAW, {"gap_hours": -1}, "--gap-hours: found -1; give hours from 0"),
    ],
)
def test_what_is_missing_is_asked_for(tmp_path: Path, row: Any, options: dict[str, Any], message: str) -> None:
    (tmp_path / "raw.jsonl").write_text(json.dumps(row))
    with pytest.raises(FFRError, match=message):
        prepare_raw(tmp_path, **options)
    assert not (tmp_path / "out").exists()


def test_files_with_gold_answers_are_not_mixed_up(made: PrepareSummary, tmp_path: Path) -> None:
    made.rl_path.unlink()
    prepare_raw(tmp_path, unlabelled=False)
    with pytest.raises(FFRError, match=r"t\.sft\.parquet: is there from rows with gold answers; give another --split"):
        prepare_raw(tmp_path)


def test_queries_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("\ufeffthe garden\n\n 那只猫 \n", encoding="utf-8")
    assert read_queries(tmp_path / "q.txt") == ["the garden", "那只猫"]
    (tmp_path / "q.txt").write_text("\n")
    with pytest.raises(FFRError, match=r"--query-file .*: no query in it; give one a line"):
        read_queries(tmp_path / "q.txt")


@pytest.mark.parametrize("gold", ["x", {"style": "rule"}, None])
def test_golds_of_another_kind_of_file_are_named(tmp_path: Path, gold: Any) -> None:
    row = {"prompt": "x", "images": None, "reward_model": gold, "extra_info": "x", "data_source": "x"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.rl.parquet")
    with pytest.raises(FFRError, match=r"column reward_model: found .*, expected objects with ground_truth"):
        check_columns([str(tmp_path / "a.rl.parquet")], "rl")


def test_a_file_that_is_not_there_is_said_before_its_options(tmp_path: Path) -> None:
    with pytest.raises(FFRError, match=r"none\.json: no such file"):
        prepare(
            tmp_path / "none.json", images_root=tmp_path, output=tmp_path, split="t", unlabelled=True, queries=["q"]
        )
