"""What a curriculum knows of the rows: strata, where the policy starts; orders that keep the data's shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl import Fragment, format_fragment
from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl.training_rows import TrainingRows
from ffr_verl.samplers import CurriculumConfig, CurriculumSampler, RowDifficulty
from ffr_verl.samplers.curriculum import interleaved
from ffr_verl.samplers.difficulty_file import difficulty_table, write_difficulty
from ffr_verl.samplers.micro_estimate import MicroEstimate

GOLDS = [Fragment((0, 1), (0,)), Fragment((), ()), Fragment((2,), ()), Fragment((1, 2, 3), (0, 1))]


def row(number: int, gold: Fragment) -> dict[str, Any]:
    info = {"dialogue_id": f"d{number}", "query": "q", "utterance_ids": [0, 1, 2, 3], "images": ["a.png", "b.png"]}
    return {
        "extra_info": info,
        "reward_model": {"ground_truth": format_fragment(gold)},
        "topic": "ab"[number % 2],
        "difficulty": number,
    }


ROWS = [row(number, gold) for number, gold in enumerate(GOLDS)]
TABLE = datasets.Dataset.from_list(ROWS)


def rows_of(**settings: Any) -> TrainingRows:
    return TrainingRows.of(TABLE, CurriculumConfig(order="shuffled", **settings), ["train.rl.parquet"])


def test_strata_are_what_the_gold_is_made_of() -> None:
    difficulty = rows_of().difficulty
    assert difficulty.strata_names == ("no_gold", "utterances_only", "with_images")
    assert difficulty.strata is not None
    assert difficulty.strata.tolist() == [2, 0, 1, 2]
    assert difficulty.is_negative.tolist() == [False, True, False, False]
    assert difficulty.spread is not None
    assert np.argsort(difficulty.spread).tolist() == [1, 2, 0, 3], "what there is to be gained"


def test_strata_by_columns_of_the_users_choice() -> None:
    difficulty = rows_of(strata=["topic"]).difficulty
    assert difficulty.strata_names == ("topic=a", "topic=b")
    assert difficulty.strata is not None
    assert difficulty.strata.tolist() == [0, 1, 0, 1]
    assert rows_of(strata=None).difficulty.strata is None
    with pytest.raises(
        FFRError, match=r"curriculum\.strata: train\.rl\.parquet has no column length; it has extra_info"
    ):
        rows_of(strata=["topic", "length"])
    with pytest.raises(FFRError, match=r"curriculum\.strata: found 'topic', expected one of gold, a list of names"):
        CurriculumConfig.from_mapping({"strata": "topic"})
    assert CurriculumConfig.from_mapping({"strata": ["topic"]}).strata == ["topic"]
    assert CurriculumConfig.from_mapping({"strata": None, "start": None}) == CurriculumConfig(strata=None)


def test_the_policy_starts_where_the_sft_model_stands(tmp_path: Path) -> None:
    """Right and named ids of its answers, when the rows were scored; else half of the golds."""
    means, weight = rows_of().micro_start
    assert means.tolist() == [[0.75, 1.5, 1.5, 4.0], [0.375, 0.75, 0.75, 2.0]]
    window = {**ROWS[0], "extra_info": {**ROWS[0]["extra_info"], "utterance_ids": [4, 5, 6], "image_ids": [2, 3]}}
    table = datasets.Dataset.from_list([window])
    means_of_window, _ = TrainingRows.of(table, CurriculumConfig(), ["train.rl.parquet"]).micro_start
    assert means_of_window[:, 3].tolist() == [7.0, 4.0], "as the reward manager and evaluate count them"
    answers = [Fragment((0, 3), ()), Fragment((), ()), Fragment((2,), (1,)), Fragment((1, 2, 2), (0,))]
    predictions = [{"response": format_fragment(answer), "logprobs": []} for answer in answers]
    path = tmp_path / "difficulty.parquet"
    write_difficulty(difficulty_table(ROWS, predictions, model="m"), path)
    scored, scored_weight = rows_of(difficulty=str(path)).micro_start
    assert scored[0].tolist() == [(1 + 0 + 1 + 2) / 4, (2 + 0 + 1 + 2) / 4, 1.5, 4.0]
    assert scored[1].tolist() == [1 / 4, 2 / 4, 0.75, 2.0]
    assert scored_weight > weight


STRATA = st.lists(st.integers(0, 3), min_size=1, max_size=200)


@given(STRATA, st.data())
def test_every_stretch_has_the_shares_of_the_strata(strata: list[int], data: Any) -> None:
    numbers = np.array(strata)
    order = np.random.default_rng(0).permutation(len(numbers))
    mixed = interleaved(order, numbers)
    assert sorted(mixed.tolist()) == list(range(len(numbers)))
    for one in set(strata):
        assert [row for row in mixed if numbers[row] == one] == [row for row in order if numbers[row] == one]
    first = data.draw(st.integers(0, len(strata)))
    last = data.draw(st.integers(first, len(strata)))
    found = np.bincount(numbers[mixed[first:last]], minlength=4)
    assert (np.abs(found - np.bincount(numbers, minlength=4) * (last - first) / len(strata)) <= 2).all()


@pytest.mark.parametrize("order", ["ascending", "competence", "shuffled", "online"])
def test_a_step_of_any_order_has_the_shares_of_the_strata(order: Any) -> None:
    """Also where ease is a matter of composition: the easy rows are the empty ones."""
    strata = np.repeat([0, 1, 2], [20, 60, 80])
    f1 = np.where(strata == 0, 1.0, np.where(strata == 1, 0.6, 0.2)) + np.linspace(0, 0.01, 160)
    rows = RowDifficulty(
        np.minimum(f1, 1.0), np.ones(160), np.full(160, "hard"), strata == 0, strata, ("empty", "text", "images")
    )
    sampler = CurriculumSampler(rows, CurriculumConfig(order=order))
    for step in range(20):  # the last ten are another epoch
        for place in range(16):
            sampler.row_at((step * 16 + place) % 160)
        metrics = sampler.update({})
        for name, share in (("empty", 2), ("text", 6), ("images", 8)):
            assert abs(metrics[f"ffr/curriculum/stratum/{name}"] * 16 - share) <= 1


def test_easy_rows_come_first_inside_each_stratum() -> None:
    strata = np.array([0, 1] * 10)
    rows = RowDifficulty(
        np.linspace(0, 1, 20), np.ones(20), np.full(20, "hard"), np.zeros(20, bool), strata, ("a", "b")
    )
    drawn = list(CurriculumSampler(rows, CurriculumConfig(order="ascending")))
    for one in (0, 1):
        inside = [row for row in drawn if strata[row] == one]
        assert inside == sorted(inside, reverse=True)


def test_where_the_policy_stands_is_resumed() -> None:
    start = np.array([[0.5, 1.0, 1.0, 4.0], [0.0, 0.0, 0.5, 2.0]])
    rows = RowDifficulty.unknown(np.zeros(4, bool))
    sampler = CurriculumSampler(rows, CurriculumConfig(order="shuffled"), micro=MicroEstimate(start))
    assert sampler.micro is not None
    sampler.micro.observe([[[2, 0, 1, 3], [1, 1, 0, 0]]] * 100)
    resumed = CurriculumSampler(rows, CurriculumConfig(order="shuffled"), micro=MicroEstimate(start))
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.micro is not None
    for estimate in (sampler.micro, resumed.micro):
        estimate.observe([[[0, 1, 1, 3], [0, 0, 1, 1]]] * 50)
    assert resumed.micro.counts() == sampler.micro.counts()
    assert 0 < sampler.micro.f1()["image"] < 1


def test_a_kind_that_no_gold_has_is_no_division_by_zero() -> None:
    estimate = MicroEstimate(np.array([[0.5, 1.0, 1.0, 4.0], [0.0, 0.0, 0.0, 21.0]]))
    assert estimate.f1()["image"] == 0.0
