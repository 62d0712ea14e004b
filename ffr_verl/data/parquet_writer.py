"""The two parquet files of a split, written side by side."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ffr_verl.data.checks.checked_row import CheckedRow
from ffr_verl.data.parquet_files import IMAGES_ROOT_KEY, MODEL_FAMILY_KEY, PAIR_KEY, family_record, seal_parquet
from ffr_verl.dialogues import extra_info
from ffr_verl.model_families import ModelFamily

_FORMAT_VERSION = {b"ffr_verl.format_version": b"1"}
_ROW_GROUP = 768  # the footer takes some 50 kB of memory for each, and 1,024 took more for what waits
_ROW_GROUP_BYTES = 64 * 2**20

_TEXT, _IDS, _PATHS = pa.string(), pa.list_(pa.int64()), pa.list_(pa.string())
_MESSAGES = pa.list_(pa.struct({"role": _TEXT, "content": _TEXT}))
_PICTURES = pa.list_(pa.struct({"path": _TEXT, "bytes": pa.binary()}))
_WINDOW = {"of": _TEXT, "number": pa.int64(), "first_utterance": pa.int64(), "first_image": pa.int64(), "ids": _TEXT}
_EXTRA_INFO = {
    "index": pa.int64(),
    "split": _TEXT,
    "dialogue_id": _TEXT,
    "query": _TEXT,
    "utterance_ids": _IDS,
    "image_ids": _IDS,
    "image_utterances": _IDS,
    "images": _PATHS,
    "window": pa.struct(_WINDOW),
}


def _schemas(images: pa.DataType, images_root: Path, family: ModelFamily) -> tuple[pa.Schema, pa.Schema]:
    """Of the RL and of the SFT file."""
    rl = {"data_source": _TEXT, "prompt": _MESSAGES, "images": images, "ability": _TEXT}
    rl |= {"reward_model": pa.struct({"style": _TEXT, "ground_truth": _TEXT}), "extra_info": pa.struct(_EXTRA_INFO)}
    sft = {"messages": _MESSAGES, "images": images, "dialogue_id": _TEXT}
    recorded = {IMAGES_ROOT_KEY: os.fsencode(images_root), MODEL_FAMILY_KEY: family_record(family)}
    metadata = {**recorded, **_FORMAT_VERSION}
    return pa.schema(rl, metadata), pa.schema(sft, metadata)


def rl_row(row: CheckedRow, *, index: int, split: str, images: Sequence[Any]) -> dict[str, Any]:
    """A row as an RL file has it; `images` are paths, or objects of path and bytes."""
    window = None if row.window is None else row.window.to_dict()
    return {
        "data_source": "ffr/mldr",
        "prompt": row.prompt,
        "images": images,
        "ability": "ffr",
        "reward_model": {"style": "rule", "ground_truth": row.solution},
        "extra_info": {"index": index, **extra_info(row.dialogue, row.images, split=split), "window": window},
    }


class SplitWriter:
    """Writes rows as `NAME.rl.parquet` and `NAME.sft.parquet`.

    `images_root` and `family` are recorded in the files; `image_bytes` reads an image by its path in the row, to be
    stored in them (`None` stores paths).
    """

    def __init__(
        self,
        rl_path: Path,
        sft_path: Path,
        split: str,
        images_root: Path,
        family: ModelFamily,
        image_bytes: Callable[[str], bytes] | None = None,
    ) -> None:
        self._split, self._image_bytes = split, image_bytes
        schemas = _schemas(_PATHS if image_bytes is None else _PICTURES, images_root, family)
        self._paths = (rl_path, sft_path)
        self._files = [path.open("wb") for path in self._paths]  # Arrow opens no name that is no UTF-8
        # Nothing looks at statistics of columns, which hold whole prompts.
        self._writers = [
            pq.ParquetWriter(file, schema, compression="zstd", write_statistics=False, write_page_checksum=True)
            for file, schema in zip(self._files, schemas, strict=True)
        ]
        self._waiting: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._bytes = 0
        self._checksum = 0
        self.rows = 0

    def add(self, row: CheckedRow) -> None:
        """Write a row; its position in the file is its index."""
        images: list[Any] = row.images
        if self._image_bytes is not None:
            images = [{"path": name, "bytes": self._image_bytes(name)} for name in row.images]
            self._bytes += sum([len(image["bytes"]) for image in images])
        rl = rl_row(row, index=self.rows, split=self._split, images=images)
        name = row.dialogue.dialogue_id
        said = "\0".join([name, *[message["content"] for message in row.messages]])
        self._checksum = zlib.crc32(said.encode(), self._checksum)
        self._waiting.append((rl, {"messages": row.messages, "images": images, "dialogue_id": name}))
        self.rows += 1
        self._bytes += sum([len(message["content"]) for message in row.messages])
        if len(self._waiting) == _ROW_GROUP or self._bytes > _ROW_GROUP_BYTES:
            self.finish()

    def finish(self) -> None:
        """Write what waits."""
        if self._waiting:
            for writer, rows in zip(self._writers, zip(*self._waiting, strict=True), strict=True):
                writer.write_table(pa.Table.from_pylist(rows, schema=writer.schema))
        self._waiting.clear()
        self._bytes = 0

    def close(self) -> None:
        """Close both files."""
        for writer, file, path in zip(self._writers, self._files, self._paths, strict=True):
            writer.add_key_value_metadata({PAIR_KEY: f"{self.rows} {self._checksum}".encode()})
            writer.close()
            file.close()
            seal_parquet(path)
