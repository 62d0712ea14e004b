"""The two parquet files of a split, written side by side and moved into place together."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ffr_verl.data.checks.checked_row import CheckedRow

__all__ = ["IMAGES_ROOT_KEY", "RejectedRows", "SplitWriter"]

IMAGES_ROOT_KEY = b"ffr_verl.images_root"
_FORMAT_VERSION = {b"ffr_verl.format_version": b"1"}
_ROW_GROUP = 768  # the footer takes some 50 kB of memory for each, and 1,024 took more for what waits
_ROW_GROUP_BYTES = 64 * 2**20

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_PATHS = pa.list_(pa.string())
_IDS = pa.list_(pa.int64())
_BYTES = pa.list_(pa.struct([("path", pa.string()), ("bytes", pa.binary())]))
_WINDOW = pa.struct(
    [
        ("of", pa.string()),
        ("number", pa.int64()),
        ("first_utterance", pa.int64()),
        ("first_image", pa.int64()),
        ("ids", pa.string()),
    ]
)
_EXTRA_INFO = pa.struct(
    [
        ("index", pa.int64()),
        ("split", pa.string()),
        ("dialogue_id", pa.string()),
        ("query", pa.string()),
        ("utterance_ids", _IDS),
        ("image_ids", _IDS),
        ("image_utterances", _IDS),
        ("images", _PATHS),
        ("window", _WINDOW),
    ]
)


def _rl_schema(images: pa.DataType) -> pa.Schema:
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", _MESSAGES),
            ("images", images),
            ("ability", pa.string()),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            ("extra_info", _EXTRA_INFO),
        ]
    )


def _sft_schema(images: pa.DataType) -> pa.Schema:
    return pa.schema([("messages", _MESSAGES), ("images", images), ("dialogue_id", pa.string())])


class RejectedRows:
    """A JSONL file of refused rows with the reasons; made with the first of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a record."""
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8")
        json.dump(record, self._file, ensure_ascii=True)
        self._file.write("\n")

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            self._file.close()


class _Waiting(NamedTuple):
    """What is written of a row; its utterances, which are many small objects, are let go."""

    messages: list[dict[str, str]]
    images: list[str]
    pictures: list[bytes]
    dialogue_id: str
    query: str
    solution: str
    utterance_ids: list[int]
    image_ids: tuple[int, ...]
    image_utterances: tuple[int, ...]
    window: dict[str, Any] | None


def _constant(value: str, count: int) -> pa.Array:
    return pa.array([value] * count, type=pa.string())


def _lists(items: pa.Array, like: Sequence[Sequence[Any]]) -> pa.Array:
    """A list column of `items`, cut into the lengths of `like`."""
    offsets = [0, *itertools.accumulate(map(len, like))]
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), items)


def _numbers(rows: Sequence[Sequence[int]]) -> pa.Array:
    return _lists(pa.array(list(itertools.chain.from_iterable(rows)), type=pa.int64()), rows)


def _texts(rows: Sequence[Sequence[str]]) -> pa.Array:
    return _lists(pa.array(list(itertools.chain.from_iterable(rows)), type=pa.string()), rows)


def _messages(rows: Sequence[Sequence[Mapping[str, str]]]) -> pa.Array:
    columns = [
        pa.array([message[name] for row in rows for message in row], type=pa.string()) for name in ("role", "content")
    ]
    return _lists(pa.StructArray.from_arrays(columns, ["role", "content"]), rows)


class SplitWriter:
    """Writes rows as `NAME.rl.parquet` and `NAME.sft.parquet`.

    Args:
        rl_path: where the RL file is written.
        sft_path: where the SFT file is written.
        split: name of the split.
        data_source: verl's field of that name.
        images_root: recorded in the files.
        image_bytes: reads an image by its path in the row, to be stored in the files; `None` stores paths.
    """

    def __init__(
        self,
        rl_path: Path,
        sft_path: Path,
        *,
        split: str,
        data_source: str,
        images_root: Path,
        image_bytes: Callable[[str], bytes] | None = None,
    ) -> None:
        self._split, self._data_source, self._image_bytes = split, data_source, image_bytes
        metadata = {IMAGES_ROOT_KEY: str(images_root).encode(), **_FORMAT_VERSION}
        images = _PATHS if image_bytes is None else _BYTES
        rl_schema, sft_schema = (
            schema.with_metadata(metadata) for schema in (_rl_schema(images), _sft_schema(images))
        )
        # Nothing looks at statistics of columns, which hold whole prompts.
        self._rl = pq.ParquetWriter(rl_path, rl_schema, compression="zstd", write_statistics=False)
        self._sft = pq.ParquetWriter(sft_path, sft_schema, compression="zstd", write_statistics=False)
        self._waiting: list[_Waiting] = []
        self._bytes = 0
        self.rows = 0

    def add(self, row: CheckedRow) -> None:
        """Write a row; its position in the file is its index."""
        dialogue = row.dialogue
        pictures = [] if self._image_bytes is None else [self._image_bytes(name) for name in row.images]
        self._waiting.append(
            _Waiting(
                row.messages,
                row.images,
                pictures,
                dialogue.dialogue_id,
                dialogue.query,
                row.solution,
                [utterance.id for utterance in dialogue.utterances],
                dialogue.image_ids,
                dialogue.image_utterances,
                None if row.window is None else row.window.to_dict(),
            )
        )
        self.rows += 1
        self._bytes += sum(map(len, pictures))
        if len(self._waiting) == _ROW_GROUP or self._bytes > _ROW_GROUP_BYTES:
            self.finish()

    def finish(self) -> None:
        """Write what waits."""
        if self._waiting:
            images = self._images()
            self._rl.write_table(self._rl_table(images))
            self._sft.write_table(self._sft_table(images))
        self._waiting.clear()
        self._bytes = 0

    def _images(self) -> pa.Array:
        rows = self._waiting
        if self._image_bytes is None:
            return _texts([row.images for row in rows])
        names = pa.array([name for row in rows for name in row.images], type=pa.string())
        pictures = pa.array([picture for row in rows for picture in row.pictures], type=pa.binary())
        return _lists(pa.StructArray.from_arrays([names, pictures], ["path", "bytes"]), [row.images for row in rows])

    def _rl_table(self, images: pa.Array) -> pa.Table:
        rows, count = self._waiting, len(self._waiting)
        info = {
            "index": pa.array(range(self.rows - count, self.rows), type=pa.int64()),
            "split": _constant(self._split, count),
            "dialogue_id": pa.array([row.dialogue_id for row in rows], type=pa.string()),
            "query": pa.array([row.query for row in rows], type=pa.string()),
            "utterance_ids": _numbers([row.utterance_ids for row in rows]),
            "image_ids": _numbers([row.image_ids for row in rows]),
            "image_utterances": _numbers([row.image_utterances for row in rows]),
            "images": images if self._image_bytes is None else _texts([row.images for row in rows]),
            "window": pa.array([row.window for row in rows], type=_WINDOW),
        }
        solutions = pa.array([row.solution for row in rows], type=pa.string())
        columns = [
            _constant(self._data_source, count),
            _messages([row.messages[:-1] for row in rows]),
            images,
            _constant("ffr", count),
            pa.StructArray.from_arrays([_constant("rule", count), solutions], ["style", "ground_truth"]),
            pa.StructArray.from_arrays(list(info.values()), list(info)),
        ]
        return pa.Table.from_arrays(columns, schema=self._rl.schema)

    def _sft_table(self, images: pa.Array) -> pa.Table:
        rows = self._waiting
        identifiers = pa.array([row.dialogue_id for row in rows], type=pa.string())
        columns = [_messages([row.messages for row in rows]), images, identifiers]
        return pa.Table.from_arrays(columns, schema=self._sft.schema)

    def close(self) -> None:
        """Close both files."""
        self._rl.close()
        self._sft.close()
