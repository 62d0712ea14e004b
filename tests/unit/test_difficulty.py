"""Difficulty, levels and selection exactly as published; every kind of wrong difficulty file is refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from ffr_verl.dialogues import content_text
from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment, format_fragment, parse_fragment, parse_leniently
from ffr_verl.inference.score import answers_of_predictions, score
from ffr_verl.metrics import dispersion
from ffr_verl.samplers.difficulty import (
    LEVELS,
    assign_levels,
    difficulty_f1,
    mean_logprob,
    select_rows,
    token_entropy,
)
from ffr_verl.samplers.difficulty_file import DifficultyFile, difficulty_table, row_key, row_keys

IDS = st.lists(st.integers(0, 12), max_size=8)
SCORES = stn.arrays(np.float64, st.integers(0, 40), elements=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))


def published_entropy(logprobs: list[float]) -> float:
    """The formula, word by word."""
    if not logprobs:
        return 10.0
    weights = [math.exp(value) for value in logprobs]
    return -sum((weight / sum(weights)) * math.log(weight / sum(weights) + 1e-12) for weight in weights)


@given(st.lists(st.floats(-20, 0), max_size=20))
def test_entropy_is_the_published_one(logprobs: list[float]) -> None:
    assert token_entropy(logprobs) == pytest.approx(published_entropy(logprobs), abs=1e-9)


def test_entropy_of_tokens_that_are_hardly_possible() -> None:
    assert token_entropy([-2000.0, -2000.0]) == pytest.approx(math.log(2)), "exp() of them is 0"
    assert math.isnan(mean_logprob([]))
    assert mean_logprob([-1.0, -3.0]) == -2.0


@given(IDS, IDS, IDS, IDS)
def test_f1_is_the_mean_of_the_set_f1_of_both_lists(a: list[int], b: list[int], c: list[int], d: list[int]) -> None:
    def f1(predicted: list[int], gold: list[int]) -> float:
        p, g = set(predicted), set(gold)
        if not g:
            return 1.0 if not p else 0.0
        precision, recall = (len(p & g) / len(p) if p else 0.0), len(p & g) / len(g)
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    found = difficulty_f1(Fragment(tuple(a), tuple(b)), Fragment(tuple(c), tuple(d)))
    assert found == pytest.approx((f1(a, c) + f1(b, d)) / 2)


@given(SCORES, st.randoms())
def test_levels_are_the_published_ones(f1: np.ndarray, source: random.Random) -> None:
    entropy = np.array([source.choice([0.1, 0.5, 1.0, 2.0, 10.0]) for _ in f1])
    q25, q50, q75 = np.percentile(f1, [25, 50, 75]) if len(f1) else (0.0, 0.0, 0.0)
    e25, e50, e75 = np.percentile(entropy, [25, 50, 75]) if len(f1) else (0.0, 0.0, 0.0)
    for level, value, doubt in zip(assign_levels(f1, entropy), f1, entropy, strict=True):
        if value >= q75 and doubt <= e25:
            assert level == "easy"
        elif value >= q50 and doubt <= e50:
            assert level == "middle"
        elif value >= q25 and doubt <= e75:
            assert level == "confusing"
        else:
            assert level == "hard"


@given(SCORES, st.randoms())
def test_the_selection_is_the_published_one(f1: np.ndarray, source: random.Random) -> None:
    levels = np.array([source.choice(LEVELS) for _ in f1], dtype="<U9")
    negative = np.array([source.random() < 0.3 for _ in f1], dtype=bool)
    rows = select_rows(levels, f1, negative).tolist()
    expected: list[int] = []
    for level, share in (("easy", 1.0), ("middle", 0.1), ("confusing", 0.5), ("hard", 1.0)):
        members = [
            n for n in range(len(f1)) if levels[n] == level and not (negative[n] and level in ("easy", "middle"))
        ]
        count = max(1, int(len(members) * share)) if members else 0
        best = sorted(members, key=lambda n: -f1[n])[:count]
        expected += best if level in ("middle", "confusing") else sorted(best)
    assert rows == expected


def test_shares_of_the_levels() -> None:
    levels, f1, negative = ["easy"] * 4 + ["middle"] * 10, np.arange(14) / 14, [False] * 14
    assert select_rows(levels, f1, negative, shares={"middle": 0.3}).tolist() == [13, 12, 11]
    assert select_rows(levels, f1, negative, shares={"easy": 0.5, "middle": 0.0}).tolist() == [2, 3]
    assert select_rows([], [], []).tolist() == []
    with pytest.raises(FFRError, match=r"shares\.easy: found 2\.0, expected 0 to 1"):
        select_rows(levels, f1, negative, shares={"easy": 2.0})
    with pytest.raises(FFRError, match="levels: found simple"):
        select_rows(["simple"], [1.0], [False])
    with pytest.raises(FFRError, match="1, 2 and 1 rows"):
        select_rows(["easy"], [1.0, 0.0], [False])
    with pytest.raises(FFRError, match="f1: found nan in row 1"):
        assign_levels([0.0, math.nan], [1.0, 1.0])
    with pytest.raises(FFRError, match="2 and 1 rows"):
        assign_levels([0.0, 1.0], [1.0])


def test_dispersion() -> None:
    assert (dispersion([]), dispersion([4]), dispersion([2, 4]), dispersion([2, 2, 4])) == (0.0, 1.0, 1.5, 1.5)


@given(st.text(max_size=60))
def test_lenient_reading_never_raises(text: str) -> None:
    parse_leniently(text)
    parse_leniently(f"<|utt_ids_start|>{text}<|utt_ids_end|>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so: <|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[0]<|img_ids_end|> yes", ((1, 2), (0,))),
        ("<|utt_ids_start|>[1]<|utt_ids_end|><|utt_ids_start|>[2]<|utt_ids_end|>", ((1,), ())),
        ("<|utt_ids_start|>[1 2]<|utt_ids_end|>", ((), ())),
        ("<|utt_ids_start|>[1,]<|utt_ids_end|>;<|img_ids_start|>[0]<|img_ids_end|>", ((), (0,))),
        ("<|utt_ids_end|>[1]<|utt_ids_start|>", ((), ())),
        ("<|utt_ids_start|>3<|utt_ids_end|>", ((), ())),
        ('<|utt_ids_start|>[1, "2", true, -1, 2.0, null, 3]<|utt_ids_end|>', ((1, 3), ())),
        ("<|utt_ids_start|>" + "[" * 50_000 + "<|utt_ids_end|>", ((), ())),
        ("<|utt_ids_start|>[" + "9" * 5000 + "]<|utt_ids_end|>", ((), ())),
    ],
)
def test_lenient_reading(text: str, expected: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    assert parse_leniently(text) == Fragment(*expected)


@given(IDS, IDS)
def test_strict_answers_are_read_alike(utterances: list[int], images: list[int]) -> None:
    text = format_fragment(Fragment(tuple(utterances), tuple(images)))
    assert parse_leniently(text) == parse_fragment(text)


@pytest.fixture
def predictions(parquet: Path, tmp_path: Path) -> Path:
    """Answers to the training rows in another order: every third is wrong, every fifth malformed."""
    lines = []
    for number, row in enumerate(pq.read_table(parquet / "train.rl.parquet").to_pylist()):
        gold = row["reward_model"]["ground_truth"]
        response = "no idea" if number % 5 == 0 else format_fragment(Fragment((0,), ())) if number % 3 == 0 else gold
        lines.append(
            {
                "response": response,
                "labels": gold,
                "messages": [*row["prompt"], {"role": "assistant", "content": response}],
                "images": [{"path": name} for name in row["images"]],
                "dialogue_id": row["extra_info"]["dialogue_id"],
                "logprobs": {"content": [{"logprob": -0.1 * (number % 7)}, {"logprob": -0.5}]},
            }
        )
    random.Random(0).shuffle(lines)
    (tmp_path / "predictions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return tmp_path / "predictions.jsonl"


def test_scoring_predictions(parquet: Path, predictions: Path, tmp_path: Path) -> None:
    source, output = parquet / "train.rl.parquet", tmp_path / "difficulty.parquet"
    summary = score([source], output, predictions=predictions)
    rows, scored = pq.read_table(source).to_pylist(), pq.read_table(output).to_pylist()
    assert [row["row"] for row in scored] == list(range(len(rows)))
    for number, (row, line) in enumerate(zip(rows, scored, strict=True)):
        gold = parse_fragment(row["reward_model"]["ground_truth"])
        assert gold is not None
        assert (line["dialogue_id"], line["query"]) == (row["extra_info"]["dialogue_id"], row["extra_info"]["query"])
        assert line["malformed"] == (number % 5 == 0)
        assert line["is_negative"] == (not gold.utterance_ids and not gold.image_ids)
        assert line["dispersion"] == dispersion(gold.utterance_ids)
        assert line["entropy"] == pytest.approx(published_entropy([-0.1 * (number % 7), -0.5]))
        assert line["mean_logprob"] == pytest.approx((-0.1 * (number % 7) - 0.5) / 2)
        if number % 5 and number % 3:
            assert line["f1"] == 1.0
        assert line["pass_rate"] is None
    f1, entropy = ([line[name] for line in scored] for name in ("f1", "entropy"))
    assert [line["level"] for line in scored] == assign_levels(f1, entropy).tolist()
    assert sum(count for _, count, _, _ in summary.levels()) == len(rows)
    assert sum(count for _, count, _ in summary.f1_by_dispersion()) == len(rows)
    with pytest.raises(FFRError, match="is there already; choose another --output, or replace it with --force"):
        score([source], output, predictions=predictions)
    score([source], output, predictions=predictions, force=True)
    keys = row_keys([source])[[5, 2, 9]]
    assert DifficultyFile(output).of_rows(keys, name="x").f1.tolist() == [f1[5], f1[2], f1[9]]


def test_predictions_that_do_not_fit(parquet: Path, predictions: Path, tmp_path: Path) -> None:
    source = [parquet / "train.rl.parquet"]
    lines = predictions.read_text().splitlines()
    with pytest.raises(FFRError, match="give --model DIR, or --predictions FILE"):
        score(source, tmp_path / "d.parquet")
    with pytest.raises(FFRError, match=r"no answer to 16 of 16 rows \(row 0 \.\.\.\), by dialogue_id"):
        list(answers_of_predictions(predictions, [parquet / "heldout.rl.parquet"]))
    for change, message in (
        ({"response": None}, "line 1: field response is null, expected text"),
        ({"messages": []}, "line 1: field messages: no message of role 'user'"),
        ({"logprobs": {"content": [{"token": "x"}]}}, "line 1: field logprobs.content.*`logprob`"),
    ):
        predictions.write_text("\n".join([json.dumps({**json.loads(lines[0]), **change}), *lines[1:]]))
        with pytest.raises(FFRError, match=message):
            score(source, tmp_path / "d.parquet", predictions=predictions)
    predictions.write_text("\n".join(lines[1:]))
    with pytest.raises(FFRError, match="no answer to 1 of 160 rows"):
        score(source, tmp_path / "d.parquet", predictions=predictions)
    said: list[str] = []
    predictions.write_text("\n".join([json.dumps({**json.loads(lines[0]), "logprobs": None}), *lines[1:]]))
    score(source, tmp_path / "without.parquet", predictions=predictions, say=said.append)
    assert said[0].startswith("1 of 160 answers have no log-probabilities: their entropy is 10, as published")
    predictions.write_text("\n".join([json.dumps({**json.loads(lines[0]), "error": "400: too long"}), *lines[1:]]))
    with pytest.raises(
        FFRError, match=r"no answer to 1 of 160 .*1 predictions say .* no answer \(line 1: 400: too long"
    ):
        score(source, tmp_path / "d.parquet", predictions=predictions)
    assert not (tmp_path / "d.parquet").exists()


def test_whoever_wrote_the_predictions_the_difficulty_is_the_same(
    parquet: Path, predictions: Path, tmp_path: Path
) -> None:
    """ms-swift without an id and with contents in parts, as a JSON list; verl's dumps, without log-probabilities."""
    source = [parquet / "train.rl.parquet"]
    expected = score(source, tmp_path / "d.parquet", predictions=predictions).table
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    for row in rows:
        del row["dialogue_id"]
        row["messages"][1]["content"] = [{"type": "text", "text": row["messages"][1]["content"]}]
    (tmp_path / "swift.json").write_text(json.dumps(rows))
    found = score(source, tmp_path / "swift.parquet", predictions=tmp_path / "swift.json").table
    assert found.equals(expected)
    dumps = []
    for row in rows:
        texts = [message["role"] + "\n" + content_text(message["content"]) for message in row["messages"][:-1]]
        prompt = "\n".join([*texts, "assistant\n"]).replace("<image>", "")
        dumps.append(json.dumps({"input": prompt, "output": row["response"], "gts": row["labels"]}))
    (tmp_path / "verl.jsonl").write_text("\n".join(dumps))
    found = score(source, tmp_path / "v.parquet", predictions=tmp_path / "verl.jsonl", row_format="verl").table
    assert found.column("f1").equals(expected.column("f1"))


def test_answers_to_repeated_rows_are_told(parquet: Path, predictions: Path, tmp_path: Path) -> None:
    said: list[str] = []
    lines = predictions.read_text().splitlines()
    predictions.write_text("\n".join([*lines, *lines[:3], json.dumps({**json.loads(lines[0]), "response": "other"})]))
    source = [parquet / "train.rl.parquet"]
    found = score(source, tmp_path / "d.parquet", predictions=predictions, say=said.append).table
    assert said == [
        "4 answers are to rows that have one already (same dialogue, query and gold answer): the first of each counts"
    ]
    predictions.write_text("\n".join(lines))
    assert found.equals(score(source, tmp_path / "e.parquet", predictions=predictions).table)


def test_a_token_without_any_probability_leaves_numbers(parquet: Path, predictions: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in predictions.read_text().splitlines()]
    rows[0]["logprobs"] = {"content": [{"logprob": -math.inf}, {"logprob": -math.inf}]}
    predictions.write_text("\n".join(map(json.dumps, rows)))
    score([parquet / "train.rl.parquet"], tmp_path / "d.parquet", predictions=predictions)
    DifficultyFile(tmp_path / "d.parquet")


def damaged(table: pa.Table, name: str, value: Any) -> pa.Table:
    values = table.column(name).to_pylist()
    values[3] = value
    place = table.column_names.index(name)
    return table.set_column(place, name, pa.array(values, type=table.schema.field(name).type))


def test_difficulty_files_that_cannot_be_used(parquet: Path, predictions: Path, tmp_path: Path) -> None:
    path = tmp_path / "difficulty.parquet"
    score([parquet / "train.rl.parquet"], path, predictions=predictions)
    table = pq.read_table(path)
    for made, message in (
        (table.drop_columns(["entropy", "level"]), "no column entropy, level; make it with `ffr-verl score`"),
        (damaged(table, "f1", math.nan), "row 3: f1 is nan; make the file again with"),
        (damaged(table, "f1", 1.5), r"row 3: f1 is 1\.5"),
        (damaged(table, "entropy", math.inf), "row 3: entropy is inf"),
        (damaged(table, "f1", None), "column f1: 1 values are missing"),
        (damaged(table, "level", "simple"), "column level: found simple; expected easy"),
    ):
        pq.write_table(made, path)
        with pytest.raises(FFRError, match=message):
            DifficultyFile(path)
    entropy_of_one_token = token_entropy([-0.3])
    assert -1e-9 < entropy_of_one_token < 0
    pq.write_table(damaged(table, "entropy", entropy_of_one_token), path)
    DifficultyFile(path)
    pq.write_table(table.slice(0, 100), path)
    with pytest.raises(FFRError, match=r"60 of 160 rows of train are not in it \(row 100 \.\.\.\); score them"):
        DifficultyFile(path).of_rows(row_keys([parquet / "train.rl.parquet"]), name="train")
    with pytest.raises(FFRError, match="of another data set: 16 of 16 rows of heldout are not in it"):
        DifficultyFile(path).of_rows(row_keys([parquet / "heldout.rl.parquet"]), name="heldout")
    with pytest.raises(FFRError, match="no such file; make it with `ffr-verl score`"):
        DifficultyFile(tmp_path / "none.parquet")
    with pytest.raises(FFRError, match="not a parquet file"):
        DifficultyFile(predictions)


def test_a_key_tells_rows_apart() -> None:
    keys = {row_key(*values) for values in (("a", "b", "c"), ("a", "b", "d"), ("ab", "", "c"), ("a", "bc", ""))}
    assert len(keys) == 4


def test_ids_in_a_thought_are_no_answer() -> None:
    gold = format_fragment(Fragment((3,), ()))
    draft = format_fragment(Fragment((0,), (0,)))
    info = {"dialogue_id": "d", "query": "q"}
    rows = [{"extra_info": info, "reward_model": {"ground_truth": gold}}]
    response = f"<think>At first sight {draft}, but no.</think><answer>{gold}</answer>"
    table = difficulty_table(rows, [{"response": response, "logprobs": []}], model="m", style="reasoning")
    assert table.column("f1").to_pylist() == [1.0]
    assert table.column("malformed").to_pylist() == [False]
    assert table.column("images").to_pylist() == [0]
