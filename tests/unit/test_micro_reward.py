"""`f1_mode`: what ids are worth to the published micro metric, pooled F1, and what lazy policies earn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl import Fragment, format_fragment
from ffr_verl.errors import FFRError
from ffr_verl.metrics import Confusion, f1, mcc
from ffr_verl.rewards import compute_score
from ffr_verl.rewards.batch import configure, ffr
from ffr_verl.rewards.ffr import id_credits
from ffr_verl.rewards.micro import MicroCounts, id_values, micro_counts

COUNTS = {"utterance": [0.8, 2.0, 2.0, 8.0], "image": [0.1, 0.4, 0.5, 2.0]}
INFO: dict[str, Any] = {"utterance_ids": [0, 1, 2, 3, 4], "images": ["a.png", "b.png"], "micro_counts": COUNTS}
GOLD = format_fragment(Fragment((1, 2), (0,)))


def micro(answer: str, *, mode: str = "micro", gold: str = GOLD, **info: Any) -> dict[str, float]:
    return compute_score("ffr/mldr", answer, gold, {**INFO, **info}, f1_mode=mode, weights={"f1": 1.0})


@st.composite
def counts(draw: Any) -> MicroCounts:
    gold = draw(st.floats(0.2, 5))
    predicted = draw(st.floats(0.5, 5))
    hits = draw(st.floats(0.05, 0.95)) * min(gold, predicted)
    return MicroCounts(hits, predicted, gold, gold + predicted + draw(st.floats(0.5, 10)))


@given(counts(), st.sampled_from([0.0, 0.5, 1.0]))
def test_values_are_the_derivatives_of_the_metric(at: MicroCounts, share: float) -> None:
    """Of `evaluate`'s own functions, by differences, on the scale of the mean number of gold ids."""

    def metric(hits: float, misses: float) -> float:
        confusion = Confusion(hits, misses, at.gold - hits, at.universe - at.gold - misses)
        return (1 - share) * f1(confusion) + share * mcc(confusion)

    step, misses = 1e-5, at.predicted - at.hits
    scale = (at.predicted + at.gold) / (2 * at.gold)
    expected = (
        scale * (metric(at.hits + step, misses) - metric(at.hits - step, misses)) / (2 * step),
        scale * (metric(at.hits, misses + step) - metric(at.hits, misses - step)) / (2 * step),
    )
    assert id_values(at, mcc_share=share) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_rows_add_up_to_the_micro_metric() -> None:
    """Dinkelbach: summed over rows the reward is above that of another policy exactly when its micro F1 is above F."""
    source = np.random.default_rng(0)
    rows = [(source.random(8) < 0.3, source.random(8) < 0.3) for _ in range(200)]
    hits = sum((gold & guess).sum() for gold, guess in rows)
    named, golds = (sum(one[side].sum() for one in rows) for side in (1, 0))
    for target in (0.1, 0.2, 0.3, 0.4):
        at = {"utterance": [target, 1.0, 1.0, 4.0], "image": COUNTS["image"]}
        assert MicroCounts(*at["utterance"]).f1 == target
        reward = sum(
            micro(
                format_fragment(Fragment(tuple(np.flatnonzero(guess).tolist()), ())),
                gold=format_fragment(Fragment(tuple(np.flatnonzero(gold).tolist()), ())),
                micro_counts=at,
                utterance_ids=list(range(8)),
            )["f1_micro_utterances"]
            for gold, guess in rows
        )
        constant = target * golds / 2  # what the golds themselves cost, the same for every policy
        assert (reward > constant) == (2 * hits / (named + golds) > target)


@pytest.mark.parametrize("mode", ["micro", "micro_f1_mcc"])
def test_worse_answers_earn_less(mode: str) -> None:
    answers = [
        GOLD,
        format_fragment(Fragment((1, 2), ())),
        format_fragment(Fragment((1,), ())),
        format_fragment(Fragment((), ())),
        format_fragment(Fragment((0,), ())),
        format_fragment(Fragment((0, 3), ())),
        "utterances 1 and 2",
    ]
    earned = [micro(answer, mode=mode)["score"] for answer in answers]
    assert earned == sorted(earned, reverse=True)
    assert len(set(earned)) == len(earned)
    assert earned[3] == 0.0, "to name nothing earns nothing, whatever is gold"


@pytest.mark.parametrize(
    "answer", ["no", format_fragment(Fragment((1, 5), (0,))), format_fragment(Fragment((1,), (2,)))]
)
def test_malformed_answers_and_ids_outside_are_below_everything(answer: str) -> None:
    everything_wrong = format_fragment(Fragment((0, 3, 4), (1,)))
    found = micro(answer)
    assert (found["f1_micro"], found["f1_micro_utterances"], found["f1_micro_images"]) == (-1.0, -1.0, -1.0)
    assert found["f1_micro"] < micro(everything_wrong)["f1_micro"]


def test_no_list_is_worth_less_than_a_malformed_one() -> None:
    ids = list(range(400))
    answer = format_fragment(Fragment(tuple(ids), ()))
    assert micro(answer, utterance_ids=ids, gold=format_fragment(Fragment((), ())))["f1_micro_utterances"] == -1.0


def test_the_published_components_are_there_in_every_mode() -> None:
    plain = compute_score("ffr/mldr", GOLD, GOLD, INFO)
    for mode, further in (
        ("published", set()),
        ("pooled", {"f1_pooled"}),
        ("micro", {"f1_micro", "f1_micro_utterances", "f1_micro_images"}),
    ):
        for answer in (GOLD, "no", format_fragment(Fragment((9,), ()))):
            found = compute_score("ffr/mldr", answer, GOLD, INFO, f1_mode=mode)
            assert set(found) == set(plain) | further
            assert all(type(value) is float for value in found.values())
        assert found["f1"] == 0.0


def test_pooled_f1_pays_nothing_for_an_empty_list_of_images() -> None:
    gold = format_fragment(Fragment((1, 2), ()))
    wrong = format_fragment(Fragment((3,), ()))
    assert compute_score("", wrong, gold, INFO)["f1"] == 0.5
    assert compute_score("", wrong, gold, INFO, f1_mode="pooled")["f1_pooled"] == 0.0
    half = compute_score("", format_fragment(Fragment((1, 2), ())), GOLD, INFO, f1_mode="pooled", length_penalty=1.0)
    assert half["f1_pooled"] == pytest.approx(0.8)


def test_credits_of_ids_add_up_to_the_score() -> None:
    answer = format_fragment(Fragment((1, 3), (0,)))
    for style, text in (("plain", answer), ("reasoning", f"<think>[7]</think>\n<answer> {answer} </answer>")):
        settings: dict[str, Any] = {"f1_mode": "micro_f1_mcc", "answer_style": style, "weights": {"f1": 2.0}}
        found = id_credits(text, GOLD, INFO, **settings)
        assert found is not None
        assert [place for place, _, _ in found] == [1, 3, 10**9 - 1, 10**9]
        assert [text[:end][-1] for _, end, _ in found] == ["1", "3", "]", "0"]
        assert sum(value for *_, value in found) == pytest.approx(
            compute_score("", text, GOLD, INFO, **settings)["score"]
        )
        assert [value > 0 for *_, value in found] == [True, False, False, True]


def test_answers_that_are_none_have_no_credits() -> None:
    assert id_credits("no", GOLD, INFO, f1_mode="micro") is None
    assert id_credits(GOLD, GOLD, INFO) is None, "with the published F1 an id has no worth of its own"


def test_ids_outside_the_dialogue_take_the_answer_down() -> None:
    answer = format_fragment(Fragment((1, 5), (0, 2)))
    found = id_credits(answer, GOLD, INFO, f1_mode="micro", weights={"f1": 1.0})
    assert found is not None
    right, outside, _, image, other = [value for *_, value in found]
    assert right > 0 < image
    assert outside == other < -0.5
    assert sum(value for *_, value in found) == pytest.approx(micro(answer)["score"])


def test_an_id_twice_is_a_hit_and_a_miss() -> None:
    found = id_credits(format_fragment(Fragment((1, 1), ())), GOLD, INFO, f1_mode="micro", weights={"f1": 1.0})
    assert found is not None
    assert found[0][2] > 0 > found[1][2]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"f1_mode": "macro"}, r"reward_kwargs\.f1_mode: found 'macro', expected one of published, pooled, micro"),
        (
            {"f1_mode": "micro", "micro_counts": {"utterance": [1, 2]}},
            r"micro_counts\.utterance: found \(1, 2\); expected",
        ),
        (
            {"micro_counts": {**COUNTS, "image": [3, 1, 1, 2]}},
            r"micro_counts\.image: found .*right, named, gold and all",
        ),
    ],
)
def test_settings(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(FFRError, match=message):
        compute_score("", GOLD, GOLD, INFO, **kwargs)


def test_rows_say_where_the_policy_stands_and_settings_do_where_they_do_not() -> None:
    info = {key: value for key, value in INFO.items() if key != "micro_counts"}
    by_row = compute_score("", GOLD, GOLD, INFO, f1_mode="micro")["f1_micro"]
    assert compute_score("", GOLD, GOLD, info, f1_mode="micro", micro_counts=COUNTS)["f1_micro"] == by_row
    assert compute_score("", GOLD, GOLD, info, f1_mode="micro")["f1_micro"] != by_row
    with pytest.raises(FFRError, match=r"extra_info\.utterance_ids is missing; mcc and f1_mode micro need it"):
        compute_score("", GOLD, GOLD, None, f1_mode="micro")
    with pytest.raises(FFRError, match=r"extra_info\.micro_counts\.image: found None"):
        micro_counts({"utterance": COUNTS["utterance"]}, where="extra_info.micro_counts")


def test_other_trainers_get_the_same_reward() -> None:
    settings = {"f1_mode": "micro_f1_mcc", "micro_counts": COUNTS}
    reward = configure(ffr, reward_kwargs=settings)
    found = reward([GOLD, "no"], [GOLD, GOLD], extra_info=[INFO, INFO])
    assert found == [compute_score("", answer, GOLD, INFO, **settings)["score"] for answer in (GOLD, "no")]
