"""Ten thousand answers that no model should give: nothing is raised, the keys stay, so does the range."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.near_misses import near_misses
from ffr_verl import Fragment, format_fragment, parse_fragment
from ffr_verl.embeddings import write_store
from ffr_verl.rewards import CoherenceMode, compute_score, diagnose

KEYS = ["score", "f1", "f1_utterances", "f1_images", "coherence", "format", "exact_match"]
MODES = get_args(CoherenceMode)
GOLD = format_fragment(Fragment((1, 2), (0,)))
INFO = {"dialogue_id": "d", "utterance_ids": [0, 1, 2, 3], "image_utterances": [1], "images": ["a.png"]}


def check(answer: str, store: str, style: str, mode: str = "continuous") -> None:
    scores = compute_score("ffr/mldr", answer, GOLD, INFO, embeddings=store, answer_style=style, coherence_mode=mode)
    assert list(scores) == KEYS
    assert all(type(value) is float and math.isfinite(value) for value in scores.values())
    assert -1.0 <= scores["coherence"] <= 1.0
    assert 0.0 <= scores["f1"] <= 1.0
    found = diagnose(answer, GOLD, extra_info=INFO, style=style)  # type: ignore[arg-type]
    assert (scores["format"] == 0.0) == (found.malformed is not None and found.malformed != "id_outside_dialogue")


def store_in(folder: Path) -> str:
    if not (folder / "fuzz").exists():
        keys = ["utt:d:0", "utt:d:1", "utt:d:2", "utt:d:3", "img:a.png"]
        write_store(folder / "fuzz", zip(keys, np.eye(5), strict=True), model="toy")
    return str(folder / "fuzz")


def test_ten_thousand_near_misses(tmp_path: Path) -> None:
    store, answers = store_in(tmp_path), near_misses(random.Random(0))
    sound = 0
    for number, answer in zip(range(10_000), answers, strict=False):
        check(answer, store, "reasoning" if number % 3 == 2 else "plain", MODES[number % 7 % 3])
        sound += parse_fragment(answer) is not None
    assert 100 < sound < 6_000, "the generator must stay near the format, and miss it"


@settings(max_examples=200)
@given(st.text(max_size=200), st.sampled_from(["plain", "reasoning"]))
def test_any_text(tmp_path_factory: object, answer: str, style: str) -> None:
    check(answer, store_in(tmp_path_factory.getbasetemp()), style)  # type: ignore[attr-defined]


@settings(max_examples=200)
@given(
    st.from_regex(
        r"<\|utt_ids_start\|>\[[0-9, ]*\]<\|utt_ids_end\|>;?<\|img_ids_start\|>\[[\d,\s]*\]<\|img_ids_end\|>.?"
    )
)
def test_texts_around_the_format(tmp_path_factory: object, answer: str) -> None:
    check(answer, store_in(tmp_path_factory.getbasetemp()), "plain")  # type: ignore[attr-defined]
