"""The rows that TRL gets, against the files that they come from; TRL itself runs in tests/e2e/test_trl.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ffr_verl.data.demo import demo_rows
from ffr_verl.data.prepare import prepare
from ffr_verl.errors import FFRError
from ffr_verl.images import resized
from ffr_verl.integrations.trl import trl_dataset
from ffr_verl.rewards import batch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def text_of(message: dict[str, Any]) -> str:
    return "".join([part["text"] if part["type"] == "text" else "<image>" for part in message["content"]])


@pytest.mark.parametrize("embedded", [False, True])
def test_rows_are_those_of_the_files(demo_set: Path, tmp_path: Path, embedded: bool) -> None:
    """With pictures in a folder, and with pictures in the file."""
    written = prepare(
        demo_set / "heldout.json", images_root=demo_set, output=tmp_path, split="heldout", embed_images=embedded
    )
    rows, expected = trl_dataset(written.rl_path), pq.read_table(written.rl_path).to_pylist()
    assert set(rows.column_names) == {"prompt", "images", "solution", "extra_info"}
    assert len(rows) == len(expected) > 0
    pictures = 0
    for row, source in zip(rows, expected, strict=True):
        assert [(one["role"], text_of(one)) for one in row["prompt"]] == [
            (one["role"], one["content"]) for one in source["prompt"]
        ]
        assert row["solution"] == source["reward_model"]["ground_truth"]
        assert row["extra_info"] == source["extra_info"]
        parts = [part["type"] for message in row["prompt"] for part in message["content"]]
        assert parts.count("image") == len(row["images"]) == len(source["images"])
        for image, name in zip(row["images"], source["extra_info"]["images"], strict=True):
            with Image.open(demo_set / name) as original:
                assert np.array_equal(np.asarray(image), np.asarray(original))
            pictures += 1
    assert pictures
    columns = {name: list(rows[name]) for name in rows.column_names}
    assert batch.f1(columns["solution"], **columns) == [1.0] * len(rows)


@pytest.mark.parametrize("embedded", [False, True])
def test_pictures_are_those_that_other_trainers_see(
    tmp_path: Path, embedded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = list(demo_rows(tmp_path / "images", rows=30, seed=0, image_share=0.5))
    for name in {name for row in rows for name in row["images"]}:
        Image.new("LA", (2000, 1000), (0, 0)).save(tmp_path / name)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    written = prepare(
        tmp_path / "rows.json", images_root=tmp_path, output=tmp_path, split="t", embed_images=embedded, max_images=64
    )
    found = trl_dataset(written.rl_path)
    picture = next(row for row in found if row["images"])["images"][0]
    assert (picture.mode, picture.size) == ("RGB", resized(2000, 1000, max_pixels=602_112))
    assert np.asarray(picture).min() == 255, "what is transparent is white"
    without = sum(not row["images"] for row in rows)
    assert without
    assert f"{without} of 30 rows have no images" in caplog.text


def test_refusals(parquet: Path, tmp_path: Path) -> None:
    with pytest.raises(FFRError, match=r"this stage needs NAME\.rl\.parquet"):
        trl_dataset(parquet / "train.sft.parquet")
    with pytest.raises(FFRError, match="no such file"):
        trl_dataset([parquet / "train.rl.parquet", tmp_path / "none.rl.parquet"])
    with pytest.raises(FFRError, match="images root"):
        trl_dataset(parquet / "train.rl.parquet", images_root=tmp_path)
