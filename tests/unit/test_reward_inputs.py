"""What rewards are handed from outside: nothing that a model writes raises, and everything else is named."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl import Fragment, format_fragment
from ffr_verl.embeddings import EmbeddingStore, write_store
from ffr_verl.embeddings.store import open_store
from ffr_verl.errors import FFRError
from ffr_verl.evaluation import confusion, mcc
from ffr_verl.metrics import list_f_score
from ffr_verl.rewards import (
    batch,
    coherence_reward,
    compute_score,
    diagnose,
    exact_match_reward,
    f1_reward,
    format_reward,
    mcc_reward,
)
from ffr_verl.rewards.f1 import f1_of_ids
from ffr_verl.rewards.ffr import id_credits
from ffr_verl.rewards.mcc import mcc_of_ids
from ffr_verl.rewards.table import DEFAULT_WEIGHTS, REWARDS
from ffr_verl.samplers.difficulty import difficulty_f1

INFO: dict[str, Any] = {
    "dialogue_id": "d",
    "split": "train",
    "utterance_ids": [0, 1],
    "image_ids": [0],
    "image_utterances": [0],
    "images": ["a.png"],
}
STORE: dict[str, Any] = {"utt:d:0": [1.0, 0.0], "utt:d:1": [0.0, 1.0], "img:a.png": [1.0, 1.0]}
BOTH = format_fragment(Fragment((0, 1), (0,)))
TEXTS = format_fragment(Fragment((0, 1), ()))
FUNCTIONS = {
    "f1": f1_reward,
    "exact_match": exact_match_reward,
    "mcc": lambda one, gold: mcc_reward(one, gold, n_utterances=2, n_images=1),
    "coherence": lambda one, gold: coherence_reward(one, gold, extra_info=INFO, store=STORE),
    "compute_score": lambda one, gold: compute_score(None, one, gold, INFO)["score"],
    "diagnose": lambda one, gold: float(diagnose(one, gold, extra_info=INFO).predicted_utterances),
}
messages = st.dictionaries(
    st.sampled_from(["role", "content", "tool_calls"]),
    st.one_of(
        st.none(),
        st.sampled_from(["assistant", "tool", BOTH]),
        st.lists(st.one_of(st.none(), st.text(), st.fixed_dictionaries({"type": st.text(), "text": st.none()}))),
    ),
)


@given(st.one_of(st.none(), st.text(), st.lists(messages)))
def test_nothing_that_a_model_writes_raises(completion: Any) -> None:
    for function in FUNCTIONS.values():
        assert -1.0 <= function(completion, BOTH) <= 2.0
    assert format_reward(completion) in (0.0, 1.0)
    id_credits(completion, BOTH, INFO, f1_mode="micro")


def test_a_model_that_said_nothing_earns_nothing() -> None:
    assert compute_score(None, None, BOTH)["score"] == 0.0  # type: ignore[arg-type]
    for said in (None, [], [{"role": "assistant", "content": None}], [{"role": "tool", "content": BOTH}]):
        assert batch.ffr([said], [BOTH]) == batch.format([said]) == [0.0]
    thought = [{"type": "reasoning", "text": "no"}, {"type": "text", "text": BOTH}]
    assert batch.exact_match([[{"role": "assistant", "content": thought}]], [BOTH]) == [1.0]


@pytest.mark.parametrize("completion", [3, b"x", ["x"], {1, 2}])
def test_what_no_model_writes_is_named(completion: Any) -> None:
    for name, function in FUNCTIONS.items():
        with pytest.raises(FFRError, match=r"completion: found \w+( of str)?, expected a text or a list of messages"):
            assert function(completion, BOTH) is None, name


@pytest.mark.parametrize(("gold", "found"), [(None, "None"), ({"ids": [1]}, "dict"), (3, "int"), ([BOTH], "list")])
def test_a_gold_that_is_no_text_is_named(gold: Any, found: str) -> None:
    for name, function in FUNCTIONS.items():
        field = "ground_truth" if name == "compute_score" else "solution"
        with pytest.raises(FFRError, match=f"{field}: found {found}, expected the gold answer as text"):
            function(BOTH, gold)
    with pytest.raises(FFRError, match=f"row 1 of the batch: solution: found {found}"):
        batch.f1([BOTH, BOTH], [BOTH, gold])
    with pytest.raises(FFRError, match="row 0 of the batch: solution: found None"):
        batch.f1([BOTH])


def test_verls_own_arguments_are_taken() -> None:
    """verl's managers hand them over where a reward model runs beside."""
    scores = compute_score(
        data_source="ffr/mldr",
        solution_str=BOTH,
        ground_truth=BOTH,
        extra_info=INFO,
        reward_router_address="127.0.0.1:1",
        reward_model_tokenizer=object(),
    )
    assert scores == compute_score("ffr/mldr", BOTH, BOTH, INFO)


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"utterance_ids": [0.0, 1.0]},
        {"utterance_ids": np.array([0, 1]), "image_utterances": np.array([0]), "image_ids": np.array([0])},
        {"utterance_ids": (np.int64(0), np.int64(1)), "image_ids": None, "split": None},
        {"images": [{"path": "a.png", "bytes": None}]},
        {"images": np.array(["a.png"], dtype=object)},
    ],
)
def test_ids_and_images_in_another_dress_give_the_same_number(other: dict[str, Any]) -> None:
    assert coherence_reward(BOTH, BOTH, extra_info={**INFO, **other}, store=STORE) == pytest.approx(0.5**0.5)
    assert compute_score("", BOTH, TEXTS, {**INFO, **other}, weights={"mcc": 1.0})["mcc"] == 0.0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"utterance_ids": ["0", "1"]}, r"extra_info\.utterance_ids: found '0' \(str\), expected whole numbers"),
        ({"utterance_ids": [0, 0.5]}, r"extra_info\.utterance_ids: found 0\.5 \(float\), expected whole numbers"),
        ({"utterance_ids": [0, float("nan")]}, r"extra_info\.utterance_ids: found nan \(float\)"),
        ({"utterance_ids": [None, 1]}, r"extra_info\.utterance_ids: found \(NoneType\), expected whole numbers"),
        ({"utterance_ids": "01"}, r"extra_info\.utterance_ids: found '01' \(str\), expected a list"),
        ({"utterance_ids": 2}, r"extra_info\.utterance_ids: found 2 \(int\), expected a list"),
        ({"image_utterances": ["0"]}, r"extra_info\.image_utterances: found '0' \(str\), expected whole numbers"),
        ({"image_ids": [0, 1]}, r"extra_info: 2 image_ids for 1 images"),
        ({"images": [b"png"]}, r"extra_info\.images: found \(bytes\), expected the image's path"),
        ({"dialogue_id": ["d"]}, r"extra_info\.dialogue_id: found \(list\), expected a text or a whole number"),
        ({"split": ["train"]}, r"extra_info\.split: found \(list\), expected a text"),
    ],
)
def test_ids_that_are_none_are_named(other: dict[str, Any], message: str) -> None:
    """By an open store too, whether or not it knows the dialogue already."""
    with pytest.raises(FFRError, match=message):
        coherence_reward(BOTH, BOTH, extra_info={**INFO, **other}, store=STORE)
    if "utterance_ids" in other:
        with pytest.raises(FFRError, match=message):
            compute_score("", BOTH, BOTH, {**INFO, **other}, weights={"mcc": 1.0})
        with pytest.raises(FFRError, match=message):
            diagnose(BOTH, BOTH, extra_info={**INFO, **other})


@pytest.mark.parametrize("info", ["d", ["d"], 3])
def test_extra_info_that_is_no_mapping_is_named(info: Any) -> None:
    with pytest.raises(FFRError, match=f"extra_info: found {type(info).__name__}, expected a mapping"):
        coherence_reward(BOTH, BOTH, extra_info=info, store=STORE)
    with pytest.raises(FFRError, match=f"extra_info: found {type(info).__name__}, expected a mapping"):
        compute_score("", BOTH, BOTH, info, weights={"mcc": 1.0})


@pytest.mark.parametrize("vector", [[1.0, float("nan")], [float("inf"), 0.0], ["a", "b"], [[1.0], [0.0]], 3.0])
def test_a_vector_without_a_number_is_named(vector: Any) -> None:
    for key in STORE:
        with pytest.raises(FFRError, match=f"{key}: found .*, expected a vector of finite numbers"):
            coherence_reward(BOTH, BOTH, extra_info=INFO, store={**STORE, key: vector})
    with pytest.raises(FFRError, match="utt:d:1: found 3 numbers where others are 2"):
        coherence_reward(BOTH, BOTH, extra_info=INFO, store={**STORE, "utt:d:1": [1.0, 0.0, 0.0]})


@pytest.mark.parametrize(
    ("reward", "settings", "message"),
    [
        (batch.f1, {"length_penalty": 95}, r"f1\.length_penalty: found 95, expected a number from 0 to 1"),
        (batch.f1, {"beta": 0}, r"f1\.beta: found 0, expected a number above 0"),
        (batch.f1, {"utterance_weight": float("nan")}, r"f1\.utterance_weight: found nan"),
        (batch.format, {"style": "xml"}, r"format\.style: found 'xml', expected one of plain, reasoning"),
        (batch.coherence, {"mode": "contnuous"}, r"coherence\.mode: found 'contnuous', expected one of published"),
        (batch.coherence, {"store": "no/such/folder"}, r"coherence\.store: no/such/folder: no such folder"),
        (batch.coherence, {"store": 3}, r"coherence\.store: found 3, expected the folder of an embedding store"),
        (batch.ffr, {"embeddings": "no/such/folder"}, r"ffr\.embeddings: no/such/folder: no such folder"),
        (batch.ffr, {"reward_kwargs": 3}, r"ffr\.reward_kwargs: found 3, expected a mapping"),
        (len, {}, "configure: found <built-in function len>, expected a reward of"),
        (batch.ffr, {"length_penalty": 95}, r"ffr\.length_penalty: found 95"),
        (batch.ffr, {"reward_kwargs": {"weights": {"f2": 1}}}, r"reward_kwargs\.weights\.f2: unknown key"),
    ],
)
def test_a_reward_is_configured_only_with_what_it_takes(reward: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FFRError, match=message):
        batch.configure(reward, **settings)


def test_settings_of_the_composed_reward_are_given_one_by_one_or_together() -> None:
    for settings in ({"weights": {"f1": 2.0}}, {"reward_kwargs": {"weights": {"f1": 2.0}}}):
        assert batch.configure(batch.ffr, **settings)([BOTH], [BOTH]) == [2.0]
    twice = batch.configure(batch.configure(batch.f1, length_penalty=1.0), utterance_weight=1.0)
    assert twice([BOTH], [TEXTS]) == [1.0]
    assert pickle.loads(pickle.dumps(twice))([BOTH], [TEXTS]) == [1.0]


def test_a_store_made_again_counts_at_once(tmp_path: Path) -> None:
    """By every way to it: a path in the settings, of a batch reward, of the reward function."""
    reward = None
    for second, expected in (([1.0, 0.0], 1.0), ([0.0, 1.0], 0.0), ([-1.0, 0.0], -1.0)):
        vectors = {"utt:d:0": np.array([1.0, 0.0]), "utt:d:1": np.array(second)}
        write_store(tmp_path / "store", vectors.items(), model="m", overwrite=True)
        reward = reward or batch.configure(batch.coherence, store=tmp_path / "store")
        opened = EmbeddingStore.open(tmp_path / "store")
        assert compute_score("", TEXTS, TEXTS, INFO, embeddings=str(tmp_path / "store"))["coherence"] == expected
        assert reward([TEXTS], [TEXTS], extra_info=[INFO]) == [expected]
        for store in (opened, tmp_path / "store"):
            assert coherence_reward(TEXTS, TEXTS, extra_info=INFO, store=store) == expected
        assert open_store(tmp_path / "store") is open_store(tmp_path / "." / "store")


def test_ids_changed_in_place_count_at_once(tmp_path: Path) -> None:
    write_store(tmp_path / "store", [(key, np.array(one)) for key, one in STORE.items()], model="m")
    info = {**INFO, "utterance_ids": [0, 1]}
    store = EmbeddingStore.open(tmp_path / "store")
    assert coherence_reward(TEXTS, TEXTS, extra_info=info, store=store) == 0.0
    info["utterance_ids"].remove(1)
    assert coherence_reward(TEXTS, TEXTS, extra_info=info, store=store) == 0.5


def test_a_window_that_keeps_its_ids_earns_what_the_same_one_counted_from_0_does() -> None:
    kept = {"utterance_ids": [20, 21, 22, 23, 24], "image_ids": [3, 4], "images": ["a.png", "b.png"]}
    counted = {"utterance_ids": [0, 1, 2, 3, 4], "image_ids": [0, 1], "images": ["a.png", "b.png"]}

    def both(utterances: tuple[int, ...], images: tuple[int, ...]) -> list[str]:
        return [
            format_fragment(Fragment(tuple(one + first for one in utterances), tuple(one + image for one in images)))
            for first, image in ((20, 3), (0, 0))
        ]

    for answer, gold in ((((1, 4), (0,)), ((1, 2), (0,))), (((1, 9), (7,)), ((1,), ())), (((), ()), ((0, 1), (1,)))):
        for settings in ({"weights": {"mcc": 1.0}}, {"f1_mode": "micro", "weights": {"f1": 1.0}}):
            scores = [
                compute_score("", one, right, info, **settings)
                for one, right, info in zip(both(*answer), both(*gold), (kept, counted), strict=True)
            ]
            assert scores[0] == pytest.approx(scores[1])
        credits = [
            [value for *_, value in id_credits(one, right, info, f1_mode="micro") or ()]
            for one, right, info in zip(both(*answer), both(*gold), (kept, counted), strict=True)
        ]
        assert credits[0] == pytest.approx(credits[1])


def test_columns_say_as_much_as_extra_info() -> None:
    """Of MLDR rows: a window's own image ids, the split, nothing where there is no image."""
    lines = [f"<|utt_id_start|>{one}<|utt_id_end|> a: x" for one in (20, 21)]
    lines[1] += "<|img_id_start|>3<|img_id_end|><image>"
    prompt = "<|query_start|>q<|query_end|>\n" + "\n".join(lines)
    gold = format_fragment(Fragment((20, 21), (3,)))
    store = {"utt:val/d:20": [1.0, 0.0], "utt:val/d:21": [0.0, 1.0], "utt:d:20": [5.0, 5.0], "img:a.png": [1.0, 1.0]}
    info = {"dialogue_id": "d", "split": "val", "utterance_ids": [20, 21], "image_ids": [3], "image_utterances": [21]}
    columns: Mapping[str, Any] = {"dialogue_id": ["d"], "prompts": [prompt], "split": ["val"], "images": [["a.png"]]}
    told = batch.coherence([gold], [gold], store=store, extra_info=[{**info, "images": ["a.png"]}])
    assert batch.coherence([gold], [gold], store=store, **columns) == told == [pytest.approx(0.5**0.5 / 2)]
    assert batch.coherence([gold], [gold], store=store, extra_info=[None], **columns) == told
    bare = {**columns, "images": [None], "prompts": [prompt.partition("<|img_id_start|>")[0]]}
    answer, gold = (format_fragment(Fragment((one,), ())) for one in (21, 20))
    assert batch.mcc([answer, gold], [gold, gold], **{name: one * 2 for name, one in bare.items()}) == [0.0, 1.0]


@given(st.lists(st.integers(0, 12), max_size=9), st.lists(st.integers(0, 9), max_size=6, unique=True))
def test_a_formula_has_one_value_everywhere(predicted: list[int], gold: list[int]) -> None:
    """The rewards', the evaluation's and the curriculum's, ids outside the dialogue and repeats included."""
    counts = confusion(predicted, gold, universe=10)
    if predicted or gold:
        assert mcc_of_ids(predicted, gold, count=10) == mcc(counts)
    of_arrays = list_f_score(*[np.array([one]) for one in (counts.tp, len(predicted), len(gold))])
    assert f1_of_ids(predicted, gold) == pytest.approx(float(of_arrays[0]))
    of_sets = f1_of_ids(sorted(set(predicted)), gold, length_penalty=1.0)
    assert difficulty_f1(Fragment(tuple(predicted), ()), Fragment(tuple(gold), ())) == (of_sets + 1) / 2


def test_the_docs_have_the_table_of_the_rewards() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    rows = [
        f"| [`{one.function.__name__}`](#{name.replace('_', '-')}) | {one.range} | {one.summary} | {one.weight:g} "
        f"| {one.source} |"
        for name, one in REWARDS.items()
    ]
    table = ["| name | range | value | default weight | source |", "|---|---|---|---|---|", *rows]
    assert "\n".join(table) in page
    weights = ", ".join(f"{name}: {weight}" for name, weight in DEFAULT_WEIGHTS.items())
    assert f"| `weights` | `{{{weights}}}` | of `f1`" in page
