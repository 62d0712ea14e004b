"""verl's datasets fed by ours, with the tiny model's real tokenizer and processor."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from qwen_vl_utils import fetch_image, smart_resize
from transformers import AutoProcessor, AutoTokenizer
from verl.utils.dataset.dataset_utils import DatasetPadMode, SFTTensorCollator

from ffr_verl.data.demo import demo_rows
from ffr_verl.data.prepare import prepare
from ffr_verl.errors import FFRError
from ffr_verl.images import model_picture, resized
from ffr_verl.integrations.verl.datasets import FFRDataset, FFRSFTDataset


@pytest.fixture(scope="session")
def tokenizer(base_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_model)


@pytest.fixture(scope="session")
def processor(base_model: Path) -> Any:
    return AutoProcessor.from_pretrained(base_model)


def rl_dataset(
    file: Path,
    tokenizer: Any,
    processor: Any,
    *,
    filter_overlong_prompts: bool = False,
    verl: Mapping[str, Any] | None = None,
    **ffr: Any,
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
        **(verl or {}),
    }
    return FFRDataset(str(file), tokenizer, OmegaConf.create(settings), processor=processor)


def sft_dataset(
    file: Path, tokenizer: Any, processor: Any, *, verl: Mapping[str, Any] | None = None, **ffr: Any
) -> FFRSFTDataset:
    settings = {
        "messages_key": "messages",
        "pad_mode": "no_padding",
        "max_length": 2048,
        "truncation": "error",
        "ffr": ffr,
        **(verl or {}),
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
    with pytest.raises(
        FFRError, match=r"no row is left: the prompts of all \d+ have more [\s\S]*max_prompt_length=10, or"
    ):
        rl_dataset(
            parquet / "train.rl.parquet",
            tokenizer,
            processor,
            filter_overlong_prompts=True,
            verl={"max_prompt_length": 10},
        )
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


@pytest.mark.parametrize("embed_images", [False, True], ids=["paths", "embedded"])
def test_damaged_images_are_refused_at_construction(
    tmp_path: Path, tokenizer: Any, processor: Any, embed_images: bool
) -> None:
    """Not in the middle of training: a PNG whose header and end are whole cannot be decoded."""
    rows = [row for row in demo_rows(tmp_path / "images", rows=20, seed=0, image_share=0.5) if row["images"]]
    for path in (tmp_path / "images").iterdir():
        Image.effect_noise((56, 56), 60).convert("RGB").save(path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(bytes(content))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prepare(tmp_path / "rows.json", images_root=tmp_path, output=tmp_path, split="t", embed_images=embed_images)
    for make, name in ((rl_dataset, "t.rl.parquet"), (sft_dataset, "t.sft.parquet")):
        with pytest.raises(FFRError, match=r"row 0: image images/.*: cannot be decoded"):
            make(tmp_path / name, tokenizer, processor)


def test_real_dialogues_go_into_both_datasets(real_data: Path, tmp_path: Path, tokenizer: Any, processor: Any) -> None:
    prepare(real_data / "val.json", images_root=real_data, output=tmp_path, split="val")
    rows = pq.read_table(tmp_path / "val.rl.parquet").to_pylist()
    settings = {"max_pixels": 50_176, "images_root": str(real_data)}
    rl = rl_dataset(tmp_path / "val.rl.parquet", tokenizer, processor, **settings)
    sft = sft_dataset(tmp_path / "val.sft.parquet", tokenizer, processor, **settings)
    sft.max_length = 100_000
    rl_settings = [len(images_of(rl[index]["raw_prompt"])) for index in range(5)]
    assert rl_settings == [len(row["images"]) for row in rows[:5]]
    item = sft[0]
    assert int(item["loss_mask"].sum()) > 0
    assert isinstance(item["input_ids"], torch.Tensor)


def test_images_out_of_the_file_are_those_of_the_disk(tmp_path: Path, tokenizer: Any, processor: Any) -> None:
    rows = list(demo_rows(tmp_path / "images", rows=6, seed=0, image_share=0.5))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prepare(tmp_path / "rows.json", images_root=tmp_path, output=tmp_path, split="disk")
    prepare(tmp_path / "rows.json", images_root=tmp_path, output=tmp_path, split="file", embed_images=True)
    disk = sft_dataset(tmp_path / "disk.sft.parquet", tokenizer, processor)
    expected = [disk[index]["multi_modal_inputs"].get("pixel_values") for index in range(6)]
    pictures = [
        [Image.open(image["image"]).convert("RGB").tobytes() for image in images_of(row["raw_prompt"])]
        for row in (rl_dataset(tmp_path / "disk.rl.parquet", tokenizer, processor)[index] for index in range(6))
    ]
    (tmp_path / "images").rename(tmp_path / "gone")
    sft = sft_dataset(tmp_path / "file.sft.parquet", tokenizer, processor)
    rl = rl_dataset(tmp_path / "file.rl.parquet", tokenizer, processor, max_pixels=3136)
    for index, pixels in enumerate(expected):
        found = sft[index]["multi_modal_inputs"].get("pixel_values")
        assert (found is None and pixels is None) or torch.equal(found, pixels)
        images = images_of(rl[index]["raw_prompt"])
        assert [image["image"].convert("RGB").tobytes() for image in images] == pictures[index]
        assert {image["max_pixels"] for image in images} <= {3136}


def test_both_trainers_see_each_picture_upright_and_on_white(tmp_path: Path, tokenizer: Any, processor: Any) -> None:
    """Files, and images in the file: as `model_picture` makes them, which inference uses too."""
    row = next(row for row in demo_rows(tmp_path / "images", rows=30, seed=0) if len(set(row["images"])) > 1)
    turned, *clear = sorted(set(row["images"]))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((300, 200), 60).convert("RGB").save(tmp_path / turned, exif=exif)
    for name in clear:
        Image.new("LA", (200, 200), (0, 0)).save(tmp_path / name)
    (tmp_path / "one.json").write_text(json.dumps([row]))
    expected = [model_picture(tmp_path / name, max_pixels=602_112) for name in row["images"]]
    assert {picture.size for picture in expected} == {(196, 308), (196, 196)}
    for embed in (False, True):
        prepare(tmp_path / "one.json", images_root=tmp_path, output=tmp_path, split="one", embed_images=embed)
        rl = rl_dataset(tmp_path / "one.rl.parquet", tokenizer, processor)
        seen, _, _ = rl._process_multi_modal_info(rl[0]["raw_prompt"], 14, None)
        assert [picture.tobytes() for picture in seen] == [picture.tobytes() for picture in expected]
        seen, _ = asyncio.run(rl.process_vision_info(rl[0]["raw_prompt"], 14, None))
        assert [picture.tobytes() for picture in seen] == [picture.tobytes() for picture in expected]
        sft = sft_dataset(tmp_path / "one.sft.parquet", tokenizer, processor)
        trained = sft[0]["multi_modal_inputs"]["pixel_values"]
        assert torch.equal(trained, processor.image_processor(images=expected, return_tensors="pt")["pixel_values"])


def test_an_image_that_the_processor_would_refuse_is_refused_at_construction(
    tmp_path: Path, tokenizer: Any, processor: Any
) -> None:
    """verl drops its row from GRPO without a word, and SFT ends in the middle."""
    row = next(row for row in demo_rows(tmp_path / "images", rows=30, seed=0) if row["images"])
    (tmp_path / "one.json").write_text(json.dumps([row]))
    prepare(tmp_path / "one.json", images_root=tmp_path, output=tmp_path, split="one")
    Image.new("RGB", (40, 7_600)).save(tmp_path / row["images"][0])
    for make, name in ((rl_dataset, "one.rl.parquet"), (sft_dataset, "one.sft.parquet")):
        with pytest.raises(FFRError, match=r"is 40 x 7600, for the model 28 x 7588: one side more than 200 times"):
            make(tmp_path / name, tokenizer, processor)


def test_further_columns_are_in_each_row(parquet: Path, tmp_path: Path, tokenizer: Any, processor: Any) -> None:
    table = pq.read_table(parquet / "train.rl.parquet")
    levels = ["easy", "hard"] * (len(table) // 2)
    pq.write_table(table.append_column("difficulty", [levels]), tmp_path / "levels.rl.parquet")
    dataset = rl_dataset(tmp_path / "levels.rl.parquet", tokenizer, processor)
    assert [dataset[index]["difficulty"] for index in range(4)] == levels[:4]


def test_prompt_tokens_are_those_of_the_processor(
    base_model: Path, tmp_path: Path, tokenizer: Any, processor: Any
) -> None:
    rows = list(demo_rows(tmp_path / "images", rows=6, seed=1, image_share=0.5))
    for number, name in enumerate(sorted({name for row in rows for name in row["images"]})):
        size = ((40, 40), (640, 480), (1400, 1000), (30, 2000))[number % 4]
        Image.effect_noise(size, 40).convert("RGB").save(tmp_path / name)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options: dict[str, Any] = {"images_root": tmp_path, "output": tmp_path, "split": "t", "max_images": 64}
    summary = prepare(tmp_path / "rows.json", tokenizer=str(base_model), **options)
    dataset = rl_dataset(tmp_path / "t.rl.parquet", tokenizer, processor)
    lengths = []
    for index in range(6):
        messages = dataset[index]["raw_prompt"]
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = [fetch_image(image) for image in images_of(messages)]
        lengths.append(processor(text=[text], images=images or None, return_tensors="pt")["input_ids"].shape[1])
    assert max(lengths) > 1000, "large images are in it"
    assert summary.statistics["prompt_tokens_mean"] == pytest.approx(sum(lengths) / 6, abs=1e-3)
    with pytest.raises(FFRError, match=rf"too_long \(1 row\)[\s\S]*{max(lengths):,} tokens, at most"):
        prepare(
            tmp_path / "rows.json",
            tokenizer=str(base_model / "tokenizer.json"),
            max_prompt_tokens=max(lengths) - 1,
            **options,
        )


def test_sizes_of_images_are_those_of_qwen_vl_utils() -> None:
    for width in (1, 27, 28, 29, 56, 333, 1000, 4032):
        for height in (1, 28, 41, 98, 640, 3024):
            for most in (3136, 50_176, 602_112):
                try:
                    expected = smart_resize(height, width, 28, max_pixels=most)
                except ValueError:
                    with pytest.raises(ValueError, match="one side more than 200 times"):
                        resized(width, height, max_pixels=most)
                    continue
                if 0 in expected:
                    with pytest.raises(ValueError, match="a side vanishes"):
                        resized(width, height, max_pixels=most)
                    continue
                if max(expected) > 200 * min(expected):  # the processor of transformers refuses the result
                    with pytest.raises(ValueError, match="one side more than 200 times"):
                        resized(width, height, max_pixels=most)
                    continue
                assert resized(width, height, max_pixels=most) == expected[::-1]
