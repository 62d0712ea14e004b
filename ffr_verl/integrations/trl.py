"""`NAME.rl.parquet` of `ffr-verl prepare` as rows for TRL's GRPOTrainer. Needs neither TRL nor torch to import."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffr_verl.data.parquet_files import as_list, check_columns, check_images, check_pages
from ffr_verl.data.parquet_files import images_root as root_of_images
from ffr_verl.dialogues import with_image_parts
from ffr_verl.errors import FFRError
from ffr_verl.images import image_source, packed_picture
from ffr_verl.settings import DataConfig

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["accept_mixed_rows", "trl_dataset"]

logger = logging.getLogger(__name__)

_COLUMNS = ("prompt", "images", "solution", "extra_info")


def trl_dataset(files: str | Path | Sequence[str | Path], *, images_root: str | Path | None = None) -> Dataset:
    """The rows of RL files with the columns that TRL's GRPOTrainer and `ffr_verl.rewards.batch` read.

    `prompt` are messages whose texts are cut at every image; `images` the pictures as verl's dataset gives them
    (upright, on white, shrunk to the published number of pixels), decoded when a row is looked at; `solution` the gold
    answer; `extra_info` what is known of the dialogue. The order is that of the files; `images_root` is by default the
    one recorded in them.

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
    check_pages(paths)
    config = DataConfig(images_root=None if images_root is None else str(images_root))
    root = root_of_images(paths, config, option="images_root=")
    check_images(paths, root, sample=True, max_pixels=config.max_pixels, option="images_root=")
    try:
        from datasets import Image, load_dataset
    except ImportError:
        raise FFRError("the package datasets is not installed: pip install datasets (TRL brings it)") from None

    def picture(image: str | Mapping[str, Any]) -> dict[str, Any]:
        source = image_source(image, root)
        _, packed = packed_picture(source, max_pixels=config.max_pixels)
        if packed is None and isinstance(source, Path):
            return {"path": str(source), "bytes": None}
        return {"path": None, "bytes": packed or source}

    def as_trl_row(row: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "prompt": with_image_parts(row["prompt"]),
            "images": [picture(image) for image in row["images"] or ()],
            "solution": row["reward_model"]["ground_truth"],
        }

    rows = load_dataset("parquet", data_files=paths, split="train").map(as_trl_row)
    without = sum(not info["images"] for info in rows["extra_info"])
    if 0 < without < len(rows):
        logger.warning(
            "%s: %d of %d rows have no images. TRL 1.16 fails on a batch with both kinds (TypeError: only a single "
            "or a list of entries is supported), unless the trainer went through "
            "ffr_verl.integrations.trl.accept_mixed_rows",
            ", ".join(paths),
            without,
            len(rows),
        )
    return rows.select_columns(list(_COLUMNS)).cast_column("images", [Image()])


def accept_mixed_rows(trainer: Any) -> Any:
    """Let a `GRPOTrainer` take batches in which some rows have images and some have none; gives it back.

    TRL 1.16 hands the processor a list of images for each row, `None` for a row without, which processors refuse, and
    the model an empty tensor where no row of a micro-batch has images, which the vision tower refuses. Here the
    processor gets the images of all rows as one list (the prompts say whose they are), and the model no empty tensor.
    """
    processor = trainer.processing_class
    kind = type(processor)

    def call(self: Any, images: Any = None, text: Any = None, **others: Any) -> Any:
        if isinstance(images, (list, tuple)) and all(one is None or isinstance(one, (list, tuple)) for one in images):
            images = [image for row in images for image in row or ()] or None
        return kind.__call__(self, images=images, text=text, **others)

    def without_empty(_model: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        pixels = given.get("pixel_values")
        if pixels is not None and not len(pixels):
            given = {name: one for name, one in given.items() if name not in ("pixel_values", "image_grid_thw")}
        return args, given

    processor.__class__ = type(kind.__name__, (kind,), {"__call__": call})  # saved under the name that it had
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            model.register_forward_pre_hook(without_empty, with_kwargs=True)
    return trainer
