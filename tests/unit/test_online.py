"""The online curriculum: what it draws, what it learns, and going on at every possible cut."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl.errors import FFRError
from ffr_verl.samplers import CurriculumConfig, CurriculumSampler, RowDifficulty, assign_levels
from ffr_verl.samplers.online import OnlineDraws, OnlineOrder
from ffr_verl.settings import OnlineConfig

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def rows_of(f1: np.ndarray) -> RowDifficulty:
    entropy = np.linspace(0, 1, len(f1))
    return RowDifficulty(f1, entropy, assign_levels(f1, entropy), np.zeros(len(f1), bool))


def online_sampler(count: int, **settings: Any) -> CurriculumSampler:
    config = CurriculumConfig(order="online", seed=3, online=OnlineConfig(**settings))
    return CurriculumSampler(rows_of(np.linspace(0, 1, count)), config)


def online_order(spreads: np.ndarray, strata: np.ndarray | None = None, **settings: Any) -> OnlineOrder:
    rows = dataclasses.replace(rows_of(np.zeros(len(spreads))), spread=spreads, strata=strata)
    return OnlineOrder(rows, CurriculumConfig(order="online", online=OnlineConfig(**settings)))


@given(SCORES, st.integers(0, 3))
def test_no_row_comes_twice_in_a_step(scores: list[float], seed: int) -> None:
    draws = OnlineDraws(np.array(scores), OnlineConfig(), seed=seed)
    step = [draws.draw() for _ in scores]
    assert sorted(step) == list(range(len(scores)))
    assert 0 <= draws.draw() < len(scores), "more than there are: they come again"


@given(SCORES, st.lists(st.dictionaries(st.integers(0, 29), st.floats(0, 1), max_size=5), max_size=5))
def test_every_row_stays_in_one_bin_whatever_is_observed(
    scores: list[float], observed: list[dict[int, float]]
) -> None:
    draws = OnlineDraws(np.array(scores), OnlineConfig(), seed=0)
    for step in observed:
        draws.draw()
        draws.update({row: score for row, score in step.items() if row < len(scores)})
    assert sorted(draws.state_dict()["order"].tolist()) == list(range(len(scores)))


def test_rows_with_spread_come_most_and_none_is_forgotten() -> None:
    draws = OnlineDraws(np.linspace(0, 1, 101), OnlineConfig(floor=0.05), seed=0)
    found: Counter[int] = Counter()
    for _ in range(12_000):
        found[draws.draw()] += 1
        draws.update({})
    most, least = np.mean([found[row] for row in range(90, 101)]), np.mean([found[row] for row in range(5)])
    assert 30 < most / least < 90, "3.5 to 0.05 are the weights"
    assert min(found[row] for row in range(101)) > 0


def test_a_row_that_stays_flat_is_drawn_more_and_more_seldom() -> None:
    draws = OnlineDraws(np.array([0.5, 0.5]), OnlineConfig(decay=0.5), seed=0)
    expected = []
    for _ in range(4):
        draws.update({0: 0.0})
        expected.append(draws.spread(0))
    assert expected == [0.25, 0.125, 0.0625, 0.03125]
    draws.update({0: 1.0})
    assert draws.spread(0) > 0.5, "and comes back when its answers differ again"


def test_a_row_is_the_decayed_mean_of_its_groups() -> None:
    draws = OnlineDraws(np.array([0.5, 0.5]), OnlineConfig(decay=0.75), seed=0)
    draws.update({0: 1.0})
    draws.update({0: 0.0})
    assert draws.spread(0) == pytest.approx(0.75 * (0.75 * 0.5 + 0.25))
    assert draws.spread(1) == 0.5


def test_a_typical_deviation_is_in_the_middle_of_the_scale() -> None:
    order = online_order(np.array([1.0, 2.0, 3.0]), decay=0.0)
    assert [order.spread(row) for row in range(3)] == pytest.approx([0.25, 0.5, 0.75])
    order.observe([], {0: 0.2, 1: 0.2, 2: 0.2})
    assert order.spread(0) == pytest.approx(0.5)
    order.observe([], {0: 0.0, 1: 0.1, 2: 4.0})
    assert order.spread(0) == 0.0
    assert 0.0 < order.spread(1) < 0.5
    assert order.spread(2) == 1.0


@given(st.lists(st.integers(0, 3), min_size=4, max_size=60), st.integers(1, 80))
def test_every_stretch_of_draws_has_the_shares_of_the_strata(strata: list[int], count: int) -> None:
    numbers = np.array(strata)
    order = online_order(np.full(len(strata), 0.5), numbers)
    drawn = np.bincount(numbers[[order.row_at(0, place) for place in range(count)]], minlength=4)
    shares = np.bincount(numbers, minlength=4) / len(strata)
    assert (np.abs(drawn - shares * count) < 2).all()


@given(st.integers(1, 20), st.integers(0, 25), st.integers(1, 4), st.integers(0, 3))
def test_going_on_at_any_cut_gives_the_same_rows_for_the_same_rewards(
    count: int, steps: int, batch: int, drawn_since: int
) -> None:
    """Also in the middle of a step, with rows in flight."""

    def reward(row: int, step: int) -> float:
        return (row * 7 + step * 3) % 11 / 10

    def run(sampler: CurriculumSampler, first: int, last: int, found: list[int]) -> None:
        for step in range(first, last):
            rows = [sampler.row_at((step * batch + place) % count) for place in range(batch)]
            found += rows
            sampler.update({row: reward(row, step) for row in rows[::2]})

    whole: list[int] = []
    sampler = online_sampler(count)
    run(sampler, 0, steps, whole)
    extra = [sampler.row_at(place % count) for place in range(drawn_since)]
    state = copy.deepcopy(sampler.state_dict())
    resumed = online_sampler(count)
    resumed.load_state_dict(state)
    ahead: list[int] = []
    again: list[int] = []
    for one, found in ((sampler, ahead), (resumed, again)):
        found += one.row_at(0), *[int(value) for value in one.update(dict.fromkeys(extra, 0.3)).values()]
        run(one, steps, steps + 5, found)
    assert ahead == again


def test_the_order_of_observations_does_not_matter() -> None:
    """Groups finish in any order; the next rows are the same."""
    first, second = online_sampler(50), online_sampler(50)
    rows = [first.row_at(place) for place in range(8)]
    assert rows == [second.row_at(place) for place in range(8)]
    first.update({row: row / 50 for row in rows})
    second.update({row: row / 50 for row in reversed(rows)})
    assert [first.row_at(8 + place) for place in range(8)] == [second.row_at(8 + place) for place in range(8)]


def test_metrics_of_a_step() -> None:
    sampler = online_sampler(40)
    drawn = [sampler.row_at(place) for place in range(10)]
    metrics = sampler.update({drawn[0]: 1.0})
    expected = np.linspace(0, 1, 40)[drawn]
    assert metrics["ffr/curriculum/difficulty"] == pytest.approx(1 - expected.mean(), abs=1e-6)
    assert metrics["ffr/curriculum/coverage"] == pytest.approx(10 / 40)
    assert metrics["ffr/curriculum/spread"] == pytest.approx(0.5)
    assert sum(value for name, value in metrics.items() if "/share/" in name) == pytest.approx(1.0)
    assert 0 < metrics["ffr/curriculum/distance"] < 1
    assert sampler.update({}) == {"ffr/curriculum/coverage": 0.25}


def test_the_ascending_order_has_no_distance_from_itself_and_chance_has_a_third() -> None:
    rows = rows_of(np.linspace(0, 1, 300))
    distances = {}
    for order in ("ascending", "shuffled"):
        sampler = CurriculumSampler(rows, CurriculumConfig(order=order))  # type: ignore[arg-type]
        assert len(list(sampler)) == 300
        distances[order] = sampler.update({})["ffr/curriculum/distance"]
    assert distances["ascending"] == 0
    assert distances["shuffled"] == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metrik": "f1"}, r"curriculum\.online\.metrik: unknown key"),
        ({"metric": ""}, r"online\.metric: found ''"),
        ({"decay": 1}, r"online\.decay: found 1, expected `float` < 1"),
        ({"floor": 0}, r"online\.floor: found 0, expected `float` > 0"),
        ({"floor": True}, r"online\.floor: found True"),
    ],
)
def test_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FFRError, match=message):
        CurriculumConfig.from_mapping({"order": "online", "difficulty": "x.parquet", "online": values})


def test_online_starts_without_a_difficulty_file_and_older_settings_are_read() -> None:
    config = CurriculumConfig.from_mapping({"order": "online", "online": {"scale": 1.3, "target": 0.5, "width": 0.2}})
    sampler = CurriculumSampler(RowDifficulty.unknown(np.zeros(5, bool)), config)
    assert sorted(sampler.row_at(place) for place in range(5)) == [0, 1, 2, 3, 4]
