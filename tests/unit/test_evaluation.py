"""The metrics: equal to the published script's, to scikit-learn's and to the rewards."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_predictions import NONE, Row, assert_nearly, drawn, prompt_of, row_of, spoilt
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import matthews_corrcoef, precision_recall_fscore_support

from ffr_verl.dialogues import dialogue_ids
from ffr_verl.errors import FFRError
from ffr_verl.evaluation import BootstrapSettings, Confusion, evaluate, evaluate_file, f1, mcc, precision, recall
from ffr_verl.evaluation.counts import plain_masks
from ffr_verl.fragments import AnswerStyle, Fragment, MalformedReason, format_fragment, parse_fragment, parse_leniently
from ffr_verl.rewards import compute_score, diagnose


def published(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Micro metrics as the published evaluation defines them: sets, universe 0 to the dialogue's greatest id, 20 when
    there is none."""

    def ids(text: str, kind: str) -> set[int]:
        found = re.search(rf"<\|{kind}_ids_start\|>(.*?)<\|{kind}_ids_end\|>", text, re.DOTALL)
        if found is None:
            return set()
        try:
            values = json.loads(found.group(1))
        except json.JSONDecodeError:
            return set()
        return {value for value in values if isinstance(value, int) and value >= 0}

    counts = {"utt": [0, 0, 0, 0], "img": [0, 0, 0, 0]}
    for row in rows:
        for kind, total in counts.items():
            in_dialogue = re.findall(rf"<\|{kind}_id_start\|>(\d+)", row["messages"][-1]["content"])
            universe = set(range(max(map(int, in_dialogue), default=20) + 1))
            predicted, gold = ids(row["response"], kind), ids(row["labels"], kind)
            total[0] += len(predicted & gold)
            total[1] += len(predicted - gold)
            total[2] += len(gold - predicted)
            total[3] += len(universe - (predicted | gold))
    result = {}
    for name, (tp, fp, fn, tn) in (("utterance", counts["utt"]), ("image", counts["img"])):
        p = tp / (tp + fp) if tp + fp else 0.0
        r = tp / (tp + fn) if tp + fn else 0.0
        denominator = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        result[name] = {
            "precision": p,
            "recall": r,
            "f1": 2 * p * r / (p + r) if p + r else 0.0,
            "mcc": (tp * tn - fp * fn) / denominator if denominator else 0.0,
        }
    one, other = result["utterance"], result["image"]
    result["joint"] = {}
    for name in ("precision", "recall"):
        total = one[name] + other[name]
        result["joint"][name] = 2 * one[name] * other[name] / total if total else 0.0
    for name in ("f1", "mcc"):
        result["joint"][name] = (one[name] + other[name]) / 2
    return result


@pytest.mark.parametrize("seed", range(5))
def test_micro_is_the_published_one(seed: int) -> None:
    rows = drawn(300, seed)
    assert any(parse_fragment(row["response"]) is None for row in rows)
    assert_nearly(evaluate(rows, bootstrap=NONE).micro, published(rows))


def test_micro_of_real_dialogues_is_the_published_one(real_data: Path, tmp_path: Path) -> None:
    source = random.Random(0)
    rows = []
    for row in json.loads((real_data / "val.json").read_text()):
        gold = parse_fragment(row["solution"])
        assert gold is not None
        kept = [one for one in gold.utterance_ids if source.random() < 0.8]
        answer = format_fragment(Fragment((*kept, source.randrange(40)), gold.image_ids))
        answer = spoilt(source, answer) if source.random() < 0.1 else answer
        rows.append({**row, "response": answer, "labels": row["solution"], "messages": row["messages"][:2]})
    path = tmp_path / "pred.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    result = evaluate_file(path, bootstrap=NONE)
    assert result.samples == len(rows)
    assert_nearly(result.micro, published(rows))
    assert 0.5 < result.micro["utterance"]["f1"] < 0.95


def labels_of(rows: Sequence[Row], modality: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Gold and predicted memberships over each row's universe, widened by ids beyond it."""
    pairs = []
    for row in rows:
        predicted, gold = (
            (fragment.utterance_ids, fragment.image_ids)[modality]
            for fragment in (parse_leniently(row["response"]), parse_leniently(row["labels"]))
        )
        content = row["messages"][0]["content"]
        size = content.count(("<|utt_id_start|>", "<|img_id_start|>")[modality]) or 21
        universe = [*range(size), *{one for one in (*predicted, *gold) if one >= size}]
        pairs.append((np.isin(universe, gold), np.isin(universe, predicted)))
    return pairs


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("modality", [0, 1])
def test_micro_and_macro_are_those_of_scikit_learn(modality: int) -> None:
    rows = drawn(60, 7)
    result = evaluate(rows, bootstrap=NONE)
    name = ("utterance", "image")[modality]
    pairs = labels_of(rows, modality)
    gold, predicted = (np.concatenate(part) for part in zip(*pairs, strict=True))
    p, r, f, _ = precision_recall_fscore_support(gold, predicted, average="binary", zero_division=0)
    expected = {"precision": p, "recall": r, "f1": f, "mcc": matthews_corrcoef(gold, predicted)}
    assert result.micro[name] == pytest.approx(expected, abs=1e-12)
    of_rows = []
    for row, (truth, guess) in zip(rows, pairs, strict=True):
        if parse_fragment(row["response"]) is None and parse_leniently(row["response"]) == Fragment((), ()):
            of_rows.append((0.0, 0.0, 0.0, 0.0))  # no answer is no right answer, also where nothing is gold
        elif not truth.any() and not guess.any():
            of_rows.append((1.0, 1.0, 1.0, 1.0))
        else:
            values = precision_recall_fscore_support(truth, guess, average="binary", zero_division=0)[:3]
            of_rows.append((*values, matthews_corrcoef(truth, guess)))
    assert list(result.macro[name].values()) == pytest.approx(np.mean(of_rows, axis=0), abs=1e-12)


@given(*[st.lists(st.integers(0, 1000), min_size=3, max_size=3)] * 4)
def test_metrics_of_arrays_are_those_of_their_numbers(tp: Any, fp: Any, fn: Any, tn: Any) -> None:
    arrays = Confusion(*[np.array(one) for one in (tp, fp, fn, tn)])
    for metric in (precision, recall, f1, mcc):
        single = [metric(Confusion(*one)) for one in zip(tp, fp, fn, tn, strict=True)]
        assert all(type(one) is float for one in single)
        assert metric(arrays).tolist() == single
        assert all(-1.0000001 <= one <= 1.0000001 for one in single)


def test_macro_joint_is_the_mean_over_rows() -> None:
    right, half = Fragment((1, 2), (0,)), Fragment((1,), ())
    macro = evaluate([row_of(right, right), row_of(half, right)], bootstrap=NONE).macro
    assert macro["joint"]["recall"] == (1.0 + 0.0) / 2, "of the second row the images' recall is 0, and so their mean"
    assert macro["joint"]["f1"] == pytest.approx((1.0 + (2 / 3 + 0.0) / 2) / 2)


@pytest.mark.parametrize("style", ["plain", "reasoning"])
def test_rewards_and_faults_are_those_of_training(style: AnswerStyle) -> None:
    rows = drawn(300, 3)
    source = random.Random(1)
    if style == "reasoning":
        for row in rows:
            if source.random() < 0.9:
                row["response"] = f"<think>hm</think><answer>{row['response']}</answer>"
    result = evaluate(rows, bootstrap=NONE, style=style)
    scores = [compute_score("", row["response"], row["labels"], answer_style=style, weights={"f1": 1}) for row in rows]
    for name, value in result.rewards.items():
        assert value == pytest.approx(np.mean([score[name] for score in scores]), abs=1e-12), name
    assert 0 < result.rewards["format"] < 1
    faults = []
    for row in rows:
        content = row["messages"][0]["content"]
        info = {"utterance_ids": range(content.count("<|utt_id_start|>")), "images": row["images"]}
        faults.append(diagnose(row["response"], row["labels"], extra_info=info, style=style).malformed)
    for reason in MalformedReason:
        assert result.malformed[reason.value] == faults.count(reason), reason
    assert result.malformed["any"] == sum(fault is not None for fault in faults)
    assert {MalformedReason.ID_OUTSIDE_DIALOGUE, MalformedReason.REPEATED_ID} < set(faults)


def test_ids_outside_the_dialogue_are_counted() -> None:
    gold = Fragment((1,), ())
    rows = [
        row_of(Fragment((1, 9, 12), (3,)), gold, turns=9, images=3),
        row_of("<|utt_ids_start|>[70]<|utt_ids_end|> is all", gold),
        row_of(Fragment((1,), (0,)), gold, images=0),
        row_of(gold, gold),
    ]
    window = row_of(Fragment((3, 11), ()), Fragment((11,), ()))
    window["messages"][0]["content"] = prompt_of(range(10, 20), ())
    gaps = row_of(Fragment((3, 4), ()), Fragment((3,), ()))
    gaps["messages"][0]["content"] = prompt_of((1, 3, 5), ())
    result = evaluate([*rows, window, gaps], bootstrap=NONE)
    assert result.ids_outside == {"utterance": 2 + 1 + 1 + 1, "image": 1 + 1, "answers": 5}
    assert (result.malformed["id_outside_dialogue"], result.malformed["missing_tag"]) == (4, 1)
    assert_nearly(result.micro, published([*rows, window, gaps]))


ANSWERS = st.builds(
    Fragment,
    st.lists(st.integers(0, 30), max_size=6).map(tuple),
    st.lists(st.one_of(st.integers(0, 5), st.integers(1000, 1100)), max_size=3).map(tuple),
)
FIRSTS = st.sampled_from([0, 0, 0, 2])


@given(ANSWERS, ANSWERS, FIRSTS, st.integers(0, 20), st.integers(0, 5))
def test_the_quick_count_of_a_row_is_the_thorough_one(
    answer: Fragment, gold: Fragment, first: int, turns: int, images: int
) -> None:
    row = row_of(answer, gold)
    row["messages"][0]["content"] = prompt_of(range(first, turns), range(images))
    unusual = {**row, "response": row["response"].replace("[", "[ ")}
    assert evaluate([row], bootstrap=NONE) == evaluate([unusual], bootstrap=NONE)


@pytest.mark.parametrize("text", ["[01]", "[1,2]", "[ 1]", "[1, 1]", "[1, 1024]", "[\u0661]", "[1,]", "[1_0]", "[+1]"])
def test_only_the_usual_writing_is_read_quickly(text: str) -> None:
    assert plain_masks(f"<|utt_ids_start|>{text}<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>") is None


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.integers(0, 3)), max_size=6))
def test_ids_are_read_wherever_they_stand(prompts: list[tuple[bool, int, int]]) -> None:
    for is_before, turns, images in prompts:
        pictures = "".join(f"<|img_id_start|>{image}<|img_id_end|>" for image in range(images))
        dialogue = "".join(f"<|utt_id_start|>{turn}<|utt_id_end|>" for turn in range(turns))
        found = dialogue_ids(pictures + dialogue if is_before else dialogue + pictures)
        assert (found.turns, found.utterances.end, found.images.end) == (turns, turns, images)


def test_a_row_without_an_answer_is_no_right_answer() -> None:
    """Not even where nothing is gold; micro counts what its response holds, as the published script does."""
    nothing, some = Fragment((), ()), Fragment((1, 2), (0,))
    rows = [row_of(some, some), row_of("", nothing), row_of("", some), row_of(some, some), row_of(nothing, nothing)]
    errors: list[Any] = [None, "400: too long", "400: too long", {"code": 5}, ""]
    marked = [{**row, "error": error} for row, error in zip(rows, errors, strict=True)]
    result, plain = evaluate(marked, bootstrap=NONE), evaluate(rows, bootstrap=NONE)
    assert result.unanswered == {"any": 3, "400: too long": 2, '{"code": 5}': 1}
    assert plain.unanswered == {"any": 0}
    assert (result.malformed["any"], plain.malformed["any"]) == (0, 2)
    assert result.micro == plain.micro
    assert result.macro["joint"]["f1"] == pytest.approx(2 / 5)
    assert result.rewards == pytest.approx(dict.fromkeys(result.rewards, 2 / 5))
    assert plain.macro["joint"]["f1"] == pytest.approx(3 / 5), "an answer of which nothing can be read is none either"
    assert {part.name: part.malformed for part in result.breakdowns["gold"]} == {"empty": 0, "a fragment": 0}


def test_answers_beside_their_golds() -> None:
    nothing, some = Fragment((), ()), Fragment((1, 2), (0,))
    rows = [
        row_of(some, some),
        row_of(nothing, some),
        row_of("no", nothing),
        row_of(Fragment((1, 99), ()), Fragment((1,), ())),
    ]
    result = evaluate(rows, bootstrap=NONE)
    assert result.answers == {
        "malformed": 0.5,
        "outside": 0.25,
        "empty": 0.5,
        "gold_empty": 0.25,
        "utterances": 1.0,
        "gold_utterances": 1.25,
        "images": 0.25,
        "gold_images": 0.5,
    }
    assert result.macro_where_gold == pytest.approx({"utterance": (1 + 0 + 2 / 3) / 3, "image": 0.5})
    found = evaluate(rows, bootstrap=BootstrapSettings(50)).to_dict()
    assert set(found["intervals"]) >= {"answers", "macro_where_gold"}


def test_a_model_without_any_answer_reads_0() -> None:
    rows = [row_of("<think>", gold) for gold in (Fragment((), ()), Fragment((1,), (0,)))]
    result = evaluate(rows, bootstrap=NONE)
    assert result.macro["joint"]["f1"] == result.micro["joint"]["f1"] == result.rewards["f1"] == 0.0


def test_the_layout_of_the_json() -> None:
    found = json.loads(json.dumps(evaluate(drawn(50), bootstrap=BootstrapSettings(20)).to_dict()))
    metrics = {"precision", "recall", "f1", "mcc"}
    for average in ("micro", "macro"):
        assert set(found[average]) == {"utterance", "image", "joint"}
        assert all(set(values) == metrics for values in found[average].values())
        assert all(len(found["intervals"][average]["joint"][name]) == 2 for name in metrics)
    assert found["samples"] == 50
    assert set(found["malformed"]) == {"any", *[reason.value for reason in MalformedReason]}
    assert set(found["rewards"]) == {"f1", "f1_utterances", "f1_images", "format", "exact_match"}
    assert set(found["breakdowns"]) == {"dialogue_length", "fragment_size", "dispersion", "gold"}
    assert evaluate(drawn(50), bootstrap=NONE).to_dict()["intervals"] is None


def test_the_frame_has_a_line_for_each_part_average_and_modality() -> None:
    result = evaluate(drawn(80), bootstrap=BootstrapSettings(20))
    frame = result.to_pandas()
    parts = 1 + sum(map(len, result.breakdowns.values()))
    assert len(frame) == parts * 6
    whole = frame[(frame.breakdown == "all") & (frame.average == "micro") & (frame.modality == "joint")]
    assert whole.f1.item() == result.micro["joint"]["f1"]
    assert whole.f1_low.item() <= whole.f1.item() <= whole.f1_high.item()
    assert frame[frame.breakdown != "all"].f1_low.isna().all()


def test_records_that_are_no_predictions_are_named() -> None:
    good = row_of(Fragment((1,), ()), Fragment((1,), ()))
    with pytest.raises(FFRError, match="record 1: field labels is missing, found response"):
        evaluate([good, {"response": "x", "messages": [], "dialogue_id": "d"}])
    with pytest.raises(FFRError, match="record 1: field labels: malformed gold answer 'x'"):
        evaluate([good, {**good, "labels": "x"}])
    with pytest.raises(FFRError, match="no records"):
        evaluate([])
    with pytest.raises(TypeError, match="a file is evaluated by evaluate_file"):
        evaluate("pred.jsonl")  # type: ignore[arg-type]


def test_records_may_be_an_iterator() -> None:
    def records() -> Iterator[Row]:
        yield from drawn(30)

    assert evaluate(records(), bootstrap=NONE) == evaluate(drawn(30), bootstrap=NONE)


@pytest.mark.parametrize("turns", [(0, 1, 3), (1, 2, 3), (0, 2, 1, 3), (7,), (0, 1, 1, 3), ()])
def test_ids_that_do_not_count_are_each_known(turns: tuple[int, ...]) -> None:
    found = dialogue_ids(prompt_of(turns, ())).utterances
    assert found.end == max(turns, default=-1) + 1
    if len(set(turns)) == len(turns):
        assert found.outside(range(8)) == 8 - len(turns)


def test_rewards_take_the_settings_of_the_recipe() -> None:
    rows = drawn(120, 4)
    kwargs = {"length_penalty": 0.7, "utterance_weight": 0.8, "image_weight": 0.1, "weights": {"f1": 1.0}}
    result = evaluate(rows, bootstrap=NONE, reward_kwargs=kwargs)
    scores = [compute_score("", row["response"], row["labels"], **kwargs) for row in rows]
    for name, value in result.rewards.items():
        assert value == pytest.approx(np.mean([score[name] for score in scores]), abs=1e-12), name
    assert result.rewards["f1"] != evaluate(rows, bootstrap=NONE).rewards["f1"]
    assert result.reward_settings == {
        "from": "reward_kwargs",
        "length_penalty": 0.7,
        "utterance_weight": 0.8,
        "image_weight": 0.1,
    }
    assert evaluate(rows, bootstrap=NONE).reward_settings["from"] == "defaults"


def test_repeated_rows_are_counted() -> None:
    rows = drawn(20)
    without_id = [{name: value for name, value in row.items() if name != "dialogue_id"} for row in rows]
    for some in (rows, without_id):
        assert evaluate(some, bootstrap=NONE).repeated == 0
        assert evaluate([*some, *some[:3]], bootstrap=NONE).repeated == 3
