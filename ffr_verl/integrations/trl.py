"""`NAME.rl.parquet` of `ffr-verl prepare` as rows for TRL's GRPOTrainer. Needs neither TRL nor torch to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffr_verl.data.config import DataConfig
from ffr_verl.data.parquet_files import as_list, check_columns, check_images, images_root
from ffr_verl.dialogues import with_image_parts
from ffr_verl.errors import FFRError
from ffr_verl.images import resolve_image

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["trl_dataset"]

_COLUMNS = ("prompt", "images", "solution", "extra_info")


def trl_dataset(files: str | Path | Sequence[str | Path], *, images_root: str | Path | None = None) -> Dataset:
    """The rows of RL files with the columns that TRL's GRPOTrainer and `ffr_verl.rewards.batch` read.

    `prompt` are messages whose texts are cut at every image, `images` the pictures, decoded when a row is looked at,
    `solution` the gold answer, and `extra_info` what is known of the dialogue. The order is that of the files.

    Args:
        files: one or several `NAME.rl.parquet`.
        images_root: folder of the images; by default the one recorded in the files.

    Raises:
        FFRError: for a file that is missing or of another kind, images that cannot be read in a sample of rows, and
            without the package datasets, which TRL brings.

    Example:
        >>> trl_dataset("nothing.rl.parquet")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ffr_verl.errors.FFRError: nothing.rl.parquet: no such file; ...
    """
    paths = as_list(files)
    check_columns(paths, "rl")
    root = _root(paths, images_root)
    check_images(paths, root, sample=True)
    try:
        from datasets import Image, load_dataset
    except ImportError:
        raise FFRError("the package datasets is not installed: pip install datasets (TRL brings it)") from None

    def picture(image: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
        return str(resolve_image(root, image)) if isinstance(image, str) else image

    def as_trl_row(row: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "prompt": with_image_parts(row["prompt"]),
            "images": [picture(image) for image in row["images"] or ()],
            "solution": row["reward_model"]["ground_truth"],
        }

    rows = load_dataset("parquet", data_files=paths, split="train").map(as_trl_row)
    return rows.select_columns(list(_COLUMNS)).cast_column("images", [Image()])


def _root(paths: Sequence[str], given: str | Path | None) -> Path:
    return images_root(paths, DataConfig(images_root=None if given is None else str(given)))
