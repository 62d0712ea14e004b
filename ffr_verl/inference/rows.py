"""What is known of rows before a model is asked: how many, what tells them from others, whether they can be asked."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffr_verl.data.parquet_files import images_root, rows_of_files
from ffr_verl.data.windows import WindowSettings, cut_row
from ffr_verl.errors import FFRError
from ffr_verl.settings import DataConfig

IMAGES_ROOT_OPTION = "--images-root FOLDER"
_WITHOUT_IMAGES = ("prompt", "reward_model", "extra_info")


@dataclass(frozen=True, slots=True)
class AskedRows:
    """The rows of RL files that a model is asked for."""

    files: Sequence[Path]  # `NAME.rl.parquet` of `ffr-verl prepare`
    limit: int | None = None  # the first so many only
    window: WindowSettings | None = None  # cut long dialogues; rows are then those of the windows

    def whole(self, *, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows as they stand in the files."""
        return itertools.islice(rows_of_files(self.files, columns=columns), self.limit)

    def parts(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The windows of a row, or the row itself."""
        return [dict(row)] if self.window is None else cut_row(row, self.window)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.whole():
            yield from self.parts(row)

    def survey(self, *, max_images: int) -> tuple[int, str]:
        """How many rows there are, and a digest of them, before anything is loaded or asked; an `FFRError` for a row
        with more than `max_images` images, or no rows."""
        digest, count, names = hashlib.sha256(), 0, ", ".join(map(str, self.files))
        for row in itertools.chain.from_iterable(map(self.parts, self.whole(columns=_WITHOUT_IMAGES))):
            info = row["extra_info"]
            if len(info["images"]) > max_images:
                raise FFRError(
                    f"{names}: row {info['index']} ({info['dialogue_id']}): {len(info['images'])} images, at "
                    f"most {max_images}; raise --max-images, or cut long dialogues into windows"
                )
            named = (info["dialogue_id"], row["reward_model"]["ground_truth"], row["prompt"], info["images"])
            digest.update(json.dumps(named).encode())
            count += 1
        if not count:
            raise FFRError(f"{names}: no rows")
        return count, digest.hexdigest()


@dataclass(frozen=True, slots=True)
class GivenRows(AskedRows):
    """Rows that are at hand; `files` are where they come from, for messages."""

    rows: Sequence[Mapping[str, Any]] = ()  # as in an RL file

    def whole(self, *, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows."""
        return iter([dict(row) for row in self.rows])


def images_root_of(files: Sequence[Path], given: Path | None) -> Path:
    """The folder of the images: the given one, or the one recorded in the files."""
    config = DataConfig(images_root=None if given is None else str(given))
    return images_root([str(file) for file in files], config, option=IMAGES_ROOT_OPTION)
