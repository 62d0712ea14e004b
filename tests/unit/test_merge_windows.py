"""Answers to windows, united, are the answer to the dialogue: for ids of both kinds, for cuts of every size."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_server import FakeServer, completion, fake_server, user_text
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl.data.demo import demo_rows
from ffr_verl.data.prepare import prepare
from ffr_verl.data.sources.json_rows import read_rows
from ffr_verl.data.windows import WindowIds, WindowSettings, cut_row
from ffr_verl.dialogues import Dialogue, Utterance, parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment, format_fragment, parse_fragment
from ffr_verl.inference.endpoint import EndpointSettings
from ffr_verl.inference.infer import infer, merge_predictions, windows_path
from ffr_verl.inference.merge_windows import WindowAnswer, merge_windows, merged_prediction, read_windows
from ffr_verl.predictions import prediction_of, prediction_row

IDS: list[WindowIds] = ["global", "published"]


def rl_row(dialogue: Dialogue, gold: Fragment) -> dict[str, Any]:
    """A row of an RL file."""
    images = [f"{number}.png" for number in dialogue.image_ids]
    return {
        "prompt": [{"role": "user", "content": dialogue.to_prompt("Find it.")}],
        "images": images,
        "reward_model": {"style": "rule", "ground_truth": format_fragment(gold)},
        "extra_info": {
            "index": 0,
            "dialogue_id": dialogue.dialogue_id,
            "query": dialogue.query,
            "utterance_ids": [one.id for one in dialogue.utterances],
            "image_ids": list(dialogue.image_ids),
            "image_utterances": list(dialogue.image_utterances),
            "images": images,
            "window": None,
        },
    }


def dialogue_of(held: list[int]) -> Dialogue:
    """Turns with so many images each."""
    images = iter(range(sum(held)))
    utterances = [
        Utterance(turn, "a", f"text {turn}", tuple([next(images) for _ in range(count)]))
        for turn, count in enumerate(held)
    ]
    return Dialogue("d", tuple(utterances), "q")


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], WindowSettings, random.Random]:
    source = random.Random(draw(st.integers(0, 10**6)))
    dialogue = dialogue_of([source.choice((0, 0, 0, 1, 2)) for _ in range(draw(st.integers(1, 30)))])
    turns, images = len(dialogue.utterances), len(dialogue.image_ids)
    gold = Fragment(
        tuple(sorted(source.sample(range(turns), source.randint(0, turns)))),
        tuple(sorted(source.sample(range(images), source.randint(0, images)))),
    )
    size = draw(st.integers(1, 12))
    settings = WindowSettings(size, draw(st.integers(1, size)), draw(st.sampled_from(IDS)))
    return rl_row(dialogue, gold), settings, source


def window_answer(prediction: dict[str, Any]) -> WindowAnswer:
    return WindowAnswer.of(prediction_of(1, prediction))


def gold_of(row: dict[str, Any]) -> dict[str, Any]:
    return {"response": row["reward_model"]["ground_truth"], "logprobs": [-0.5]}


@given(cases())
def test_the_gold_cut_and_united_is_the_gold(case: tuple[dict[str, Any], WindowSettings, random.Random]) -> None:
    row, settings, source = case
    parts = [prediction_row(part, gold_of(part), logprobs=True) for part in cut_row(row, settings)]
    source.shuffle(parts)
    merged = merged_prediction(row, [window_answer(part) for part in parts])
    assert merged["response"] == row["reward_model"]["ground_truth"]
    alone = prediction_row(row, gold_of(row), logprobs=True)
    if len(row["extra_info"]["utterance_ids"]) <= settings.turns:
        assert merged == alone, "nothing was cut"
    else:
        assert merged == {
            **{name: value for name, value in alone.items() if name != "logprobs"},
            "windows": len(parts),
            "malformed_windows": 0,
        }


@given(cases(), st.data())
def test_every_image_is_found_again(case: tuple[dict[str, Any], WindowSettings, random.Random], data: Any) -> None:
    """One window names one of its images: that path, at that place, is what the merged answer names."""
    row, settings, _ = case
    parts = cut_row(row, settings)
    chosen = data.draw(st.sampled_from(parts))
    info = chosen["extra_info"]
    if not info["images"]:
        return
    place = data.draw(st.integers(0, len(info["images"]) - 1))
    answers = []
    for part in parts:
        ids = (info["image_ids"][place],) if part is chosen else ()
        answer = {"response": format_fragment(Fragment((), ids)), "logprobs": []}
        answers.append(window_answer(prediction_row(part, answer, logprobs=False)))
    found = parse_fragment(merged_prediction(row, answers)["response"])
    assert found is not None
    assert [row["images"][identifier] for identifier in found.image_ids] == [info["images"][place]]


def merged(responses: list[str], ids: WindowIds = "published", **more: Any) -> dict[str, Any]:
    """Two windows of a dialogue of 6 turns; images 0 to 3 in turns 0, 2, 3 and 5."""
    row = rl_row(dialogue_of([1, 0, 1, 1, 0, 1]), Fragment((2,), (1,)))
    parts = cut_row(row, WindowSettings(4, 2, ids))
    assert [part["extra_info"]["images"] for part in parts] == [
        ["0.png", "1.png", "2.png"],
        ["1.png", "2.png", "3.png"],
    ]
    answers = [
        window_answer({**prediction_row(part, {"response": response, "logprobs": []}, logprobs=False), **more})
        for part, response in zip(parts, responses, strict=True)
    ]
    return merged_prediction(row, answers)


def answer(utterances: tuple[int, ...], images: tuple[int, ...]) -> str:
    return format_fragment(Fragment(utterances, images))


@pytest.mark.parametrize(
    ("ids", "first", "second", "united", "malformed"),
    [
        ("published", answer((3, 1), (2,)), answer((3, 5), (1, 2)), answer((1, 3, 5), (2, 3)), 0),
        ("global", answer((3, 1), (2,)), answer((3, 5), (2, 3)), answer((1, 3, 5), (2, 3)), 0),
        ("published", answer((), (7,)), answer((), (0,)), answer((), (1,)), 0),
        ("global", answer((), (3,)), answer((), (0,)), answer((), ()), 0),
        ("global", answer((5,), ()), answer((99,), ()), answer((5, 99), ()), 0),
        ("published", "so: " + answer((1,), (0,)), answer((), ()), answer((1,), (0,)), 1),
        ("global", answer((1,), ()).replace("1", "01"), answer((), ()), answer((1,), ()), 0),
        ("published", "no idea", answer((), ()), answer((), ()), 1),
        ("published", "no idea", "none", "", 2),
    ],
    ids=[
        "overlap",
        "overlap, ids of the whole",
        "an image that the window does not show",
        "an image of the dialogue that the window does not show",
        "utterances are taken as they are",
        "read leniently",
        "well-formed and no JSON",
        "one malformed",
        "all malformed",
    ],
)
def test_answers_that_are_united(ids: WindowIds, first: str, second: str, united: str, malformed: int) -> None:
    found = merged([first, second], ids)
    assert (found["response"], found["malformed_windows"], found["windows"]) == (united, malformed, 2)
    assert found["messages"][-1] == {"role": "assistant", "content": united}


def test_windows_without_an_answer_are_told() -> None:
    found = merged(["", answer((3,), ())], error="400: too long")
    assert found["error"] == "2 of 2 windows have no answer: 400: too long"
    assert found["malformed_windows"] == 0, "no answer is not a malformed one"


def test_answers_that_cannot_be_united(tmp_path: Path) -> None:
    row = rl_row(dialogue_of([1, 0, 1, 1, 0, 1]), Fragment((2,), (1,)))
    other = rl_row(dialogue_of([1, 0, 1, 1, 0, 1]), Fragment((2,), (1,)))
    other["prompt"][0]["content"] = other["prompt"][0]["content"].replace("text 1", "text one")
    parts = [
        window_answer(prediction_row(part, gold_of(part), logprobs=True))
        for part in cut_row(row, WindowSettings(4, 2, "global"))
    ]
    with pytest.raises(ValueError, match=r"no answer to a window with utterance 4 \(2 utterances are in none\)"):
        merged_prediction(row, parts[:1])
    three = [
        window_answer(prediction_row(part, gold_of(part), logprobs=True))
        for part in cut_row(row, WindowSettings(4, 1, "global"))
    ]
    with pytest.raises(ValueError, match=r"no answer to window 1 \(d_split_1\)"):
        merged_prediction(row, [three[0], three[2]])  # which show all turns
    with pytest.raises(ValueError, match=r"two answers to window 1 \(d_split_1\)"):
        merged_prediction(row, [*three, three[1]])
    with pytest.raises(ValueError, match="d_split_0 is not a window of it; the data were prepared otherwise"):
        merged_prediction(other, parts)
    part = prediction_row(cut_row(row, WindowSettings(4, 2, "global"))[1], gold_of(row), logprobs=True)
    content = part["messages"][0]["content"].replace("<|img_id_start|>3<", "<|img_id_start|>5<")
    changed = window_answer({**part, "messages": [{"role": "user", "content": content}]})
    with pytest.raises(ValueError, match=r"d_split_1 has the image ids \[1, 2, 5\], not 3 in order"):
        merged_prediction(row, [parts[0], changed])
    for change, message in (
        ({"response": None}, "line 1: field response is null"),
        ({"response": 3}, "line 1: field response: found a number, expected text"),
        ({"dialogue_id": None}, "line 1: field dialogue_id is null"),
        ({"messages": []}, "line 1: field messages: no message of role 'user'"),
        ({"messages": [{"role": "user", "content": "Hello"}]}, "line 1: no <|query_start|>"),
    ):
        (tmp_path / "p.jsonl").write_text(json.dumps({**prediction_row(row, gold_of(row), logprobs=True), **change}))
        with pytest.raises(FFRError, match=re.escape(message)):
            list(merge_windows(read_windows(tmp_path / "p.jsonl"), [], name="p.jsonl"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with `whole.rl.parquet` of 8 dialogues of up to 18 turns, and windows of 7 turns of both kinds."""
    rows = list(
        demo_rows(tmp_path / "images", rows=8, turns_per_topic=(2, 6), image_share=0.5, empty_share=0.0, seed=41)
    )
    rows[3]["dialogue_id"] = "own_split_3"  # an id that looks like a window's
    for row in rows[:2]:  # two queries of one dialogue, as raw dialogues give them
        row["dialogue_id"], row["messages"], row["images"] = "twice", rows[0]["messages"], rows[0]["images"]
    second = rows[1]["messages"] = [dict(message) for message in rows[0]["messages"]]
    query = parse_dialogue(second, "").tagged_query
    second[-2]["content"] = second[-2]["content"].replace(query, "<|query_start|>something else<|query_end|>")
    second[-1]["content"] = rows[1]["solution"] = answer((0,), ())
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prepare(tmp_path / "rows.json", images_root=tmp_path, output=tmp_path, split="whole", max_images=20)
    for ids in IDS:
        cut = WindowSettings(7, 4, ids)
        prepare(tmp_path / "rows.json", images_root=tmp_path, output=tmp_path, split=ids, max_images=7, window=cut)
    return tmp_path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def lines(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("ids", IDS)
def test_windows_of_a_row_are_those_that_prepare_writes(data: Path, ids: WindowIds) -> None:
    made = [part for row in rows_of(data / "whole.rl.parquet") for part in cut_row(row, WindowSettings(7, 4, ids))]
    written = rows_of(data / f"{ids}.rl.parquet")
    assert len(made) == len(written) > 8
    for one, other in zip(made, written, strict=True):
        for row in (one, other):
            for name in ("index", "split"):
                del row["extra_info"][name]
        assert one == other
    example = [{"role": "user", "content": "Find a cat."}, {"role": "assistant", "content": "none"}]
    row = rows_of(data / "whole.rl.parquet")[0]
    taught = cut_row({**row, "prompt": [*example, *row["prompt"]]}, WindowSettings(7, 4, ids))
    assert [part["prompt"][2:] for part in taught] == [
        part["prompt"] for part in cut_row(row, WindowSettings(7, 4, ids))
    ]
    assert [part["prompt"][:2] for part in taught] == [example] * len(taught)
    with pytest.raises(FFRError, match=r"_split_0: is a window already; give the file of whole dialogues"):
        cut_row(next(row for row in written if row["extra_info"]["window"]), WindowSettings(3, 3, ids))


@pytest.mark.parametrize("ids", IDS)
def test_predictions_of_any_tool_are_united(data: Path, tmp_path: Path, ids: WindowIds) -> None:
    """Rows of windows in any order, images as ms-swift writes them."""
    made = [prediction_row(row, gold_of(row), logprobs=True) for row in rows_of(data / f"{ids}.rl.parquet")]
    for row in made:
        row["images"] = [{"bytes": None, "path": name} for name in row["images"]]
    random.Random(1).shuffle(made)
    (tmp_path / "windows.jsonl").write_text("\n".join(json.dumps(row) for row in made))
    whole = data / "whole.rl.parquet"
    summary = merge_predictions(tmp_path / "windows.jsonl", [whole], tmp_path / "new" / "pred.jsonl")
    found = lines(tmp_path / "new" / "pred.jsonl")
    assert summary.rows == len(found) == 8
    for row, line in zip(rows_of(whole), found, strict=True):
        assert line["response"] == line["labels"] == row["reward_model"]["ground_truth"]
        assert line["images"] == row["images"]
        assert line["dialogue_id"] == row["extra_info"]["dialogue_id"]
        assert ("logprobs" in line) == ("windows" not in line)
    assert {"windows" in line for line in found} == {True, False}
    (tmp_path / "windows.jsonl").write_text(
        "\n".join(json.dumps(row) for row in made if row["dialogue_id"] != "twice_split_1")
    )
    with pytest.raises(FFRError, match=r"windows\.jsonl: to row 0 of .*whole.* \(twice, .*\): no answer to a window"):
        merge_predictions(tmp_path / "windows.jsonl", [whole], tmp_path / "other.jsonl")
    second = {**made[0], "response": "another"}
    (tmp_path / "windows.jsonl").write_text("\n".join(json.dumps(row) for row in [*made, made[0], second]))
    with pytest.raises(FFRError, match=rf"line {len(made) + 2}: another answer to .* of .*, which has one already"):
        merge_predictions(tmp_path / "windows.jsonl", [whole], tmp_path / "other.jsonl")
    (tmp_path / "windows.jsonl").write_text("\n".join(json.dumps(row) for row in [*made, made[0]]))
    assert merge_predictions(tmp_path / "windows.jsonl", [whole], tmp_path / "same.jsonl").rows == 8
    assert (tmp_path / "same.jsonl").read_text() == (tmp_path / "new" / "pred.jsonl").read_text()
    (tmp_path / "windows.jsonl").write_text("")
    with pytest.raises(FFRError, match="no predictions; give a JSONL file"):
        merge_predictions(tmp_path / "windows.jsonl", [whole], tmp_path / "other.jsonl")
    assert not (tmp_path / "other.jsonl").exists()


@pytest.fixture
def server(data: Path) -> Iterator[FakeServer]:
    """Knows the gold answers to all windows and whole dialogues."""
    known: dict[str, str] = {}
    for name in ("whole", *IDS):
        for row in rows_of(data / f"{name}.rl.parquet"):
            known[row["prompt"][-1]["content"].replace("<image>", "")] = row["reward_model"]["ground_truth"]
    with fake_server() as fake:
        fake.reply = lambda body, number: completion(known[user_text(body)])
        yield fake


@pytest.mark.parametrize("ids", IDS)
def test_cut_answer_and_unite_in_one_go(data: Path, server: FakeServer, tmp_path: Path, ids: WindowIds) -> None:
    """By `--window`, and by `--merge` of windows that were prepared: the same two files, and the gold."""
    whole = data / "whole.rl.parquet"
    asked = EndpointSettings(server.url, "m", data.resolve(), max_images=7)
    with pytest.raises(FFRError, match=r"images, at most 7; raise --max-images, or cut long dialogues into windows"):
        infer([whole], tmp_path / "a.jsonl", asked)
    assert not server.bodies
    summary = infer([whole], tmp_path / "a.jsonl", asked, window=WindowSettings(7, 4, ids))
    assert (summary.rows, summary.windows) == (8, windows_path(tmp_path / "a.jsonl"))
    found = lines(tmp_path / "a.jsonl")
    assert [line["response"] for line in found] == [line["labels"] for line in found]
    assert len(lines(tmp_path / "a.windows.jsonl")) == summary.asked == len(server.bodies) > 8
    infer([data / f"{ids}.rl.parquet"], tmp_path / "b.jsonl", asked, whole=[whole])
    for name in ("", ".windows"):
        assert [{**line, "split": ""} for line in lines(tmp_path / f"a{name}.jsonl")] == [
            {**line, "split": ""} for line in lines(tmp_path / f"b{name}.jsonl")
        ]
    assert {line["split"] for line in found} == {"whole"}
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(FFRError, match=r"a\.windows\.jsonl: is there already"):
        infer([whole], tmp_path / "a.jsonl", asked, window=WindowSettings(7, 4, ids))


def test_a_window_that_covers_the_dialogue_changes_nothing(data: Path, server: FakeServer, tmp_path: Path) -> None:
    asked = EndpointSettings(server.url, "m", data.resolve(), max_images=20)
    infer([data / "whole.rl.parquet"], tmp_path / "a.jsonl", asked)
    infer([data / "whole.rl.parquet"], tmp_path / "b.jsonl", asked, window=WindowSettings(18, 9, "published"))
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    assert (tmp_path / "b.windows.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()


def test_the_first_dialogues_only(data: Path, server: FakeServer, tmp_path: Path) -> None:
    asked = EndpointSettings(server.url, "m", data.resolve(), max_images=7)
    infer([data / "whole.rl.parquet"], tmp_path / "a.jsonl", asked, window=WindowSettings(7, 4, "global"), limit=3)
    assert len(lines(tmp_path / "a.jsonl")) == 3


def test_what_cannot_be_merged_is_found_before_a_model_is_asked(
    data: Path, server: FakeServer, tmp_path: Path
) -> None:
    table = pq.read_table(data / "global.rl.parquet")
    pq.write_table(table.slice(1), tmp_path / "less.rl.parquet")
    asked = EndpointSettings(server.url, "m", data.resolve(), max_images=20)
    with pytest.raises(FFRError, match=r"less\.rl\.parquet: to row 0 of .*: no answer to a window with utterance 0"):
        infer([tmp_path / "less.rl.parquet"], tmp_path / "a.jsonl", asked, whole=[data / "whole.rl.parquet"])
    assert not server.bodies


def test_ids_in_a_thought_are_no_part_of_the_united_answer() -> None:
    row = rl_row(dialogue_of([0] * 6), Fragment((4,), ()))
    answers = []
    for part in cut_row(row, WindowSettings(4, 2, "global")):
        gold = part["reward_model"]["ground_truth"]
        draft = format_fragment(Fragment((part["extra_info"]["utterance_ids"][0],), ()))
        response = f"<think>{draft}?</think><answer>{gold}</answer>"
        answers.append(window_answer(prediction_row(part, {"response": response, "logprobs": []}, logprobs=False)))
    united = merged_prediction(row, answers, style="reasoning")
    assert united["malformed_windows"] == 0
    assert parse_fragment(united["response"], style="reasoning") == Fragment((4,), ())
