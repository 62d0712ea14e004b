"""The drawn data set, and the demo's commands; what needs the model is in tests/integration."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from ffr_verl.data.demo import TOPICS, demo_rows
from ffr_verl.demo.pipeline import print_commands, run_demo
from ffr_verl.demo.stages import DemoSettings
from ffr_verl.dialogues import parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import parse_fragment


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


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("keep")
    for restart in (False, True):
        with pytest.raises(FFRError, match="holds files that the demo did not make"):
            run_demo(tmp_path, DemoSettings.quick(), restart=restart, console=Console(quiet=True))
    assert (tmp_path / "data" / "mine.txt").read_text() == "keep"


def commands_of(settings: DemoSettings) -> list[list[str]]:
    """As `ffr-verl demo --dry-run` prints them."""
    console = Console(file=io.StringIO(), width=80)
    print_commands(Path("demo"), settings, console)
    assert isinstance(console.file, io.StringIO)
    return [shlex.split(line) for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("settings", [DemoSettings(), DemoSettings.quick()])
def test_stages_are_the_users_commands(settings: DemoSettings) -> None:
    commands = commands_of(settings)
    assert all(command[1] == "-m" for command in commands)
    assert [command[2] if "verl.trainer" in command[2] else command[3] for command in commands] == [
        *["prepare"] * 2,
        "verl.trainer.sft_trainer",
        "merge",
        "score",
        "verl.trainer.main_ppo",
        "merge",
        *["infer"] * 2,
        *["evaluate"] * 2,
        *["report"] * 2,
    ]
    assert "+recipe=ffr_sft_cpu" in commands[2]
    assert "+recipe=ffr_grpo_cpu" in commands[5]


@pytest.mark.parametrize("installed", [True, False])
def test_the_gpu_demo_trains_with_the_gpu_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    if installed:
        (tmp_path / "flash_attn.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
    sft, grpo = (command for command in commands_of(DemoSettings(stack="gpu")) if "verl.trainer" in " ".join(command))
    assert "+recipe=ffr_sft" in sft
    assert "+recipe=ffr_grpo" in grpo
    for command in (sft, grpo):
        assert any(part.endswith("use_remove_padding=false") for part in command) == (not installed)
