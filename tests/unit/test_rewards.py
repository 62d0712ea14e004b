"""Numbers of the rewards against hand-worked tables, scikit-learn and their invariants."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from sklearn.metrics import fbeta_score, matthews_corrcoef
from sklearn.preprocessing import MultiLabelBinarizer

from ffr_verl import Fragment, format_fragment
from ffr_verl.errors import FFRError
from ffr_verl.rewards import (
    batch,
    coherence_reward,
    compute_score,
    exact_match_reward,
    f1_reward,
    format_reward,
    mcc_reward,
)
from ffr_verl.rewards.f1 import f1_of_ids
from ffr_verl.rewards.mcc import mcc_of_ids

KEYS = {"score", "f1", "f1_utterances", "f1_images", "coherence", "format", "exact_match"}


def text(utterances: list[int], images: list[int]) -> str:
    return format_fragment(Fragment(tuple(utterances), tuple(images)))


@pytest.mark.parametrize(
    ("predicted", "gold", "expected"),
    [
        ([], [], 1.0),
        ([1], [], 0.0),
        ([], [1], 0.0),
        ([1, 2], [1, 2], 1.0),
        ([2, 1], [1, 2], 1.0),
        ([3], [1, 2], 0.0),
        ([1, 2], [1, 2, 3], 0.95 * 2 * 1.0 * (2 / 3) / (1.0 + 2 / 3)),
        ([1, 2, 3, 4], [1, 2], 0.95**2 * 2 * 0.5 * 1.0 / 1.5),
        # A repeated id counts in the denominator of the precision: 1 hit of 3 written, one too many.
        ([1, 1, 1], [1, 2], 0.95 * 2 * (1 / 3) * 0.5 / (1 / 3 + 0.5)),
    ],
)
def test_f1_of_ids(predicted: list[int], gold: list[int], expected: float) -> None:
    assert f1_of_ids(predicted, gold) == pytest.approx(expected)


id_sets = st.sets(st.integers(0, 25), min_size=1, max_size=15)


@given(id_sets, id_sets, st.sampled_from([0.5, 1.0, 2.0]))
def test_f1_agrees_with_scikit_learn(predicted: set[int], gold: set[int], beta: float) -> None:
    binarizer = MultiLabelBinarizer(classes=range(26))
    truth, guess = binarizer.fit_transform([gold, predicted])
    expected = fbeta_score(truth, guess, beta=beta, zero_division=0.0)
    assert f1_of_ids(sorted(predicted), sorted(gold), beta=beta, length_penalty=1.0) == pytest.approx(expected)


@given(id_sets, id_sets)
def test_f1_is_in_range_and_symmetric_for_beta_1(first: set[int], second: set[int]) -> None:
    value = f1_of_ids(sorted(first), sorted(second))
    assert 0.0 <= value <= 1.0
    assert value == pytest.approx(f1_of_ids(sorted(second), sorted(first)))
    assert (value == 1.0) == (first == second)


def test_f1_reward_weights_its_halves() -> None:
    gold = text([1, 2], [0])
    assert f1_reward(text([1, 2], []), gold) == pytest.approx(0.5)
    assert f1_reward(text([1, 2], []), gold, utterance_weight=0.8, image_weight=0.2) == pytest.approx(0.8)
    assert f1_reward("malformed", gold) == 0.0
    assert f1_reward(gold, "malformed") == 0.0


def test_reasoning_style_serves_every_reward() -> None:
    gold = text([1], [])
    wrapped = f"<think>…</think><answer>{gold}</answer>"
    for reward in (f1_reward, exact_match_reward):
        assert reward(wrapped, gold, style="reasoning") == 1.0
        assert reward(wrapped, gold) == 0.0
        assert reward(gold, gold, style="reasoning") == 0.0
    assert format_reward(wrapped, style="reasoning") == 1.0
    assert format_reward(gold, style="reasoning") == 0.0
    assert compute_score("", wrapped, gold, answer_style="reasoning")["score"] == pytest.approx(1.3)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (text([1, 2], [0]), {"f1": 1.0, "format": 1.0, "exact_match": 1.0, "score": 1.3}),
        (text([2, 1], [0]), {"f1": 1.0, "format": 1.0, "exact_match": 0.0, "score": 1.3}),
        (text([1, 2], []), {"f1": 0.5, "format": 1.0, "exact_match": 0.0, "score": 0.8}),
        (text([9], [9]), {"f1": 0.0, "format": 1.0, "exact_match": 0.0, "score": 0.3}),
        (text([1, 2, 2], [0]), {"format": 0.0, "exact_match": 0.0}),
        ("", {"f1": 0.0, "format": 0.0, "exact_match": 0.0, "score": 0.0}),
        (text([1, 2], [0]) + "<|im_end|>", {"f1": 0.0, "format": 0.0, "score": 0.0}),
    ],
)
def test_compute_score(completion: str, expected: dict[str, float]) -> None:
    scores = compute_score("ffr/mldr", completion, text([1, 2], [0]))
    assert set(scores) == KEYS
    assert {key: scores[key] for key in expected} == pytest.approx(expected)


@given(st.text(max_size=80), st.text(max_size=80))
def test_compute_score_never_raises_and_keeps_its_keys(completion: str, gold: str) -> None:
    scores = compute_score("ffr/mldr", completion, gold, {"index": 0})
    assert set(scores) == KEYS
    assert all(type(value) is float and math.isfinite(value) for value in scores.values())


@given(st.sets(st.integers(0, 30), max_size=12), st.sets(st.integers(0, 8), max_size=5), st.data())
def test_the_gold_answer_earns_the_most(utterances: set[int], images: set[int], data: st.DataObject) -> None:
    gold = text(sorted(utterances), sorted(images))
    other = text(
        data.draw(st.lists(st.integers(0, 30), max_size=12)), data.draw(st.lists(st.integers(0, 8), max_size=5))
    )
    assert compute_score("", gold, gold)["score"] == pytest.approx(1.3)
    assert compute_score("", other, gold)["score"] <= compute_score("", gold, gold)["score"] + 1e-12


def test_coherence_counts_only_with_embeddings() -> None:
    gold = text([1], [])
    without = compute_score("", gold, gold, weights={"f1": 1.0, "format": 0.3})
    with_weight = compute_score("", gold, gold, weights={"f1": 1.0, "coherence": 5.0, "format": 0.3})
    assert with_weight == without
    assert with_weight["coherence"] == 0.0


def test_missing_embeddings_are_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the threads of a reward worker meet the settings for the first time together."""
    monkeypatch.setattr("ffr_verl.rewards.ffr._SAID", threading.Lock())
    interval, barrier = sys.getswitchinterval(), threading.Barrier(8)

    def first(penalty: float) -> float:
        barrier.wait()
        return compute_score("", text([1], []), text([1], []), length_penalty=penalty)["coherence"]

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            assert set(threads.map(first, [0.123] * 8)) == {0.0}
    finally:
        sys.setswitchinterval(interval)
    for penalty in (0.5, 0.6):
        compute_score("", "", "", length_penalty=penalty)
    assert [record.getMessage() for record in caplog.records] == [
        "no embeddings configured: the coherence reward is 0 and its weight does not count"
    ]


@pytest.mark.parametrize(
    "weights",
    [{"f1": 1.0}, UserDict({"f1": 1.0}), OmegaConf.create({"f1": 1.0})],
)
def test_weights_changed_in_place_count_at_once(weights: Any) -> None:
    """verl passes the same node of its config with every call."""
    gold, rest = text([1], []), OmegaConf.create({"f1": 2.0})
    for value in (1.0, 3.0, 0.5):
        weights["f1"] = value
        assert compute_score("", gold, gold, weights=rest)["score"] == 2.0
        assert compute_score("", gold, gold, weights=weights)["score"] == value
    weights["f2"] = 1.0
    with pytest.raises(FFRError, match=r"weights\.f2: unknown key"):
        compute_score("", gold, gold, weights=weights)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lenght_penalty": 0.9}, r"reward_kwargs\.lenght_penalty: unknown key; did you mean 'length_penalty'\?"),
        ({"weights": {"fromat": 1.0}}, r"reward_kwargs\.weights\.fromat: unknown key; did you mean 'format'\?"),
        ({"weights": {"f1": -1.0}}, r"reward_kwargs\.weights\.f1: found -1\.0"),
        ({"weights": {"f1": "1"}}, r"reward_kwargs\.weights\.f1: found '1'"),
        ({"weights": [1.0]}, r"reward_kwargs\.weights: found \[1\.0\]"),
        ({"length_penalty": 1.5}, r"reward_kwargs\.length_penalty: found 1\.5, expected a number from 0 to 1"),
        ({"answer_style": "xml"}, r"reward_kwargs\.answer_style: found 'xml'"),
        ({"coherence_mode": "best"}, r"reward_kwargs\.coherence_mode: found 'best'"),
        ({"embeddings": "x.store"}, r"reward_kwargs\.embeddings: .*x\.store: no such folder; give the --output"),
        ({"embeddings": 3}, r"reward_kwargs\.embeddings: found 3, expected the folder of an embedding store"),
        ({"embeddings": ""}, r"reward_kwargs\.embeddings: found '', expected the folder"),
    ],
)
def test_settings_are_checked(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(FFRError, match=message):
        compute_score("", "", "", **kwargs)


def test_batch_takes_texts_and_conversations() -> None:
    gold = text([1], [0])
    conversation = [{"role": "assistant", "content": gold}]
    parts = [
        {"role": "assistant", "content": [{"type": "text", "text": gold[:9]}, {"type": "text", "text": gold[9:]}]}
    ]
    completions = [gold, conversation, parts, [], "x"]
    solutions = [gold] * len(completions)
    good = [1.0, 1.0, 1.0, 0.0, 0.0]
    assert batch.f1(completions, solutions, images=[None] * 5) == good
    assert batch.exact_match(completions, solution=solutions) == good
    assert batch.format(completions, solution=solutions) == good
    assert batch.ffr(completions, solutions) == pytest.approx([1.3, 1.3, 1.3, 0.0, 0.0])


def test_all_have_the_signature_of_trl_and_ms_swift() -> None:
    """`f(completions, solution, **columns)`: golds by position or by name, foreign columns ignored."""
    gold = text([1], [])
    info = [{"utterance_ids": [0, 1, 2], "images": [], "dialogue_id": "d", "image_utterances": []}]
    store = {"utt:d:1": [1.0, 0.0]}
    expected = {"f1": 1.0, "format": 1.0, "exact_match": 1.0, "mcc": 1.0, "ffr": 1.3, "coherence": 0.5}
    assert set(batch.__all__) == {*expected, "component", "configure", "BatchReward"}
    for name, value in expected.items():
        reward = batch.configure(batch.coherence, store=store) if name == "coherence" else getattr(batch, name)
        assert reward([gold], [gold], extra_info=info, trainer_state=object()) == [value], name
        assert reward(completions=[gold], solution=[gold], extra_info=info, prompts=["p"]) == [value], name


@pytest.mark.parametrize("weights", [None, 3, [1.0], {"f1": None}])
def test_batch_ffr_names_settings_that_make_no_sense(weights: object) -> None:
    with pytest.raises(FFRError, match=r"reward_kwargs\.weights"):
        batch.ffr(["x"], ["x"], reward_kwargs={"weights": weights})


def test_batch_refuses_columns_of_other_lengths() -> None:
    with pytest.raises(FFRError, match="column solution: "):
        batch.f1(["a", "b"], ["a"])


@given(id_sets, id_sets)
def test_mcc_agrees_with_scikit_learn(predicted: set[int], gold: set[int]) -> None:
    truth, guess = ([int(identifier in ids) for identifier in range(26)] for ids in (gold, predicted))
    assert mcc_of_ids(sorted(predicted), sorted(gold), count=26) == pytest.approx(matthews_corrcoef(truth, guess))


@pytest.mark.parametrize(
    ("predicted", "gold", "count", "expected"),
    [
        ([], [], 0, 1.0),
        ([], [], 5, 1.0),
        ([1], [], 5, 0.0),
        ([], [1], 5, 0.0),
        ([0, 1], [0, 1], 2, 0.0),
        ([1, 1], [1], 3, 1.0),
        ([99], [1], 3, -1 / math.sqrt(1 * 1 * 3 * 3)),  # no id of the dialogue stops being a true negative
    ],
)
def test_mcc_at_its_edges(predicted: list[int], gold: list[int], count: int, expected: float) -> None:
    assert mcc_of_ids(predicted, gold, count=count) == pytest.approx(expected)


def test_mcc_reward_is_the_mean_of_its_halves() -> None:
    gold = text([0, 1], [0])
    assert mcc_reward(gold, gold, n_utterances=4, n_images=2) == pytest.approx(1.0)
    assert mcc_reward(text([2, 3], [0]), gold, n_utterances=4, n_images=2) == pytest.approx(0.0)
    wrapped = f"<think>…</think><answer>{gold}</answer>"
    assert mcc_reward(wrapped, gold, n_utterances=4, n_images=2, style="reasoning") == pytest.approx(1.0)
    assert mcc_reward("malformed", gold, n_utterances=4, n_images=2) == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ([{"role": "assistant", "content": "I ask the tool."}, {"role": "tool", "content": "GOLD"}], 0.0),
        ([{"role": "assistant", "content": "GOLD"}, {"role": "user", "content": "GOLD"}], 0.0),
        ([{"role": "assistant", "content": None, "tool_calls": []}], 0.0),
        ([{"role": "assistant", "tool_calls": []}], 0.0),
        ([{"role": "assistant", "content": [{"type": "text", "text": "GOLD"}, {"type": "image", "text": None}]}], 1.0),
        ([{"content": "GOLD"}], 1.0),
        ([], 0.0),
    ],
)
def test_the_models_last_message_is_what_counts(completion: list[dict[str, Any]], expected: float) -> None:
    gold = format_fragment(Fragment((1,), ()))
    messages = json.loads(json.dumps(completion).replace("GOLD", gold))
    assert batch.f1([messages], [gold]) == batch.format([messages], [gold]) == [expected]


def test_a_malformed_gold_pays_for_nothing() -> None:
    gold = format_fragment(Fragment((0, 1), ()))
    info = {"dialogue_id": "d", "utterance_ids": [0, 1], "image_utterances": [], "images": []}
    store = {"utt:d:0": [1.0, 0.0], "utt:d:1": [1.0, 0.0]}
    for text, expected in ((gold, 1.0), (gold + "\n", 1.0), ("utterances 0 and 1", 0.0)):
        assert coherence_reward(gold, text, extra_info=info, store=store) == expected
        assert coherence_reward("no idea", text, extra_info=info, store=store) == 0.0
