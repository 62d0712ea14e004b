"""f1, format, exact match and MCC against their definitions, read word by word, over random answers of every kind.

Coherence has its own module.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffr_verl.fragments import TAGS
from ffr_verl.rewards import compute_score, exact_match_reward, f1_reward, format_reward, mcc_reward

U0, U1, I0, I1 = TAGS
N_UTTERANCES, N_IMAGES = 9, 4
INFO = {
    "dialogue_id": "d",
    "utterance_ids": list(range(N_UTTERANCES)),
    "image_utterances": [0, 2, 2, 8],
    "images": ["a.png", "b.png", "c.png", "a.png"],
}
Ids = tuple[list[int], list[int]]

# Repeats are likely, ids outside the dialogue are among them, and so are empty lists.
answers: st.SearchStrategy[Ids] = st.tuples(
    st.lists(st.integers(0, N_UTTERANCES + 2), max_size=8), st.lists(st.integers(0, N_IMAGES + 1), max_size=5)
)
golds: st.SearchStrategy[Ids] = st.tuples(
    st.lists(st.integers(0, N_UTTERANCES - 1), max_size=6, unique=True).map(sorted),
    st.lists(st.integers(0, N_IMAGES - 1), max_size=3, unique=True).map(sorted),
)
styles = st.sampled_from(["plain", "reasoning"])


def written(ids: Ids, style: str = "plain") -> str:
    """The wire format, without the library's own formatter."""
    plain = f"{U0}{json.dumps(ids[0])}{U1};{I0}{json.dumps(ids[1])}{I1}"
    return plain if style == "plain" else f"<think>these belong together</think><answer>{plain}</answer>"


def f1_of(p: Sequence[int], g: Sequence[int], *, penalty: float = 0.95) -> float:
    if len(p) == 0 and len(g) == 0:
        return 1.0
    both = [identifier for identifier in set(g) if identifier in p]
    precision = len(both) / len(p) if p else 0.0
    recall = len(both) / len(g) if g else 0.0
    f1 = 0.0 if precision == recall == 0.0 else 2 * precision * recall / (precision + recall)
    return f1 * penalty ** abs(len(p) - len(g))


def mcc_of(p: Sequence[int], g: Sequence[int], count: int) -> float:
    if not p and not g:
        return 1.0
    if not p or not g:
        return 0.0
    universe = {*range(count), *p}
    tp = sum(i in p and i in g for i in universe)
    fp = sum(i in p and i not in g for i in universe)
    fn = sum(i not in p and i in g for i in universe)
    tn = sum(i not in p and i not in g for i in range(count))
    denominator = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(denominator) if denominator else 0.0


@settings(max_examples=200)
@given(
    answers, golds, styles, st.sampled_from([0.5, 0.95, 1.0]), st.sampled_from([(0.5, 0.5), (0.9, 0.1), (0.0, 2.0)])
)
def test_every_reward_is_what_its_definition_says(
    predicted: Ids, gold: Ids, style: Any, penalty: float, shares: tuple[float, float]
) -> None:
    completion, solution = written(predicted, style), written(gold)
    halves = [f1_of(p, g, penalty=penalty) for p, g in zip(predicted, gold, strict=True)]
    f1 = shares[0] * halves[0] + shares[1] * halves[1]
    settings_of_f1 = {"length_penalty": penalty, "utterance_weight": shares[0], "image_weight": shares[1]}
    well_formed = float(all(len(set(ids)) == len(ids) for ids in predicted))
    exact = float(predicted == gold)
    counts = (N_UTTERANCES, N_IMAGES)
    mcc = sum(mcc_of(p, g, n) for p, g, n in zip(predicted, gold, counts, strict=True)) / 2

    assert f1_reward(completion, solution, style=style, **settings_of_f1) == pytest.approx(f1, abs=1e-6)
    assert format_reward(completion, style=style) == well_formed
    assert exact_match_reward(completion, solution, style=style) == exact
    found = mcc_reward(completion, solution, n_utterances=N_UTTERANCES, n_images=N_IMAGES, style=style)
    assert found == pytest.approx(mcc, abs=1e-6)
    weights = {"f1": 1.0, "format": 0.3, "exact_match": 2.0, "mcc": 0.5}
    scores = compute_score("", completion, solution, INFO, weights=weights, answer_style=style, **settings_of_f1)
    assert scores == pytest.approx(
        {
            "score": f1 + 0.3 * well_formed + 2.0 * exact + 0.5 * mcc,
            "f1": f1,
            "f1_utterances": halves[0],
            "f1_images": halves[1],
            "coherence": 0.0,
            "format": well_formed,
            "exact_match": exact,
            "mcc": mcc,
        },
        abs=1e-6,
    )


@settings(max_examples=150)
@given(answers, golds, styles, st.data())
def test_a_spoilt_answer_earns_nothing(predicted: Ids, gold: Ids, style: Any, data: st.DataObject) -> None:
    """A sound answer of the other style, one with a piece left out, one with something before, in or after it."""
    sound = written(predicted, style)
    at = data.draw(st.integers(0, len(sound) - 1))
    tag = data.draw(st.sampled_from(TAGS))
    spoilt = data.draw(
        st.sampled_from(
            [
                written(predicted, "reasoning" if style == "plain" else "plain"),
                sound.replace(tag, "", 1),
                sound.replace("[", "", 1),
                sound.replace("[", "[x", 1),
                "So: " + sound,
                sound + ".",
                sound[:at],
            ]
        )
    )
    solution = written(gold)
    scores = compute_score("", spoilt, solution, INFO, weights={"f1": 1.0, "mcc": 1.0}, answer_style=style)
    assert set(scores.values()) == {0.0}
    assert f1_reward(spoilt, solution, style=style) == format_reward(spoilt, style=style) == 0.0
    assert exact_match_reward(spoilt, solution, style=style) == 0.0
    assert mcc_reward(spoilt, solution, n_utterances=N_UTTERANCES, n_images=N_IMAGES, style=style) == 0.0


@pytest.mark.parametrize("ids", ["[1 2]", "[1,,2]", "[\u0661, 2]", "[\uff11, 2]", "[1, 2,]", "[+1, 2]"])
def test_what_the_published_pattern_also_admits_is_malformed_here(ids: str) -> None:
    """There `[1 2]` scores 0 in F1 and format, `[1,,2]` is read as 1 and 2, and so are digits of other scripts."""
    gold = written(([1, 2], []))
    answer = f"{U0}{ids}{U1};{I0}[]{I1}"
    assert set(compute_score("", answer, gold, INFO, weights={"f1": 1.0, "mcc": 1.0}).values()) == {0.0}
