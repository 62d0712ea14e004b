"""Orders of the rows, and going on at every possible cut."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl.errors import FFRError
from ffr_verl.samplers import CurriculumConfig, CurriculumSampler
from ffr_verl.samplers.curriculum import RowDifficulty, competence, order_rows
from ffr_verl.samplers.difficulty import assign_levels, select_rows


def rows_of(count: int, seed: int = 0) -> RowDifficulty:
    source = np.random.default_rng(seed)
    f1, entropy = source.random(count).round(1), source.random(count)
    return RowDifficulty(f1, entropy, assign_levels(f1, entropy), source.random(count) < 0.2)


CONFIGS = st.builds(
    CurriculumConfig,
    order=st.sampled_from(["published", "ascending", "competence", "shuffled"]),
    pacing=st.sampled_from(["linear", "root", "steps"]),
    start=st.floats(0.01, 1.0),
    steps=st.integers(1, 7),
    seed=st.integers(0, 5),
)


@given(CONFIGS, st.integers(0, 60))
def test_every_row_comes_once(config: CurriculumConfig, count: int) -> None:
    rows = rows_of(count)
    order = order_rows(rows, config)
    if config.order == "published":
        assert order.tolist() == select_rows(rows.levels, rows.f1, rows.is_negative).tolist()
    else:
        assert sorted(order.tolist()) == list(range(count))
    assert order.tolist() == order_rows(rows, config).tolist(), "the same every time"


@given(CONFIGS.filter(lambda config: config.order == "competence"), st.integers(1, 60))
def test_competence_draws_from_what_is_open(config: CurriculumConfig, count: int) -> None:
    rows = rows_of(count)
    rank = np.empty(count, dtype=int)
    rank[np.lexsort((rows.entropy, -rows.f1))] = np.arange(count)
    for place, row in enumerate(order_rows(rows, config)):
        assert rank[row] < max(place + 1, np.ceil(competence(place / count, config) * count))


@pytest.mark.parametrize("pacing", ["linear", "root", "steps"])
def test_competence_grows_from_its_start_to_all(pacing: Any) -> None:
    config = CurriculumConfig(order="competence", pacing=pacing, start=0.2, steps=4)
    shares = [competence(time, config) for time in np.linspace(0, 1, 101)]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert shares[0] == pytest.approx(0.4 if pacing == "steps" else 0.2)


def test_ascending_is_by_falling_f1_then_rising_entropy() -> None:
    rows = RowDifficulty(
        np.array([0.5, 1.0, 0.5, 0.0]), np.array([2.0, 3.0, 1.0, 0.0]), np.array(["hard"] * 4), np.zeros(4, bool)
    )
    assert order_rows(rows, CurriculumConfig(order="ascending")).tolist() == [1, 2, 0, 3]


def test_seeds_matter_where_chance_does() -> None:
    rows = rows_of(50)
    for order in ("shuffled", "competence"):
        first, second = (order_rows(rows, CurriculumConfig(order=order, seed=seed)).tolist() for seed in (0, 1))  # type: ignore[arg-type]
        assert first != second


@given(CONFIGS, st.integers(1, 25), st.integers(0, 80))
def test_going_on_at_any_cut_gives_the_same_rows(config: CurriculumConfig, count: int, cut: int) -> None:
    rows = rows_of(count)

    def drawn(sampler: CurriculumSampler, number: int) -> list[int]:
        found: list[int] = []
        while len(found) < number and len(sampler):
            for row in sampler:
                found.append(row)
                if len(found) == number:
                    break
        return found

    whole = drawn(CurriculumSampler(rows, config), cut + 30)
    stopped = CurriculumSampler(rows, config)
    before = drawn(stopped, cut)
    state = copy.deepcopy(stopped.state_dict())
    resumed = CurriculumSampler(rows, config)
    resumed.load_state_dict(state)
    assert before + drawn(resumed, 30) == whole


def test_a_state_of_another_order_is_refused() -> None:
    with pytest.raises(FFRError, match=r"curriculum\.order: found 'asc', expected one of file, published, ascending"):
        CurriculumConfig.from_mapping({"order": "asc"})
    state = CurriculumSampler(rows_of(20), CurriculumConfig(order="shuffled")).state_dict()
    with pytest.raises(FFRError, match="the state of the curriculum belongs to another order"):
        CurriculumSampler(rows_of(20), CurriculumConfig(order="ascending")).load_state_dict(state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ordr": 1}, r"data\.ffr\.curriculum\.ordr: unknown key; did you mean 'order'\?"),
        ({"order": "random"}, r"data\.ffr\.curriculum\.order: found 'random', expected one of file, published"),
        ({"pacing": "fast"}, r"curriculum\.pacing: found 'fast'"),
        ({"shares": {"simple": 1}}, r"curriculum\.shares\.simple: unknown key"),
        ({"shares": {"easy": 2}}, r"curriculum\.shares\.easy: found 2, expected `float` <= 1"),
        ({"start": 0}, r"curriculum\.start: found 0, expected `float` > 0"),
        ({"steps": 0}, r"curriculum\.steps: found 0, expected `int` >= 1"),
        ({"seed": True}, r"curriculum\.seed: found True"),
        ({"difficulty": 3}, r"curriculum\.difficulty: found 3, expected `str"),
    ],
)
def test_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(FFRError, match=message):
        CurriculumConfig.from_mapping(values)


def test_one_share_leaves_the_others_as_they_are() -> None:
    config = CurriculumConfig.from_mapping({"shares": {"middle": 0.5}})
    assert msgspec.structs.asdict(config.shares) == {"easy": 1.0, "middle": 0.5, "confusing": 0.5, "hard": 1.0}
