"""`ffr-verl prepare`: what it writes, and that it refuses broken rows by name and writes nothing."""

from __future__ import annotations

import copy
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from ffr_verl.data.demo import demo_rows
from ffr_verl.data.prepare import prepare
from ffr_verl.dialogues import parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import parse_fragment
from ffr_verl.rewards import compute_score

Row = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = list(demo_rows(tmp_path / "images", rows=12, seed=3, image_share=0.5))
    assert any(row["images"] for row in rows)
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


def rows_of(folder: Path) -> list[Row]:
    return json.loads((folder / "train.json").read_text(encoding="utf-8"))


def run(folder: Path, rows: list[Row] | None = None, **options: Any) -> Any:
    source = folder / "train.json"
    if rows is not None:
        source.write_text(json.dumps(rows), encoding="utf-8")
    return prepare(source, images_root=folder, output=folder / "out", split="train", **options)


def test_both_files_hold_what_verl_needs(folder: Path) -> None:
    rows = rows_of(folder)
    summary = run(folder)
    assert summary.rows == len(rows) == summary.dialogues
    rl, sft = (pq.read_table(path).to_pylist() for path in (summary.rl_path, summary.sft_path))
    for index, (row, rl_row, sft_row) in enumerate(zip(rows, rl, sft, strict=True)):
        dialogue = parse_dialogue(row["messages"], row["dialogue_id"])
        assert rl_row["prompt"] == row["messages"][:-1]
        assert rl_row["images"] == row["images"] == sft_row["images"]
        assert rl_row["data_source"] == "ffr/mldr"
        assert rl_row["ability"] == "ffr"
        assert rl_row["reward_model"] == {"style": "rule", "ground_truth": row["solution"]}
        assert rl_row["extra_info"] == {
            "index": index,
            "split": "train",
            "dialogue_id": row["dialogue_id"],
            "query": dialogue.query,
            "utterance_ids": [utterance.id for utterance in dialogue.utterances],
            "image_utterances": list(dialogue.image_utterances),
            "images": row["images"],
        }
        assert sft_row["messages"] == row["messages"]


def test_json_lines_and_image_objects_give_the_same_files(folder: Path) -> None:
    summary = run(folder)
    expected = pq.read_table(summary.rl_path).to_pylist()
    lines = [{**row, "images": [{"path": path} for path in row["images"]]} for row in rows_of(folder)]
    source = folder / "train.jsonl"
    source.write_text("\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    again = prepare(source, images_root=folder, output=folder / "out", split="train")
    assert pq.read_table(again.rl_path).to_pylist() == expected


def test_every_gold_answer_earns_the_full_reward(folder: Path) -> None:
    summary = run(folder)
    for row in pq.read_table(summary.rl_path).to_pylist():
        gold = row["reward_model"]["ground_truth"]
        scores = compute_score(row["data_source"], gold, gold, row["extra_info"])
        assert (scores["f1"], scores["format"], scores["exact_match"]) == (1.0, 1.0, 1.0)


def with_image(rows: list[Row]) -> int:
    return next(number for number, row in enumerate(rows) if row["images"])


def set_solution(row: Row, solution: str) -> None:
    row["solution"] = solution
    row["messages"][-1]["content"] = solution


def answer(utterances: str, images: str = "[]") -> str:
    return f"<|utt_ids_start|>{utterances}<|utt_ids_end|>;<|img_ids_start|>{images}<|img_ids_end|>"


def swap_ids(row: Row) -> None:
    message = row["messages"][1]
    message["content"] = message["content"].replace("<|utt_id_start|>1<", "<|utt_id_start|>9<")


BROKEN: list[tuple[Callable[[Row], Any], str]] = [
    (lambda row: row.pop("dialogue_id"), r"field 'dialogue_id': missing"),
    (lambda row: row.pop("messages"), r"field 'messages': missing or no list"),
    (lambda row: row.update(messages=[]), r"field 'messages': missing or no list"),
    (lambda row: row["messages"].pop(), r"field 'messages': found the roles system, user;"),
    (lambda row: row["messages"][1].update(content=3), r"field 'messages\[1\]': expected an object"),
    (lambda row: row["messages"][1].update(content="hello"), r"field 'messages': no <\|query_start\|>"),
    (swap_ids, r"field 'messages': utterance ids are \[0, 9, "),
    (lambda row: row.pop("images"), r"field 'images': missing or no list"),
    (
        lambda row: row["images"].append("images/garden_0.png"),
        r"field 'images': \d paths, \d <image> and \d image ids",
    ),
    (lambda row: row["images"].__setitem__(0, 7), r"field 'images\[0\]': found 7; expected a path"),
    (lambda row: row["images"].__setitem__(0, "images/no.png"), r"images\[0\]': images/no.png: no such file"),
    (lambda row: row["images"].__setitem__(0, "../x.png"), r"images\[0\]': ../x.png: leaves the images root"),
    (lambda row: row["images"].__setitem__(0, "/etc/passwd"), r"images\[0\]': /etc/passwd: leaves the images root"),
    (lambda row: row["images"].__setitem__(0, "http://a/b.png"), r"images\[0\]': http://a/b.png: is an address"),
    (lambda row: row["images"].__setitem__(0, "broken.png"), r"images\[0\]': broken.png: cannot be decoded"),
    (lambda row: row["images"].__setitem__(0, "cut.png"), r"images\[0\]': cut.png: cannot be decoded"),
    (lambda row: row.pop("solution"), r"field 'solution': missing or no text"),
    (lambda row: set_solution(row, "[1]"), r"field 'solution': malformed \(missing_tag\)"),
    (lambda row: set_solution(row, answer("[1,]")), r"field 'solution': malformed \(bad_id_list\)"),
    (lambda row: set_solution(row, answer("[999]")), r"field 'solution': utterance ids \[999\] are outside"),
    (lambda row: set_solution(row, answer("[1]", "[99]")), r"field 'solution': image ids \[99\] are outside"),
    (lambda row: set_solution(row, answer("[1, 1]")), r"field 'solution': utterance ids repeat"),
    (lambda row: row.update(solution=answer("[]")), r"field 'messages': the assistant's message is not the solution"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_a_broken_row_is_named_and_nothing_is_written(
    folder: Path, damage: Callable[[Row], Any], message: str
) -> None:
    (folder / "broken.png").write_bytes(b"not a picture")
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:900])
    rows = rows_of(folder)
    number = next(
        index
        for index, row in enumerate(rows)
        if row["images"] and parse_fragment(row["solution"]).utterance_ids  # type: ignore[union-attr]
    )
    damage(rows[number])
    with pytest.raises(FFRError, match=rf"train\.json: 1 rows are refused.*\nrow {number}: .*{message}"):
        run(folder, rows)
    assert not list((folder / "out").iterdir())


def test_a_refused_call_leaves_earlier_files_as_they_were(folder: Path) -> None:
    before = {path: path.read_bytes() for path in (run(folder).rl_path, run(folder).sft_path)}
    rows = copy.deepcopy(rows_of(folder))
    rows[3].pop("solution")
    with pytest.raises(FFRError):
        run(folder, rows)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted((folder / "out").iterdir()) == sorted(before)


def test_many_problems_are_counted_and_the_first_are_listed(folder: Path) -> None:
    rows = rows_of(folder) * 5
    for row in rows[:30]:
        row.pop("solution", None)
    rows = [{**row} for row in rows]
    with pytest.raises(FFRError) as caught:
        run(folder, rows)
    text = str(caught.value)
    assert text.count("\nrow ") == 20
    assert "... and " in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no rows in it"),
        (b"[]", "no rows in it"),
        (b'[{"a": 1},]', r"train\.json: line 1: not JSON"),
        (b'{"a": 1}\n{"a": \n', r"train\.json: line 2: not JSON"),
        (b"[3]", r"train\.json: row 0: found int, expected an object"),
        (b'["\xff"]', r"train\.json: not UTF-8 at byte 2"),
    ],
)
def test_a_broken_file_is_named(folder: Path, content: bytes, message: str) -> None:
    (folder / "train.json").write_bytes(content)
    with pytest.raises(FFRError, match=message):
        run(folder)
    assert not list((folder / "out").glob("*"))


def test_missing_source_root_and_bad_split(folder: Path) -> None:
    with pytest.raises(FFRError, match=r"absent\.json: no such file"):
        prepare(folder / "absent.json", images_root=folder, output=folder / "out", split="train")
    with pytest.raises(FFRError, match=r"--images-root: .*: no such folder"):
        prepare(folder / "train.json", images_root=folder / "no", output=folder / "out", split="train")
    with pytest.raises(FFRError, match=r"--split: found 'a/b'"):
        prepare(folder / "train.json", images_root=folder, output=folder / "out", split="a/b")


def test_a_symbolic_link_out_of_the_root_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "x.png"
    Image.new("RGB", (8, 8)).save(outside)
    (folder / "link.png").symlink_to(outside)
    rows = rows_of(folder)
    number = with_image(rows)
    rows[number]["images"][0] = "link.png"
    with pytest.raises(FFRError, match=r"link\.png: leaves the images root"):
        run(folder, rows)


def test_a_full_disk_is_one_message_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(FFRError, match=r"out: the disk is full"):
        run(folder)
    assert not list((folder / "out").iterdir())


def test_output_that_is_a_file_is_one_message(folder: Path) -> None:
    (folder / "out").write_text("x", encoding="utf-8")
    with pytest.raises(FFRError, match="out: File exists"):
        run(folder)


def test_real_dialogues_go_through_whole(real_data: Path, tmp_path: Path) -> None:
    summary = prepare(real_data / "train.json", images_root=real_data, output=tmp_path, split="train")
    assert summary.rows == len(json.loads((real_data / "train.json").read_text(encoding="utf-8"))) == 985
    assert pq.read_metadata(summary.rl_path).num_rows == pq.read_metadata(summary.sft_path).num_rows == 985
