"""Long dialogues of short ones: nothing is lost, queries ask for their part, dispersion follows its target."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl.cli import main
from ffr_verl.data.compose import ComposeSettings, build, dispersion_of, order_of_parts
from ffr_verl.data.prepare import prepare
from ffr_verl.errors import FFRError


@pytest.fixture
def short(tmp_path: Path) -> Path:
    path = tmp_path / "short.jsonl"
    rows = [
        {
            "dialogue_id": f"s{number}",
            "topic": f"topic {number % 5}",
            "query_text": f"about {number}",
            "summary": [f"in short {number}", f"of {number}"],
            "dialogue": [
                {"speaker": f"p{turn % 2}", "utterance": f"turn {turn} of {number}"} for turn in range(3 + number % 4)
            ],
        }
        for number in range(10)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.sampled_from(["blocks", "interleaved"]),
    st.one_of(st.none(), st.floats(1, 4)),
    st.integers(0, 1000),
)
def test_an_order_holds_every_turn_once(lengths: list[int], layout: Any, dispersion: float | None, seed: int) -> None:
    order = order_of_parts(lengths, layout, random.Random(seed), dispersion=dispersion)
    assert [order.count(part) for part in range(len(lengths))] == lengths
    if layout == "blocks":
        assert all(dispersion_of(order, part) == 1.0 for part in range(len(lengths)))


def test_built_dialogues(short: Path, tmp_path: Path) -> None:
    output = tmp_path / "long.jsonl"
    settings = ComposeSettings(queries=2, negatives=0.3)
    count, _ = build(short, output, dialogues=200, settings=settings, query_fields=["query_text", "summary"])
    assert count == 400
    negatives = 0
    for line in output.read_text().splitlines():
        made = json.loads(line)
        parts = [int(identifier[1:]) for identifier in made["parts"]]
        assert len({part % 5 for part in parts}) == 3, "of different topics"
        texts = [turn["utterance"] for turn in made["dialogue"]]
        for part in parts:
            assert [text for text in texts if text.endswith(f" of {part}")] == [
                f"turn {turn} of {part}" for turn in range(3 + part % 4)
            ]
        assert [turn["speaker"] for turn in made["dialogue"]][:2] == ["user1", "user2"]
        for query in made["queries"]:
            asked = {texts[turn].rsplit(" ", 1)[1] for turn in query["gt_turns"]}
            if not asked:
                negatives += 1
                continue
            (part,) = asked
            assert query["query_text"] in (f"about {part}", f"in short {part}", f"of {part}")
            assert len(query["gt_turns"]) == 3 + int(part) % 4
    assert 30 < negatives < 90
    again = tmp_path / "again.jsonl"
    build(short, again, dialogues=200, settings=settings, query_fields=["query_text", "summary"])
    assert again.read_bytes() == output.read_bytes()
    summary = prepare(output, images_root=tmp_path, output=tmp_path / "out", split="t", source_format="dialogue")
    assert summary.rows == 400


@pytest.mark.parametrize("wanted", [1.0, 1.5, 2.2])
def test_dispersion_follows_its_target(short: Path, tmp_path: Path, wanted: float) -> None:
    settings = ComposeSettings(layout="interleaved", dispersion=wanted, negatives=0.0)
    _, mean = build(short, tmp_path / "long.jsonl", dialogues=200, settings=settings)
    assert mean == pytest.approx(wanted, abs=0.15)


def test_blocks_and_speakers(short: Path, tmp_path: Path) -> None:
    settings = ComposeSettings(layout="blocks", keep_speakers=True, queries=4, negatives=0.0)
    count, mean = build(short, tmp_path / "long.jsonl", dialogues=20, settings=settings)
    assert mean == 1.0
    assert count == 80, "three parts, and one that is absent"
    made = json.loads((tmp_path / "long.jsonl").read_text().splitlines()[0])
    assert {turn["speaker"] for turn in made["dialogue"]} == {"p0", "p1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_text": ""}, r"short\.jsonl: row 0: no query in query_text; name the field with --query-field"),
        ({"dialogue": []}, r"row 0: field 'dialogue': missing or empty"),
        ({"dialogue": [{"utterance": "<image>"}]}, r"row 0: dialogue\[0\]\.utterance: holds <image>"),
    ],
)
def test_short_dialogues_that_cannot_be_used(
    short: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = [json.loads(line) for line in short.read_text().splitlines()]
    rows[0].update(change)
    short.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(FFRError, match=message):
        build(short, tmp_path / "long.jsonl", dialogues=2, settings=ComposeSettings())
    assert not (tmp_path / "long.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--topics", "5"], "10 dialogues of too few topics: a long dialogue needs 5 of different topics, and"),
        (["--negatives", "1.5"], "--negatives: found 1.5; give a share from 0 to 1"),
        (["--dispersion", "0.5"], "--dispersion: found 0.5; give a number from 1"),
        (["--queries", "9"], r"--queries: found 9; give 1 to 4 \(topics and one more\)"),
    ],
)
def test_options_that_do_not_fit(
    short: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    arguments = ["build", str(short), str(tmp_path / "long.jsonl"), "--dialogues", "3"]
    monkeypatch.setattr(sys, "argv", ["ffr-verl", *arguments, *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    monkeypatch.setattr(sys, "argv", ["ffr-verl", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert "3 dialogues, 3 queries, mean dispersion" in capsys.readouterr().out
