"""Relevance: hand-computed values, what it refuses, and that it comes through the door that others use."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffr_verl import Fragment, format_fragment
from ffr_verl.embeddings import query_key, write_store
from ffr_verl.errors import FFRError
from ffr_verl.rewards import RewardConfig, batch, compute_score
from ffr_verl.rewards.relevance import relevance_reward

ROOT = Path(__file__).parents[2]
INFO: dict[str, Any] = {
    "dialogue_id": "d",
    "split": "train",
    "query": "a cat",
    "utterance_ids": [0, 1, 2, 3],
    "image_utterances": [1, 3],
    "images": ["cat.png", "dog.png"],
}
# Cosines with the query: 1, 0.6, 0, and utterance 3 has no vector; images 0.8 and 0.
VECTORS: dict[str, Any] = {
    "qry:a cat": [2.0, 0.0],
    "utt:d:0": [3.0, 0.0],
    "utt:d:1": [0.6, 0.8],
    "utt:d:2": [0.0, 5.0],
    "img:cat.png": [0.8, -0.6],
    "img:dog.png": [0.0, 1.0],
}


def fragment(utterances: list[int], images: list[int] | None = None) -> str:
    return format_fragment(Fragment(tuple(utterances), tuple(images or [])))


GOLD = fragment([0, 1], [0])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (fragment([0]), (1 + (1.0 - 0.3)) / 2),
        (fragment([2]), (1 + (0.0 - 0.8)) / 2),
        (fragment([0, 1]), (1 + (0.8 - 0.0)) / 2),
        (fragment([0, 1, 1, 3, 9]), 0.9),  # a repeat, one without a vector, one outside
        (fragment([], [0]), 1.0),
        (fragment([0, 1], [1]), (2 * 0.9 + 0.0) / 3),
        (fragment([0, 1, 2], [0]), 1.0),  # all utterances say nothing
        (fragment([0, 1, 2, 3], [0, 1]), 0.0),  # everything
        (fragment([3]), 0.0),
        (fragment([]), 0.0),
        ("no idea", 0.0),
    ],
)
def test_by_hand(answer: str, expected: float) -> None:
    assert relevance_reward(answer, GOLD, extra_info=INFO, store=VECTORS) == pytest.approx(expected)


def test_empty_and_malformed_golds() -> None:
    values = [
        relevance_reward(answer, gold, extra_info=INFO, store=VECTORS)
        for answer, gold in ((fragment([]), fragment([])), (GOLD, fragment([])), ("no", fragment([])), (GOLD, "no"))
    ]
    assert values == [1.0, 0.0, 0.0, 0.0]


def test_elements_that_are_all_alike_are_chance() -> None:
    same = {key: [1.0, 1.0] for key in VECTORS}
    assert relevance_reward(fragment([0]), GOLD, extra_info=INFO, store=same) == 0.5


def test_an_id_of_another_split_is_found(tmp_path: Path) -> None:
    moved = {key.replace("utt:d:", "utt:train/d:"): vector for key, vector in VECTORS.items()}
    for vectors in (VECTORS, {**moved, "utt:d:0": [0.0, 1.0]}):
        path = tmp_path / str(len(vectors))
        write_store(path, ((key, np.array(vector)) for key, vector in vectors.items()), model="toy")
        for _ in range(2):  # measured, and kept
            value = relevance_reward(fragment([0]), GOLD, extra_info=INFO, store=path)
            assert value == pytest.approx(0.85)
        another = relevance_reward(fragment([0]), GOLD, extra_info={**INFO, "utterance_ids": [0, 2]}, store=path)
        assert another == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("info", "store", "message"),
    [
        ({"query": None}, VECTORS, r"extra_info\.query: found None, expected the query as text"),
        ({"query": " "}, VECTORS, r"extra_info\.query: found ' '"),
        ({"query": "a dog"}, VECTORS, r"no vector for the query 'a dog'; make it again with `ffr-verl embed`"),
        ({"dialogue_id": "e", "images": ["x", "y"]}, VECTORS, r"no vector for dialogue 'e' .*make the store of this"),
        ({}, {**VECTORS, "utt:d:1": [math.nan, 1.0]}, r"utt:d:0 and others: expected vectors of finite numbers"),
        ({}, {**VECTORS, "utt:d:1": [1.0]}, "expected vectors of finite numbers"),
        ({"images": None}, VECTORS, "extra_info: .*missing: images"),
    ],
)
def test_what_it_refuses(info: dict[str, Any], store: dict[str, Any], message: str) -> None:
    with pytest.raises(FFRError, match=message):
        relevance_reward(GOLD, GOLD, extra_info={**INFO, **info}, store=store)


def test_a_store_of_before_says_to_embed_again(tmp_path: Path) -> None:
    older = {key: np.array(vector) for key, vector in VECTORS.items() if not key.startswith("qry:")}
    write_store(tmp_path / "older", older.items(), model="toy")
    with pytest.raises(FFRError, match=r"older: holds no queries, which relevance needs; make it again with `ffr-ver"):
        relevance_reward(GOLD, GOLD, extra_info=INFO, store=tmp_path / "older")
    kwargs = {"weights": {"coherence": 1.0}, "embeddings": str(tmp_path / "older")}
    assert compute_score("", GOLD, GOLD, INFO, **kwargs)["coherence"] > 0, "still read"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package with the entry points of this one's pyproject.toml, and one of somebody else."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'\[project\.entry-points\."ffr_verl\.rewards"\]\n((?:\w+ = ".*"\n)+)', text)
    assert found is not None
    folder = tmp_path / "site" / "package_of_others-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: package-of-others\nVersion: 1.0\n")
    points = found[1].replace('"', "")
    (folder / "entry_points.txt").write_text(f"[ffr_verl.rewards]\n{points}broken = no_such_module:reward\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    importlib.invalidate_caches()


@pytest.mark.usefixtures("installed")
def test_a_weight_is_enough(tmp_path: Path) -> None:
    write_store(tmp_path / "store", ((key, np.array(one)) for key, one in VECTORS.items()), model="toy")
    kwargs = {"weights": {"f1": 1.0, "relevance": 0.5}, "embeddings": str(tmp_path / "store")}
    found = compute_score("", fragment([0]), GOLD, INFO, **kwargs)
    assert found["relevance"] == pytest.approx(0.85)
    assert found["score"] == pytest.approx(found["f1"] + 0.5 * 0.85)
    reward = batch.component("relevance", embeddings=str(tmp_path / "store"))
    assert reward.__name__ == "relevance"
    assert reward([GOLD], [GOLD], extra_info=[INFO]) == pytest.approx([(2 * 0.9 + 1.0) / 3])
    with pytest.raises(FFRError, match=r"components\.relevance: relevance needs an embedding store: give reward_kwa"):
        RewardConfig.from_kwargs({"weights": {"relevance": 1.0}})
    with pytest.raises(
        FFRError, match=r"broken \(entry point no_such_module:reward of package-of-others\): cannot be"
    ):
        RewardConfig.from_kwargs({"weights": {"broken": 1.0}})
    with pytest.raises(FFRError, match=r"weights\.relevanc: unknown key; did you mean 'relevance'\?"):
        RewardConfig.from_kwargs({"weights": {"relevanc": 1.0}})


def test_keys_of_queries() -> None:
    assert query_key(" a cat\n") == "qry:a cat"
