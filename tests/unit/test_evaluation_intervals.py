"""Intervals, the parts of break-downs, and two models on the same rows."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from drawn_predictions import NONE, Row, assert_nearly, drawn, mixed, row_of

from ffr_verl.errors import FFRError
from ffr_verl.evaluation import BootstrapSettings, compare, count_records, evaluate, row_statistics
from ffr_verl.evaluation.breakdowns import BREAKDOWNS, part_names
from ffr_verl.fragments import Fragment, parse_leniently
from ffr_verl.metrics import dispersion


def test_intervals_are_those_of_a_share() -> None:
    """Whether an answer is right is a coin thrown 400 times: the interval has the known width."""
    result = evaluate(mixed(400, 300), bootstrap=BootstrapSettings(resamples=2000))
    assert result.intervals is not None
    low, high = result.intervals["rewards"]["exact_match"]
    width = 2 * 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low < 0.75 < high
    assert high - low == pytest.approx(width, rel=0.08)
    assert result.intervals["level"] == 0.95
    low, high = result.intervals["micro"]["utterance"]["recall"]
    assert high - low == pytest.approx(width, rel=0.08)


def test_intervals_depend_on_the_seed_alone_and_hold_the_estimate() -> None:
    rows = drawn(200)
    one, again, other = (evaluate(rows, bootstrap=BootstrapSettings(200, seed)) for seed in (0, 0, 1))
    assert one == again
    assert one.intervals != other.intervals
    assert one.micro == other.micro
    assert one.intervals is not None
    for average, found in (("micro", one.micro), ("macro", one.macro)):
        for modality, values in found.items():
            for name, value in values.items():
                low, high = one.intervals[average][modality][name]
                assert low <= value <= high, (average, modality, name)


def test_equal_rows_have_intervals_without_width() -> None:
    result = evaluate([row_of(Fragment((1,), ()), Fragment((1, 2), ()))] * 50)
    assert result.intervals is not None
    assert result.intervals["macro"]["utterance"]["recall"] == [0.5, 0.5]
    assert evaluate([row_of("", Fragment((1, 2), ()))]).samples == 1


def test_rows_drawn_in_parts_are_drawn_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the rows into parts changes the drawing, not its distribution."""
    settings = BootstrapSettings(resamples=2000)
    whole = evaluate(mixed(300, 200), bootstrap=settings)
    monkeypatch.setattr(row_statistics, "_CHUNK", 37)
    parts = evaluate(mixed(300, 200), bootstrap=settings)
    assert parts.micro == whole.micro
    assert parts.breakdowns == whole.breakdowns
    assert whole.intervals is not None
    assert parts.intervals is not None
    for one, other in zip(*(found["rewards"]["f1"] for found in (whole.intervals, parts.intervals)), strict=True):
        assert one == pytest.approx(other, abs=0.01)


@pytest.mark.parametrize("wrong", [{"resamples": -1}, {"seed": -1}, {"level": 1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FFRError, match="bootstrap: found"):
        BootstrapSettings(**wrong)


@pytest.mark.parametrize("name", BREAKDOWNS)
def test_a_part_is_what_its_rows_alone_give(name: str) -> None:
    rows = drawn(300, 5)

    def value(row: Row) -> float:
        gold = parse_leniently(row["labels"])
        return {
            "dialogue_length": row["messages"][0]["content"].count("<|utt_id_start|>"),
            "fragment_size": len(gold.utterance_ids) + len(gold.image_ids),
            "dispersion": dispersion(gold.utterance_ids),
            "gold": len(gold.utterance_ids) + len(gold.image_ids),
        }[name]

    parts = evaluate(rows, bootstrap=NONE).breakdowns[name]
    assert sum(part.samples for part in parts) == len(rows)
    least = -1.0
    for label, most in BREAKDOWNS[name][1]:
        mine = [row for row in rows if least < value(row) <= most]
        found = [part for part in parts if part.name == label]
        assert len(found) == bool(mine)
        if mine:
            alone = evaluate(mine, bootstrap=NONE)
            assert (found[0].samples, found[0].malformed) == (len(mine), alone.malformed["any"])
            assert_nearly(found[0].micro, alone.micro)
            assert_nearly(found[0].macro, alone.macro)
            assert found[0].rewards == pytest.approx(alone.rewards)
        least = most
    assert [part.name for part in parts] == [one for one in part_names(name) if one in {part.name for part in parts}]
    assert len(parts) >= 2


def test_a_comparison_is_of_the_rows_that_both_have() -> None:
    rows = drawn(120, 11)
    better = [{**row, "response": row["labels"]} for row in rows]
    random.Random(0).shuffle(better)
    first, second = count_records(rows[:100]), count_records(better[10:])
    found = compare(first, second, bootstrap=BootstrapSettings(300))
    keys = {(row["dialogue_id"], row["messages"][0]["content"]) for row in better[10:]}
    common = [row for row in rows[:100] if (row["dialogue_id"], row["messages"][0]["content"]) in keys]
    alone = evaluate(common, bootstrap=NONE)
    assert (found.matched, found.only_first, found.only_second) == (len(common), 100 - len(common), 110 - len(common))
    assert 0 < len(common) < 100
    assert_nearly(found.first["micro"], alone.micro)
    assert found.second["rewards"]["exact_match"] == 1.0
    expected = alone.micro["joint"]["f1"] - found.second["micro"]["joint"]["f1"]
    assert found.difference["micro"]["joint"]["f1"] == pytest.approx(expected)
    assert found.intervals is not None
    low, high = found.intervals["micro"]["joint"]["f1"]
    assert low < expected < high < 0


def test_a_comparison_is_paired() -> None:
    """Two models that differ in one answer of a hundred: each is uncertain, their difference is not."""
    rows = mixed(100, 60)
    nearly = [*rows[:59], {**rows[59], "response": ""}, *rows[60:]]
    found = compare(*(count_records(one) for one in (rows, nearly)))
    alone = evaluate(rows)
    assert found.intervals is not None
    assert alone.intervals is not None
    (low, high), (wide_low, wide_high) = (one["rewards"]["exact_match"] for one in (found.intervals, alone.intervals))
    assert found.difference["rewards"]["exact_match"] == pytest.approx(0.01)
    assert 0 <= low < high < 0.05
    assert wide_high - wide_low > 0.15


def test_rows_that_are_there_several_times_are_matched_in_turn() -> None:
    gold = Fragment((1, 2), ())
    answers = [gold, Fragment((), ()), Fragment((1,), ())]
    first = count_records([row_of(answer, gold) for answer in answers])
    second = count_records([row_of(answer, gold) for answer in answers[:2]])
    found = compare(first, second, bootstrap=NONE)
    assert (found.matched, found.only_first, found.only_second) == (2, 1, 0)
    assert set(found.difference["rewards"].values()) == {0.0}
    with pytest.raises(FFRError, match="none of 1 and 3 rows is in both: dialogue_id, query and gold answer"):
        compare(count_records([row_of(gold, Fragment((3,), ()))]), first)
