"""Predictions of every kind, drawn by a seeded generator; a plain module beside the tests that need them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest

from ffr_verl.evaluation import BootstrapSettings
from ffr_verl.fragments import Fragment, format_fragment

NONE = BootstrapSettings(resamples=0)
Row = dict[str, Any]


def prompt_of(turns: Iterable[int], images: Iterable[int], query: str = "it") -> str:
    lines = [f"<|utt_id_start|>{turn}<|utt_id_end|> a: b" for turn in turns]
    pictures = [f"<|img_id_start|>{image}<|img_id_end|><image>" for image in images]
    return f"Find <|query_start|>{query}<|query_end|>\n" + "\n".join([*lines, *pictures])


def row_of(answer: str | Fragment, gold: Fragment, *, turns: int = 9, images: int = 3, number: int = 0) -> Row:
    return {
        "response": answer if isinstance(answer, str) else format_fragment(answer),
        "labels": format_fragment(gold),
        "messages": [{"role": "user", "content": prompt_of(range(turns), range(images), f"query {number}")}],
        "images": [f"{image}.jpg" for image in range(images)],
        "dialogue_id": f"d{number // 3}",
    }


def fragments(source: random.Random, turns: int, images: int) -> Fragment:
    if source.random() < 0.2:
        return Fragment((), ())
    return Fragment(
        tuple(source.sample(range(turns), source.randint(0, min(turns, 6)))),
        tuple(source.sample(range(images), source.randint(0, min(images, 2)))),
    )


def spoilt(source: random.Random, text: str) -> str:
    """An answer as models get it wrong."""
    return source.choice(
        [
            "",
            text[:-7],
            "I think " + text,
            text.replace("]", ",]", 1),
            text.replace(", ", " "),
            text.replace("[", "[1, 1, ", 1).replace(", ]", "]"),
            text.replace("[", "[50, ", 1).replace(", ]", "]"),
            text.replace("[", "[01, ", 1).replace(", ]", "]"),
            text.replace("[", "[-1, ", 1).replace(", ]", "]"),
            text.replace("[", "[2.0, ", 1).replace(", ]", "]"),
            text + text,
        ]
    )


def drawn(count: int, seed: int = 0) -> list[Row]:
    """Rows of every kind."""
    source = random.Random(seed)
    rows = []
    for number in range(count):
        turns, images = source.randint(1, 60), source.choice([0, 0, 1, 5, 30])
        gold = fragments(source, turns, images)
        if source.random() < 0.05:  # a gold answer that names what the dialogue does not have
            gold = Fragment((*gold.utterance_ids, turns + 3), (*gold.image_ids, max(images, 21) + 3))
        answer = format_fragment(gold if source.random() < 0.3 else fragments(source, turns, images))
        answer = spoilt(source, answer) if source.random() < 0.3 else answer
        rows.append(row_of(answer, gold, turns=turns, images=images, number=number))
    return rows


def mixed(rows: int, right: int) -> list[Row]:
    gold = Fragment((1, 2), (0,))
    return [row_of(gold if number < right else "", gold, number=number) for number in range(rows)]


def assert_nearly(found: Any, expected: Any) -> None:
    for modality, values in expected.items():
        assert found[modality] == pytest.approx(values, abs=1e-9), modality
