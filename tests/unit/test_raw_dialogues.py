"""Raw dialogues become rows and come back; what is wrong with one is told whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ffr_verl.data.prepare import prepare
from ffr_verl.data.sources.raw_dialogues import RawDialogueError, rows_of_raw_dialogue
from ffr_verl.data.templates import TEMPLATES, PromptTemplate, detect_language
from ffr_verl.dialogues import Dialogue, Utterance, parse_dialogue, reserved_token
from ffr_verl.errors import FFRError
from ffr_verl.fragments import parse_fragment

TEXTS = (
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30),
        st.sampled_from(
            ["", "见到你很高兴", "👩‍👩‍👧 😀", "שלום, עולם", "a: b: c", "one\ntwo\r\nthree", "x:", ":", "<image", "…"]
        ),
    )
    .map(str.strip)
    .filter(lambda text: reserved_token(text) is None)
)
SPEAKERS = TEXTS.filter(lambda text: ": " not in text and "\n" not in text)


@st.composite
def dialogues(draw: st.DrawFn) -> tuple[Dialogue, list[str]]:
    utterances, images = [], 0
    for number in range(draw(st.integers(1, 6))):
        held = draw(st.integers(0, 3))
        captions = tuple(draw(TEXTS) for _ in range(held))
        ids = tuple(range(images, images + held))
        images += held
        utterances.append(Utterance(number, draw(SPEAKERS), draw(TEXTS), ids, captions if any(captions) else ()))
    return Dialogue("d", tuple(utterances), draw(TEXTS)), [f"{number}.png" for number in range(images)]


def without_captions(dialogue: Dialogue) -> Dialogue:
    utterances = [Utterance(one.id, one.speaker, one.text, one.image_ids) for one in dialogue.utterances]
    return Dialogue(dialogue.dialogue_id, tuple(utterances), dialogue.query)


@given(dialogues(), st.sampled_from(["Give the ids.", TEMPLATES["zh"].system or ""]))
def test_a_prompt_and_a_dialogue_are_each_others_inverse(made: tuple[Dialogue, list[str]], instruction: str) -> None:
    dialogue, _ = made
    for captions, expected in ((True, dialogue), (False, without_captions(dialogue))):
        prompt = dialogue.to_prompt(instruction, captions=captions)
        found = parse_dialogue([{"role": "user", "content": prompt}], "d")
        assert found == expected
        assert found.to_prompt(instruction, captions=captions) == prompt


@given(dialogues(), st.sampled_from([*TEMPLATES.values(), PromptTemplate("{query}{dialogue}")]))
def test_a_template_keeps_the_dialogue(made: tuple[Dialogue, list[str]], template: PromptTemplate) -> None:
    dialogue, _ = made
    assert parse_dialogue(template.messages(dialogue, captions=True), "d") == dialogue


RAW: dict[str, Any] = {
    "dialogue_id": "w1",
    "dialogue": [
        {"utterance_idx": 1, "speaker": "安娜", "utterance": "看看这只猫"},
        {
            "utterance_idx": 2,
            "speaker": "安娜",
            "utterance": [{"image_url": "cat.png", "caption": "一只猫"}, {"image_url": "cat.png", "caption": None}],
        },
        {"utterance_idx": 4, "speaker": "鲍勃", "utterance": "好可爱"},
        {"utterance_idx": 7, "speaker": "鲍勃", "utterance": ""},
    ],
    "query_text": "猫",
    "gt_turns": [4, 2],
}


def test_gold_images_are_those_inside_the_gold_turns() -> None:
    (row,) = rows_of_raw_dialogue(RAW)
    assert row["solution"] == "<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[0, 1]<|img_ids_end|>"
    assert row["images"] == ["cat.png", "cat.png"]
    dialogue = parse_dialogue(row["messages"], "w1")
    assert dialogue.query == "猫"
    assert [utterance.text for utterance in dialogue.utterances] == ["看看这只猫", "", "好可爱", ""]
    assert "请求" in row["messages"][1]["content"], "a Chinese dialogue gets Chinese instructions"
    assert "一只猫" not in row["messages"][1]["content"], "captions are left out unless asked for"
    (row,) = rows_of_raw_dialogue(RAW, captions=True)
    assert parse_dialogue(row["messages"], "w1").utterances[1].captions == ("一只猫", "")


@pytest.mark.parametrize(
    "queries",
    [
        {"query_text": ["猫", "狗"], "gt_turns": [[1], []]},
        {"queries": [{"query_text": "猫", "gt_turns": [1]}, {"query_text": "狗", "gt_turns": []}]},
    ],
    ids=["lists", "queries"],
)
def test_several_queries_of_a_dialogue(queries: dict[str, Any]) -> None:
    raw = {name: value for name, value in RAW.items() if name not in ("query_text", "gt_turns")} | queries
    rows = list(rows_of_raw_dialogue(raw))
    assert [parse_dialogue(row["messages"], "").query for row in rows] == ["猫", "狗"]
    assert [parse_fragment(row["solution"]).utterance_ids for row in rows] == [(0,), ()]  # type: ignore[union-attr]


def test_all_that_is_wrong_is_told() -> None:
    row = {**RAW, "dialogue": [{"utterance": "<image>"}, "x", {"utterance": 3}], "query_text": 5, "gt_turns": [9]}
    with pytest.raises(RawDialogueError) as caught:
        list(rows_of_raw_dialogue(row))
    assert [field for _, field, _ in caught.value.problems] == [
        "dialogue[0].utterance",
        "dialogue[1]",
        "dialogue[2].utterance",
        "query_text",
        "gt_turns",
    ]


def test_languages() -> None:
    assert [detect_language(text) for text in ("", "12:30 !", "hello 你好", "早上好 OK", "привет")] == [
        "en", "en", "zh", "zh", "en",
    ]  # fmt: skip


def test_templates_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text("system: You help.\nuser: |\n  Search {query}\n  here:\n  {dialogue}\n")
    template = PromptTemplate.read(path)
    (row,) = rows_of_raw_dialogue(RAW, template=template)
    assert row["messages"][0]["content"] == "You help."
    assert row["messages"][1]["content"].startswith("Search <|query_start|>猫<|query_end|>\nhere:\n<|utt_id_start|>0<")
    for text, message in (
        ("user: '{query}'", r"expected \{query\} and \{dialogue\} once each"),
        ("user: '{dialogue} {query}'", r"\{dialogue\} at the end"),
        ("user: '{query} {query} {dialogue}'", "once each"),
        ("user: '{query} <image> {dialogue}'", "user: holds <image>"),
        ("users: x", "no text under the key user"),
        ("user: '{query}{dialogue}'\nsytem: x", r"sytem: unknown key; did you mean 'system'\?"),
        ("user: '{query}{dialogue}'\nsystem: 3", "system: found 3, expected a text"),
        ("user: [", "give a YAML file with the keys system and user"),
    ):
        path.write_text(text)
        with pytest.raises(FFRError, match=message):
            PromptTemplate.read(path)
    with pytest.raises(FFRError, match="No such file"):
        PromptTemplate.read(tmp_path / "none.yaml")


def test_a_chat_comes_back_out_of_both_files(tmp_path: Path) -> None:
    """Names, empty turns, several images of a turn, captions, emoji and right-to-left text."""
    for name in ("cat.png", "犬 1.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    turns = [
        {"utterance_idx": 0, "speaker": "安娜 👩‍👩‍👧", "utterance": "看 😀 👍🏽"},
        {"utterance_idx": 1, "speaker": "דנה", "utterance": "שלום, עולם! \u202bمرحبا\u202c"},
        {"utterance_idx": 2, "speaker": "", "utterance": ""},
        {
            "utterance_idx": 3,
            "speaker": "Bob:",
            "utterance": [
                "two: of\nthem",
                {"image_url": "cat.png", "caption": 'a 🐈; "quoted"'},
                {"image_url": "犬 1.png"},
                {"image_url": "cat.png", "caption": "קטע"},
            ],
        },
        {"utterance_idx": 4, "speaker": "O'Neil <o@x.org>", "utterance": "a < b & c > d | <3"},
        {"utterance_idx": 5, "speaker": "x", "utterance": [{"image_url": "cat.png"}]},
    ]
    utterances = [Utterance(number, str(turn["speaker"]), str(turn["utterance"])) for number, turn in enumerate(turns)]
    utterances[3] = Utterance(3, "Bob:", "two: of\nthem", (0, 1, 2), ('a 🐈; "quoted"', "", "קטע"))
    utterances[5] = Utterance(5, "x", "", (3,))
    (tmp_path / "chat.json").write_text(
        json.dumps([{"dialogue_id": "群聊", "dialogue": turns, "query_text": "小狗 🐶?", "gt_turns": [3, 5]}])
    )
    options: dict[str, Any] = {"images_root": tmp_path, "output": tmp_path / "out", "source_format": "dialogue"}
    for embed in (False, True):
        made = prepare(tmp_path / "chat.json", split="t", captions=True, embed_images=embed, **options)
        for file, column in ((made.rl_path, "prompt"), (made.sft_path, "messages")):
            (row,) = pq.read_table(file).to_pylist()
            dialogue = parse_dialogue(row[column], "群聊")
            images = [image["path"] if embed else image for image in row["images"]]
            assert images == ["cat.png", "犬 1.png", "cat.png", "cat.png"]
            assert dialogue.utterances == tuple(utterances)
            assert dialogue.query == "小狗 🐶?"


def test_prepare_takes_raw_dialogues(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    source = tmp_path / "raw.jsonl"
    second = {
        **RAW,
        "dialogue_id": "w2",
        "dialogue": [{"utterance": "hello"}],
        "gt_turns": [0],
        "query_text": "greeting",
    }
    source.write_text("\n".join(json.dumps(row) for row in (RAW, second)))
    summary = prepare(source, images_root=tmp_path, output=tmp_path / "out", split="t", source_format="dialogue")
    rows = pq.read_table(summary.rl_path).to_pylist()
    assert [row["extra_info"]["dialogue_id"] for row in rows] == ["w1", "w2"]
    assert rows[0]["prompt"][0]["content"] == TEMPLATES["zh"].system
    assert rows[1]["prompt"][0]["content"] == TEMPLATES["en"].system
    source.write_text(json.dumps({**RAW, "gt_turns": [3]}))
    with pytest.raises(FFRError, match=r"gold_outside \(1 row\)[\s\S]*row 0: field 'gt_turns': \[3\] are no"):
        prepare(source, images_root=tmp_path, output=tmp_path / "out", split="t", source_format="dialogue")
