"""The demo: what a second call does again, its model's tokenizer, and the check of its merged model."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ffr_verl.cli import app
from ffr_verl.data.demo import demo_rows, demo_vocabulary
from ffr_verl.demo.base_model import build_tokenizer
from ffr_verl.demo.pipeline import DemoSettings, run_demo
from ffr_verl.demo.processes import StageFailed
from ffr_verl.errors import FFRError
from ffr_verl.fragments import TAGS
from ffr_verl.integrations.verl.merge import compare_logits


def test_finished_stages_are_remembered_for_their_settings_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def without_training(command: tuple[str, ...], **_options: Any) -> float:
        if "ffr_verl" not in command:
            raise StageFailed("ended with status 1")
        assert CliRunner().invoke(app, command[3:]).exit_code == 0
        ran.append(Path(command[4]).stem)
        return 2.5

    monkeypatch.setattr("ffr_verl.demo.pipeline.run_logged", without_training)
    monkeypatch.setattr("ffr_verl.demo.base_model.write_base_model", lambda folder: folder.mkdir(parents=True))
    settings = DemoSettings(train_rows=8, heldout_rows=4, sft_steps=1, grpo_steps=1)
    for change, restart, expected in (
        ({}, False, ["train", "heldout"]),
        ({}, False, []),
        ({"sft_steps": 2}, False, ["train", "heldout"]),
        ({"sft_steps": 2}, True, ["train", "heldout"]),
    ):
        console = Console(file=io.StringIO(), width=200)
        ran.clear()
        with pytest.raises(StageFailed, match="the stage SFT ended with status 1"):
            run_demo(tmp_path / "demo", dataclasses.replace(settings, **change), restart=restart, console=console)
        assert ran == expected
        assert isinstance(console.file, io.StringIO)
        assert ("prepare train: finished before (2 s)" in console.file.getvalue()) == (not expected)


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


def test_a_model_that_changed_on_the_way_is_refused() -> None:
    import torch

    before = torch.randn(2, 16, 100, generator=torch.Generator().manual_seed(0))
    compare_logits(before, before.bfloat16().float())
    with pytest.raises(FFRError, match=r"not the one that was trained: the logits of a batch differ by \d+\.\d% of"):
        compare_logits(before, before + 0.1 * torch.randn_like(before))
    with pytest.raises(FFRError, match="differ by nan%"):
        compare_logits(before, before * float("nan"))
