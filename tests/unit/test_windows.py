"""Windows over long dialogues: every turn is in one, and the way back gives the whole answer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl.data.demo import demo_rows
from ffr_verl.data.prepare import PrepareSummary, prepare
from ffr_verl.data.windows import (
    Window,
    WindowIds,
    WindowSettings,
    cut_prompt,
    whole_fragment,
    window_id,
    windows_of,
)
from ffr_verl.dialogues import Dialogue, Utterance, parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment, parse_fragment
from ffr_verl.rewards import CoherenceScorer, compute_score, diagnose

IDS: list[WindowIds] = ["global", "published"]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Dialogue, Fragment, WindowSettings]:
    source = random.Random(draw(st.integers(0, 10**6)))
    turns = draw(st.integers(1, 30))
    utterances, images = [], 0
    for number in range(turns):
        held = source.choice((0, 0, 0, 1, 2))
        utterances.append(Utterance(number, "a", f"text {number}", tuple(range(images, images + held))))
        images += held
    gold = Fragment(
        tuple(sorted(source.sample(range(turns), source.randint(0, turns)))),
        tuple(sorted(source.sample(range(images), source.randint(0, images)))),
    )
    size = draw(st.integers(1, 12))
    settings = WindowSettings(size, draw(st.integers(1, size)), draw(st.sampled_from(IDS)))
    return Dialogue("d", tuple(utterances), "q"), gold, settings


@given(cases())
def test_cutting_and_uniting_are_each_others_inverse(case: tuple[Dialogue, Fragment, WindowSettings]) -> None:
    dialogue, gold, settings = case
    turns = len(dialogue.utterances)
    windows = windows_of("d", dialogue.image_utterances, turns, settings)
    if turns <= settings.turns:
        assert not windows
        return
    assert whole_fragment([(window, window.part_of(gold)) for window in windows]) == gold
    assert {number for window in windows for number in range(*window.utterances)} == set(range(turns))
    assert all(window.utterances[1] - window.utterances[0] == settings.turns for window in windows)
    prompt = dialogue.to_prompt("Find it.")
    for number, window in enumerate(windows):
        assert window_id(window.dialogue_id) == ("d", number)
        found = parse_dialogue([{"role": "user", "content": cut_prompt(prompt, window)}], "d")
        shown = dialogue.utterances[slice(*window.utterances)]
        assert [(one.id, one.text, len(one.image_ids)) for one in found.utterances] == [
            (one.id, one.text, len(one.image_ids)) for one in shown
        ]
        first = window.images[0] if settings.ids == "global" else 0
        assert found.image_ids == tuple(range(first, first + window.images[1] - window.images[0]))


@pytest.mark.parametrize(("turns", "stride"), [(0, 1), (3, 0), (3, 4)])
def test_windows_that_would_lose_turns_are_refused(turns: int, stride: int) -> None:
    with pytest.raises(FFRError, match=r"--window: found 0|--stride: found \d; give 1 to 3"):
        WindowSettings(turns, stride, "global")


def test_ids_that_are_no_windows() -> None:
    assert window_id("d_split_") is None
    assert window_id("_split_1") is None
    assert window_id("a_split_1_split_12") == ("a_split_1", 12)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = list(
        demo_rows(tmp_path / "images", rows=8, turns_per_topic=(3, 6), image_share=0.5, empty_share=0.0, seed=5)
    )
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def prepared(source: Path, **options: Any) -> PrepareSummary:
    return prepare(source, images_root=source.parent, output=source.parent / "out", split="t", **options)


@pytest.mark.parametrize("ids", IDS)
def test_prepared_windows_can_be_scored_and_united(source: Path, ids: WindowIds) -> None:
    originals = {row["dialogue_id"]: row for row in json.loads(source.read_text())}
    rows = pq.read_table(prepared(source, window=WindowSettings(7, 4, ids)).rl_path).to_pylist()
    assert len(rows) > len(originals)
    parts: dict[str, list[tuple[Window, Fragment]]] = {}
    vectors: dict[str, list[float]] = {}
    for row in rows:
        info, solution = row["extra_info"], row["reward_model"]["ground_truth"]
        for identifier in info["utterance_ids"]:
            vectors[f"utt:{info['dialogue_id']}:{identifier}"] = [1.0, 0.0]
        vectors |= {f"img:{name}": [1.0, 0.0] for name in info["images"]}
        assert info["image_ids"] == list(parse_dialogue(row["prompt"], "").image_ids)
        assert row["images"] == info["images"]
        assert len(info["image_ids"]) == len(info["image_utterances"]) == len(info["images"])
        scores = compute_score("", solution, solution, info, weights={"f1": 1.0, "mcc": 0.0})
        assert (scores["f1"], scores["format"], scores["exact_match"]) == (1.0, 1.0, 1.0)
        assert diagnose(solution, solution, extra_info=info).malformed is None
        gold = parse_fragment(solution)
        assert gold is not None
        count = len(gold.utterance_ids) + len(
            {info["image_utterances"][info["image_ids"].index(i)] for i in gold.image_ids}
        )
        coherence = CoherenceScorer(vectors).score(gold, gold, info)  # type: ignore[arg-type]
        assert coherence == pytest.approx(1.0 if count != 1 else 0.5), "every image is found under its id"
        window = info["window"]
        if window is None:
            assert info["dialogue_id"] in originals
            continue
        identifiers = info["utterance_ids"]
        assert identifiers == list(range(window["first_utterance"], window["first_utterance"] + 7))
        whole = Window(
            window["of"],
            window["number"],
            (identifiers[0], identifiers[-1] + 1),
            (window["first_image"], window["first_image"] + len(info["images"])),
            window["ids"],
        )
        assert whole.dialogue_id == info["dialogue_id"]
        parts.setdefault(window["of"], []).append((whole, gold))
    for identifier, windows in parts.items():
        assert whole_fragment(windows) == parse_fragment(originals[identifier]["solution"])


def test_the_closing_table_counts_whole_dialogues_and_windows(source: Path) -> None:
    whole = prepared(source, max_images=64).statistics
    cut = prepared(source, window=WindowSettings(7, 7, "global")).statistics
    names = ("dialogues", "turns_mean", "turns_p95", "images_mean", "images_p95")
    assert [cut[name] for name in names] == [whole[name] for name in names]
    assert cut["row_turns_p95"] == 7 < whole["row_turns_mean"]  # type: ignore[operator]


def test_limits_are_those_of_the_windows(source: Path) -> None:
    with pytest.raises(FFRError, match="too_many_images"):
        prepared(source, max_images=3)
    assert prepared(source, max_images=7, window=WindowSettings(7, 4, "global")).rows > 8


@pytest.mark.parametrize("kind", ["rl", "sft"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("embed_images", [False, True], ids=["paths", "embedded"])
@pytest.mark.parametrize("ours", [None, WindowSettings(7, 4, "global"), WindowSettings(5, 2, "published")])
def test_a_dialogue_of_another_split_is_found_however_either_was_cut(
    source: Path, kind: str, ids: WindowIds, embed_images: bool, ours: WindowSettings | None
) -> None:
    other = prepared(source, window=WindowSettings(7, 4, ids), embed_images=embed_images)
    file = other.rl_path if kind == "rl" else other.sft_path
    file = file.rename(source.parent / "other.parquet")
    with pytest.raises(
        FFRError, match=r"other_split \(8 rows\)[\s\S]*dialogue demo_00000 is in .*other\.parquet"
    ) as told:
        prepared(source, window=ours, against=[file])
    assert "window demo" not in str(told.value), "said once for a dialogue"


def test_a_window_alone_is_found_in_another_split(source: Path) -> None:
    """A source may hold windows that were cut before."""
    whole = pq.read_table(prepared(source, window=WindowSettings(7, 4, "global")).sft_path).to_pylist()
    window = next(row for row in whole if row["dialogue_id"].endswith("_split_0"))
    window["solution"] = window["messages"][-1]["content"]
    (source.parent / "window.json").write_text(json.dumps([window]))
    options = {"images_root": source.parent, "output": source.parent / "out"}
    other = prepare(source.parent / "window.json", split="w", **options).rl_path  # type: ignore[arg-type]
    with pytest.raises(FFRError, match=r"other_split \(1 row\)[\s\S]*window demo_\d+_split_0 is in .*w\.rl\.parquet"):
        prepared(source, window=WindowSettings(7, 4, "global"), against=[other])
