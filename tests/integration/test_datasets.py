"""verl's datasets fed by ours, with the tiny model's real tokenizer and processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer
from verl.utils.dataset.dataset_utils import DatasetPadMode, SFTTensorCollator

from ffr_verl.data.datasets import FFRDataset, FFRSFTDataset
from ffr_verl.data.demo import demo_rows
from ffr_verl.data.prepare import prepare
from ffr_verl.errors import FFRError


@pytest.fixture(scope="session")
def tokenizer(base_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_model)


@pytest.fixture(scope="session")
def processor(base_model: Path) -> Any:
    return AutoProcessor.from_pretrained(base_model)


def rl_dataset(
    file: Path, tokenizer: Any, processor: Any, *, filter_overlong_prompts: bool = False, **ffr: Any
) -> FFRDataset:
    # verl filters in a forked process, which waits for ever when torch has used its threads in this one before.
    settings = {
        "max_prompt_length": 100_000,
        "filter_overlong_prompts": filter_overlong_prompts,
        "truncation": "error",
        "image_key": "images",
        "return_multi_modal_inputs": False,
        "cache_dir": str(file.parent / "cache"),
        "ffr": ffr,
    }
    return FFRDataset(str(file), tokenizer, OmegaConf.create(settings), processor=processor)


def sft_dataset(file: Path, tokenizer: Any, processor: Any, **ffr: Any) -> FFRSFTDataset:
    settings = {
        "messages_key": "messages",
        "pad_mode": "no_padding",
        "max_length": 2048,
        "truncation": "error",
        "ffr": ffr,
    }
    return FFRSFTDataset(str(file), tokenizer, OmegaConf.create(settings), processor=processor)


def images_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        item
        for message in messages
        if isinstance(message["content"], list)
        for item in message["content"]
        if item["type"] == "image"
    ]


def test_rl_rows_carry_prompt_images_and_what_the_reward_needs(parquet: Path, tokenizer: Any, processor: Any) -> None:
    dataset = rl_dataset(parquet / "train.rl.parquet", tokenizer, processor, filter_overlong_prompts=True)
    rows = pq.read_table(parquet / "train.rl.parquet").to_pylist()
    assert len(dataset) == len(rows), "nothing is dropped"
    seen = set()
    without = next(index for index, row in enumerate(rows) if not row["images"])
    for index in (*range(12), without, len(rows) - 1):
        item, row = dataset[index], rows[index]
        images = images_of(item["raw_prompt"])
        assert [Path(image["image"]).relative_to(parquet.parent).as_posix() for image in images] == row["images"]
        assert all(image["max_pixels"] == 602112 for image in images)
        assert item["reward_model"]["ground_truth"] == row["reward_model"]["ground_truth"]
        assert item["extra_info"]["dialogue_id"] == row["extra_info"]["dialogue_id"]
        assert item["data_source"] == "ffr/mldr"
        seen.add(bool(images))
    assert seen == {True, False}, "rows with and without images"


def test_the_order_of_the_file_is_kept(parquet: Path, tokenizer: Any, processor: Any) -> None:
    dataset = rl_dataset(parquet / "train.rl.parquet", tokenizer, processor)
    assert [dataset[index]["extra_info"]["index"] for index in range(20)] == list(range(20))


@pytest.mark.parametrize("style", ["rl", "sft"])
def test_images_are_bounded_in_pixels(tmp_path: Path, style: str, tokenizer: Any, processor: Any) -> None:
    row = next(row for row in demo_rows(tmp_path / "images", rows=30, seed=0) if row["images"])
    for name in set(row["images"]):
        Image.effect_noise((1400, 1000), 40).convert("RGB").save(tmp_path / name)
    (tmp_path / "one.json").write_text(json.dumps([row]))
    prepare(tmp_path / "one.json", images_root=tmp_path, output=tmp_path, split="one")
    make = rl_dataset if style == "rl" else sft_dataset
    for bound in (602_112, 50_176):
        dataset = make(tmp_path / f"one.{style}.parquet", tokenizer, processor, max_pixels=bound)
        if style == "sft":
            dataset.max_length = 100_000
            grid = dataset[0]["multi_modal_inputs"]["image_grid_thw"]
            pixels = (grid[:, 1] * grid[:, 2] * 14 * 14).tolist()
        else:
            from qwen_vl_utils import fetch_image

            pixels = []
            for image in images_of(dataset[0]["raw_prompt"]):
                width, height = fetch_image(image).size
                pixels.append(width * height)
        assert len(pixels) == len(row["images"])
        assert all(0.6 * bound < count <= bound for count in pixels), (pixels, bound)


def test_the_sft_loss_is_on_the_answer_only(parquet: Path, tokenizer: Any, processor: Any) -> None:
    dataset = sft_dataset(parquet / "train.sft.parquet", tokenizer, processor)
    rows = pq.read_table(parquet / "train.sft.parquet").to_pylist()
    for index in range(10):
        item = dataset[index]
        trained = item["input_ids"][item["loss_mask"].bool()]
        text = tokenizer.decode(trained)
        answer = rows[index]["messages"][-1]["content"]
        assert text.replace("\n", "") in (f"{answer}<|im_end|>", f"<|im_start|>assistant{answer}<|im_end|>")
        assert text.startswith(answer), "the model is not trained to write its own role"


def test_rows_with_and_without_images_make_one_batch(parquet: Path, tokenizer: Any, processor: Any) -> None:
    dataset = sft_dataset(parquet / "train.sft.parquet", tokenizer, processor)
    rows = pq.read_table(parquet / "train.sft.parquet").to_pylist()
    without = next(index for index, row in enumerate(rows) if not row["images"])
    items = [dataset[index] for index in (0, 1, without)]
    assert {bool(item["multi_modal_inputs"]) for item in items} == {True, False}
    for order in (items, items[::-1]):
        batch = SFTTensorCollator(DatasetPadMode.NO_PADDING)(order)
        assert len(batch["multi_modal_inputs"]) == len(order)


def test_files_of_the_other_stage_and_missing_images_are_refused(
    parquet: Path, tmp_path: Path, tokenizer: Any, processor: Any
) -> None:
    with pytest.raises(FFRError, match=r"train\.sft\.parquet: no column prompt"):
        rl_dataset(parquet / "train.sft.parquet", tokenizer, processor)
    with pytest.raises(FFRError, match=r"train\.rl\.parquet: no column messages"):
        sft_dataset(parquet / "train.rl.parquet", tokenizer, processor)
    for make, name in ((rl_dataset, "train.rl.parquet"), (sft_dataset, "train.sft.parquet")):
        with pytest.raises(FFRError, match=r"row \d+: image .*: no such file"):
            make(parquet / name, tokenizer, processor, images_root=str(tmp_path))
        with pytest.raises(FFRError, match=r"data\.ffr\.max_pixel: unknown key"):
            make(parquet / name, tokenizer, processor, max_pixel=1)


def test_real_dialogues_go_into_both_datasets(real_data: Path, tmp_path: Path, tokenizer: Any, processor: Any) -> None:
    prepare(real_data / "val.json", images_root=real_data, output=tmp_path, split="val")
    rows = pq.read_table(tmp_path / "val.rl.parquet").to_pylist()
    settings = {"max_pixels": 50_176}
    rl = rl_dataset(tmp_path / "val.rl.parquet", tokenizer, processor, **settings)
    sft = sft_dataset(tmp_path / "val.sft.parquet", tokenizer, processor, **settings)
    sft.max_length = 100_000
    rl_settings = [len(images_of(rl[index]["raw_prompt"])) for index in range(5)]
    assert rl_settings == [len(row["images"]) for row in rows[:5]]
    item = sft[0]
    assert int(item["loss_mask"].sum()) > 0
    assert isinstance(item["input_ids"], torch.Tensor)
