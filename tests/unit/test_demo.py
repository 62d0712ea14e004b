"""The drawn data set, the tiny model's tokenizer, and the demo's bookkeeping."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from ffr_verl.data.demo import TOPICS, demo_rows, demo_vocabulary
from ffr_verl.demo.base_model import build_tokenizer
from ffr_verl.demo.pipeline import _Record, run_demo
from ffr_verl.demo.stages import DemoSettings, stages_of
from ffr_verl.dialogues import parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import TAGS, parse_fragment


def test_equal_seeds_give_equal_rows_and_pictures(tmp_path: Path) -> None:
    first, second, third = (
        list(demo_rows(tmp_path / name / "images", rows=20, seed=seed))
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first == second != third
    pictures = [{path.name: path.read_bytes() for path in (tmp_path / name / "images").iterdir()} for name in "ab"]
    assert pictures[0] == pictures[1]


def test_what_the_set_contains(tmp_path: Path) -> None:
    rows = list(demo_rows(tmp_path / "images", rows=300, seed=0))
    golds = [parse_fragment(row["solution"]) for row in rows]
    assert all(gold is not None for gold in golds)
    spans = [gold.utterance_ids for gold in golds if gold and len(gold.utterance_ids) > 2]
    dense = sum(ids[-1] - ids[0] == len(ids) - 1 for ids in spans)
    assert 0 < dense < len(spans), "dense and scattered fragments"
    assert 0.05 < sum(gold is not None and not gold.utterance_ids for gold in golds) / len(rows) < 0.3
    assert any(not row["images"] for row in rows), "dialogues without images"
    assert any(gold is not None and gold.image_ids for gold in golds), "images in fragments"


def test_an_image_alone_tells_its_topic(tmp_path: Path) -> None:
    """The gold image ids follow from the pictures, whose text says nothing of their topic."""
    words = {word: topic.name for topic in TOPICS for word in topic.words}
    for row in demo_rows(tmp_path / "images", rows=200, seed=2):
        dialogue = parse_dialogue(row["messages"], row["dialogue_id"])
        topics = {words[word] for word in dialogue.query.split() if word in words}
        assert len(topics) == 1
        expected = [index for index, path in enumerate(row["images"]) if Path(path).name.split("_")[0] in topics]
        gold = parse_fragment(row["solution"])
        assert gold is not None
        assert list(gold.image_ids) == expected
        shown = [utterance for utterance in dialogue.utterances if utterance.image_ids]
        assert not [word for utterance in shown for word in utterance.text.split() if word in words]


def test_splits_have_no_dialogue_in_common(demo_set: Path) -> None:
    prompts = [
        {row["messages"][1]["content"] for row in json.loads((demo_set / f"{split}.json").read_text())}
        for split in ("train", "heldout")
    ]
    assert not prompts[0] & prompts[1]


def test_the_tokenizer_writes_back_what_it_read(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    for row in demo_rows(tmp_path / "images", rows=30, seed=4):
        for message in row["messages"]:
            text = message["content"].replace("<image>", "<|image_pad|>")
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("[12, 3]")) == 5, "ids and separators are single tokens"
    assert set(demo_vocabulary()) <= set(tokenizer.get_vocab())


def test_the_tags_survive_the_decoding_that_verl_does() -> None:
    tokenizer = build_tokenizer()
    answer = f"{TAGS[0]}[1, 2]{TAGS[1]};{TAGS[2]}[0]{TAGS[3]}"
    assert tokenizer.decode(tokenizer.encode(answer + "<|im_end|>"), skip_special_tokens=True) == answer


def test_finished_stages_are_remembered_for_their_settings_only(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    record = _Record(path, DemoSettings.quick())
    record.finished("SFT", 10.0)
    record.finished("SFT", 2.5)
    assert _Record(path, DemoSettings.quick()).seconds == {"SFT": 12.5}
    other = _Record(path, DemoSettings())
    assert other.seconds == {}
    assert other.is_of_other_settings


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("keep")
    for restart in (False, True):
        with pytest.raises(FFRError, match="holds files that the demo did not make"):
            run_demo(tmp_path, DemoSettings.quick(), restart=restart, console=Console(quiet=True))
    assert (tmp_path / "data" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("settings", [DemoSettings(), DemoSettings.quick()])
def test_stages_are_the_users_commands(settings: DemoSettings, tmp_path: Path) -> None:
    commands = [" ".join(stage.command[1:]) for stage in stages_of(tmp_path, settings, flash_attention=False)]
    assert [command.split()[1] if "verl.trainer" in command else command.split()[2] for command in commands] == [
        *["prepare"] * 2,
        "verl.trainer.sft_trainer",
        "merge",
        "score",
        "verl.trainer.main_ppo",
        "merge",
        *["infer"] * 2,
        *["evaluate"] * 2,
        "report",
    ]
    assert "+recipe=ffr_sft_cpu" in commands[2]
    assert "+recipe=ffr_grpo_cpu" in commands[5]


def test_the_gpu_demo_trains_with_the_gpu_recipes(tmp_path: Path) -> None:
    with_flash, without = (
        [
            " ".join(stage.command)
            for stage in stages_of(tmp_path, DemoSettings(stack="gpu"), flash_attention=installed)
            if "verl.trainer" in " ".join(stage.command)
        ]
        for installed in (True, False)
    )
    assert [("+recipe=ffr_sft " in sft, "+recipe=ffr_grpo " in grpo) for sft, grpo in (with_flash, without)] == [
        (True, True)
    ] * 2
    assert not any("use_remove_padding" in command for command in with_flash)
    assert all("use_remove_padding=false" in command for command in without)
