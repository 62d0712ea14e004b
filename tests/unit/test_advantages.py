"""Advantages: GRPO's, GDPO's by hand, and ids credited to the tokens that decide them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl.errors import FFRError
from ffr_verl.samplers.advantages import (
    AdvantageConfig,
    IdCredit,
    ScoredAnswer,
    advantages_of,
    gdpo_advantages,
    id_advantages,
)


def answer(score: float, *ids: tuple[int, float], rest: float = 0.0) -> ScoredAnswer:
    """Names an id every second token: tokens 1, 3, 5, …; then comes one that ends it."""
    credits = [IdCredit(place, 2 * number + 1, value) for number, (place, value) in enumerate(ids)]
    assert score == pytest.approx(rest + sum(value for _, value in ids))
    return ScoredAnswer(2 * len(ids) + 1, score, ids=credits)


def test_an_answers_advantage_is_its_score_less_the_mean_of_its_group() -> None:
    groups = [[ScoredAnswer(2, 1.0), ScoredAnswer(1, 0.0)], [ScoredAnswer(3, 0.5)]]
    found = advantages_of(groups, AdvantageConfig())
    assert [[one.tolist() for one in group] for group in found] == [[[0.5, 0.5], [-0.5]], [[0.0, 0.0, 0.0]]]
    assert found[0][0].dtype == np.float32


def test_gdpo_of_a_group_by_hand() -> None:
    """f1: mean 0.5, deviation sqrt(1/3); format: mean 0.75, deviation 0.5; weights 1 and 0.3."""
    rewards = [(0.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)]
    group = [
        ScoredAnswer(tokens, 0.0, {"f1": f1, "format": fmt})
        for tokens, (f1, fmt) in zip((1, 2, 3, 4), rewards, strict=True)
    ]
    deviation = (1 / 3) ** 0.5
    sums = np.array([(f1 - 0.5) / deviation + 0.3 * (fmt - 0.75) / 0.5 for f1, fmt in rewards])
    tokens = np.repeat(sums, (1, 2, 3, 4))
    expected = (sums - tokens.mean()) / tokens.std(ddof=1)
    [found] = gdpo_advantages([group], {"f1": 1.0, "format": 0.3})
    assert [len(one) for one in found] == [1, 2, 3, 4]
    assert [float(one[0]) for one in found] == pytest.approx(expected, abs=1e-4)


def test_gdpo_keeps_a_small_component_beside_a_large_one() -> None:
    group = [
        ScoredAnswer(1, 0.0, {"large": large, "small": small})
        for large, small in ((0, 0), (9, 0), (0, 0.01), (9, 0.01))
    ]
    [found] = gdpo_advantages([group], {"large": 1.0, "small": 1.0})
    values = [float(one[0]) for one in found]
    assert values[1] == pytest.approx(values[2], abs=1e-3)


def test_a_component_that_the_reward_does_not_return_is_named() -> None:
    with pytest.raises(FFRError, match=r"components: the reward function returns no 'f2'; only f1"):
        gdpo_advantages([[ScoredAnswer(1, 0.0, {"f1": 0.0})]], {"f2": 1.0})


def test_ids_are_credited_to_the_tokens_that_decide_them() -> None:
    """Both name 0, which is right; the first then names 1, which is wrong, the second 2, which is right."""
    first, second = id_advantages([answer(0.5, (0, 1.0), (1, -0.5)), answer(2.0, (0, 1.0), (2, 1.0))])
    assert first.tolist() == [-0.75, -0.75, -0.75, -0.75, -0.5]
    assert second.tolist() == [0.75, 0.75, 0.75, 0.75, 0.0]


def test_what_was_named_before_does_not_count() -> None:
    """The first answer is the worse one, by its first id; its last ids are the same."""
    wrong, right = id_advantages([answer(0.0, (0, -1.0), (7, 1.0)), answer(1.0, (7, 1.0))])
    assert wrong[0] == -0.5
    assert wrong[-1] == right[-1] == 0.0


def test_malformed_answers_lose_against_all_others() -> None:
    bad, good, empty = id_advantages([ScoredAnswer(3, -1.0), answer(1.0, (0, 1.0)), answer(0.0)])
    assert bad.tolist() == [-1.0, -1.0, -1.0]
    assert good[0] == 1.0
    assert empty[0] == pytest.approx(0.0)
    assert good[-1] > 0, "to end well is better than what the malformed answer did"


ANSWERS = st.lists(
    st.one_of(
        st.builds(ScoredAnswer, st.integers(1, 5), st.floats(-1, 0)),
        st.lists(st.tuples(st.integers(0, 9), st.floats(-1, 1)), max_size=4).map(
            lambda ids: answer(sum(value for _, value in ids), *ids)
        ),
    ),
    min_size=1,
    max_size=6,
)


@given(ANSWERS)
def test_the_first_token_has_grpos_advantage(group: list[ScoredAnswer]) -> None:
    mean = np.mean([one.score for one in group])
    for one, advantages in zip(group, id_advantages(group), strict=True):
        assert len(advantages) == one.tokens
        assert float(advantages[0]) == pytest.approx(one.score - mean, abs=1e-5)


def test_the_policy_gradient_keeps_its_expected_value_and_loses_variance() -> None:
    """A policy that names each of three ids with a chance of its own, all of its answers in pairs: the gradient with
    respect to the chances' logits, exactly."""
    chances, values = np.array([0.3, 0.6, 0.5]), np.array([1.0, -0.4, 0.7])
    outcomes = list(itertools.product((0, 1), repeat=3))
    gradients: dict[str, list[tuple[float, np.ndarray]]] = {"answer": [], "id": []}
    for pair in itertools.product(outcomes, repeat=2):
        weight = float(np.prod([np.where(one, chances, 1 - chances).prod() for one in map(np.array, pair)]))
        # A token for each id, whether it is named or not.
        group = [
            ScoredAnswer(
                3, float(values @ one), ids=[IdCredit(place, place, values[place]) for place in range(3) if one[place]]
            )
            for one in map(np.array, pair)
        ]
        for credit in ("answer", "id"):
            [advantages] = advantages_of([group], AdvantageConfig(credit=credit))  # type: ignore[arg-type]
            made = sum(np.asarray(a) * (np.array(one) - chances) for a, one in zip(advantages, pair, strict=True))
            gradients[credit].append((weight, np.asarray(made)))
    moments = {}
    for credit, found in gradients.items():
        mean = sum(weight * made for weight, made in found)
        moments[credit] = mean, sum(weight * (made - mean) ** 2 for weight, made in found)
    assert moments["id"][0] == pytest.approx(moments["answer"][0], abs=1e-6)
    assert (moments["id"][1][1:] < 0.8 * moments["answer"][1][1:]).all(), "of all ids but the first"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"credits": "id"}, r"advantage\.credits: unknown key; did you mean 'credit'\?"),
        ({"credit": "token"}, r"advantage\.credit: found 'token', expected one of answer, id, components"),
        ({"credit": "components"}, r"advantage\.components: .* name some with their weights"),
        (
            {"credit": "components", "components": {"f1": -1}},
            r"components: found {'f1': -1}, expected `float` >= 0",
        ),
    ],
)
def test_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FFRError, match=message):
        AdvantageConfig.from_mapping(values)
