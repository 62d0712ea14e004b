"""Every model family: rows become the tokens and pictures that the model's own processor makes of them."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import DENSE_FAMILIES  # type: ignore[import-not-found]
from PIL import Image
from test_datasets import rl_dataset, sft_dataset  # type: ignore[import-not-found]
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from ffr_verl.data.demo import demo_rows
from ffr_verl.data.parquet_files import recorded_family
from ffr_verl.data.prepare import prepare
from ffr_verl.data.tokens import PromptTokens
from ffr_verl.dialogues import with_image_parts
from ffr_verl.images import image_tokens, model_picture
from ffr_verl.integrations.verl.frozen_vision_tower import freeze_vision_tower
from ffr_verl.integrations.verl.preflight import find_problems
from ffr_verl.model_families import family_of_model

SIZES = ((40, 40), (300, 200), (640, 480), (1400, 1000), (30, 2000))
BOUND = 602_112
NO_THOUGHT = "+data.apply_chat_template_kwargs.enable_thinking=false"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with and without pictures, which are of many sizes."""
    folder = tmp_path_factory.mktemp("rows")
    found = list(demo_rows(folder / "images", rows=6, seed=0, image_share=0.2))
    assert {bool(row["images"]) for row in found} == {True, False}
    for number, name in enumerate(sorted({name for row in found for name in row["images"]})):
        Image.effect_noise(SIZES[number % len(SIZES)], 40).convert("RGB").save(folder / name)
    del found[0]["messages"][0]  # one without a system message, which some templates then add
    (folder / "rows.json").write_text(json.dumps(found))
    return folder


@pytest.mark.parametrize("name", DENSE_FAMILIES)
def test_rows_become_what_the_models_own_processor_makes_of_them(
    family_models: Path, rows: Path, tmp_path: Path, name: str
) -> None:
    model = family_models / name
    processor, family = AutoProcessor.from_pretrained(model), family_of_model(model)
    assert family.name == name
    options: dict[str, Any] = {"images_root": rows, "output": tmp_path, "split": "t", "max_images": 64}
    summary = prepare(rows / "rows.json", tokenizer=str(model), **options)
    settings = {"apply_chat_template_kwargs": family.template_kwargs}
    rl = rl_dataset(tmp_path / "t.rl.parquet", processor.tokenizer, processor, verl=settings)
    sft = sft_dataset(
        tmp_path / "t.sft.parquet", processor.tokenizer, processor, verl={**settings, "max_length": 9999}
    )
    lengths = []
    for index, row in enumerate(pq.read_table(tmp_path / "t.rl.parquet").to_pylist()):
        pictures = [model_picture(rows / path, max_pixels=BOUND, family=family) for path in row["images"]]
        files = [Image.open(rows / path) for path in row["images"]]
        messages = with_image_parts(row["prompt"])
        text = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **family.template_kwargs
        )
        own = processor(text=[text], images=files or None, return_tensors="pt")
        answer = [{"type": "text", "text": row["reward_model"]["ground_truth"]}]
        text = processor.apply_chat_template(
            [*messages, {"role": "assistant", "content": answer}], tokenize=False, **family.template_kwargs
        )
        whole = processor(text=[text], images=files or None, return_tensors="pt")

        seen, _ = asyncio.run(rl.process_vision_info(rl[index]["raw_prompt"], family.patch_size, None))
        assert [picture.tobytes() for picture in seen or ()] == [picture.tobytes() for picture in pictures]
        item = sft[index]
        assert torch.equal(item["input_ids"], whole["input_ids"][0])
        assert processor.tokenizer.decode(item["input_ids"][item["loss_mask"].bool()]).startswith(answer[0]["text"])
        assert int(item["loss_mask"].argmax()) == own["input_ids"].shape[1], "the prompt is the same in both stages"
        if pictures:
            made = processor.image_processor(images=pictures, return_tensors="pt")
            assert torch.equal(item["multi_modal_inputs"]["pixel_values"], made["pixel_values"])
            assert torch.equal(item["multi_modal_inputs"]["image_grid_thw"], own["image_grid_thw"])
            counts = (own["image_grid_thw"].prod(dim=1) // family.merge_size**2).tolist()
            assert counts == [image_tokens(*file.size, max_pixels=BOUND, family=family) for file in files]
        lengths.append(own["input_ids"].shape[1])
    assert max(lengths) > 1000, "large pictures are in it"
    assert summary.statistics["prompt_tokens_mean"] == pytest.approx(sum(lengths) / len(lengths), abs=1e-3)


@pytest.mark.parametrize("name", DENSE_FAMILIES)
def test_the_vision_tower_is_frozen_and_nothing_else(family_models: Path, name: str) -> None:
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(family_models / name))
    assert freeze_vision_tower(model) > 10
    kinds = {(".visual." in key, parameter.requires_grad) for key, parameter in model.named_parameters()}
    assert kinds == {(True, False), (False, True)}


def test_a_model_of_another_family_than_the_data_were_prepared_for_is_said(
    family_models: Path, rows: Path, tmp_path: Path, composed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """By the preflight check of the recipes, for the family of the model's own files."""
    options: dict[str, Any] = {"images_root": rows, "output": tmp_path, "max_images": 64}
    for split, family in (("old", None), ("new", "qwen3_vl")):
        prepare(rows / "rows.json", split=split, model_family=family, **options)
        found = recorded_family(tmp_path / f"{split}.sft.parquet")
        assert found is not None
        assert found.name == (family or "qwen2_vl")
    with caplog.at_level(logging.WARNING):
        for split in ("new", "old"):
            assert not caplog.messages
            files = [
                f"model.path={family_models / 'qwen3_5'}",
                f"data.train_files={tmp_path / f'{split}.sft.parquet'}",
            ]
            find_problems(composed("sft_trainer", "+recipe=ffr_sft_cpu", *files, NO_THOUGHT)).stop()
    (message,) = caplog.messages
    assert "old.sft.parquet: prepared for qwen2_vl, where a token is 28 x 28 pixels; the model is qwen3_5" in message
    assert "--model-family qwen3_5" in message
    assert PromptTokens(str(family_models / "qwen3_5")).family.factor == 32
