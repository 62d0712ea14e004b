"""verl's datasets, with image paths below a root, the pixel bound, and a check before training starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.dataset.rl_dataset import RLHFDataset

from ffr_verl.data.config import DataConfig
from ffr_verl.data.images import check_image, resolve_image
from ffr_verl.data.prepare import IMAGES_ROOT_KEY
from ffr_verl.errors import FFRError

__all__ = ["FFRDataset", "FFRSFTDataset"]

_SAMPLED_ROWS = 16


def _image_items(names: Sequence[str] | None, root: Path, config: DataConfig) -> list[dict[str, Any]]:
    """Images as qwen_vl_utils takes them: a path and the pixel bounds."""
    bounds: dict[str, Any] = {"max_pixels": config.max_pixels}
    if config.min_pixels is not None:
        bounds["min_pixels"] = config.min_pixels
    return [{"image": str(resolve_image(root, name)), **bounds} for name in names or ()]


def _as_list(files: Any) -> list[str]:
    return [files] if isinstance(files, str) else [str(file) for file in files]


def _images_root(files: Sequence[str], config: DataConfig) -> Path:
    if config.images_root is not None:
        return Path(config.images_root).expanduser().resolve()
    roots = {(_schema(file).metadata or {}).get(IMAGES_ROOT_KEY, b"").decode() for file in files}
    if len(roots) != 1 or "" in roots:
        raise FFRError(
            f"{', '.join(files)}: {'no images root is recorded' if '' in roots else f'different images roots: {sorted(roots)}'}; "
            "give data.ffr.images_root=FOLDER, or make the files with `ffr-verl prepare`"
        )
    return Path(roots.pop())


def _schema(file: str) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except FileNotFoundError:
        raise FFRError(f"{file}: no such file; `ffr-verl prepare` writes NAME.rl.parquet and NAME.sft.parquet") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise FFRError(f"{file}: not a parquet file ({error}); make it again with `ffr-verl prepare`") from None


def _check_files(files: Sequence[str], *, columns: Sequence[str], other: str) -> None:
    for file in files:
        missing = [column for column in columns if column not in _schema(file).names]
        if missing:
            raise FFRError(f"{file}: no column {', '.join(missing)}; {other}")


def _check_sampled_images(files: Sequence[str], root: Path) -> None:
    """Open the images of the first, the last and some rows between, of each file.

    verl would drop rows with unreadable images without a word, or fail in the middle of training.
    """
    for file in files:
        images = pq.read_table(file, columns=["images"]).column("images")
        count = len(images)
        for row in sorted({round(step * (count - 1) / _SAMPLED_ROWS) for step in range(_SAMPLED_ROWS + 1)} if count else ()):
            for name in images[row].as_py() or ():
                try:
                    check_image(resolve_image(root, name))
                except ValueError as error:
                    raise FFRError(
                        f"{file}: row {row}: image {name}: {error} (images root {root}); "
                        "bring the images there, or give data.ffr.images_root=FOLDER"
                    ) from None


class FFRDataset(RLHFDataset):
    """verl's `RLHFDataset` for `NAME.rl.parquet` of `ffr-verl prepare`.

    Image paths are taken below `data.ffr.images_root` (by default the root recorded in the file) and images are bounded to
    `data.ffr.max_pixels`. Rows without images are fine.

    Raises:
        FFRError: at construction, for a missing file, another kind of file, a setting of `data.ffr` that does not exist, or
            images that cannot be read in a sample of rows.
    """

    def __init__(self, data_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1) -> None:
        files = _as_list(data_files)
        self.ffr_config = DataConfig.from_mapping(config.get("ffr") or {})
        other = "an RL file is needed here: NAME.rl.parquet, not NAME.sft.parquet"
        _check_files(files, columns=("prompt", "images", "reward_model", "extra_info"), other=other)
        self.images_root = _images_root(files, self.ffr_config)
        _check_sampled_images(files, self.images_root)
        super().__init__(data_files, tokenizer, config, processor=processor, max_samples=max_samples)

    def _build_messages(self, example: dict[str, Any], key: str) -> list[dict[str, Any]]:
        items = _image_items(example.get(self.image_key), self.images_root, self.ffr_config)
        return super()._build_messages({**example, self.image_key: items}, key)


class FFRSFTDataset(MultiTurnSFTDataset):
    """verl's `MultiTurnSFTDataset` for `NAME.sft.parquet` of `ffr-verl prepare`; the loss is on the assistant's answer only.

    Images as in `FFRDataset`.

    Raises:
        FFRError: at construction, as `FFRDataset`.
    """

    def __init__(self, parquet_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1) -> None:
        files = _as_list(parquet_files)
        self.ffr_config = DataConfig.from_mapping((config or {}).get("ffr") or {})
        other = "an SFT file is needed here: NAME.sft.parquet, not NAME.rl.parquet"
        _check_files(files, columns=("messages", "images"), other=other)
        self.images_root = _images_root(files, self.ffr_config)
        _check_sampled_images(files, self.images_root)
        super().__init__(files, tokenizer, config, processor=processor, max_samples=max_samples)

    def _build_messages(self, example: Mapping[str, Any]) -> list[dict[str, Any]]:
        names = example.get(self.image_key)
        items = _image_items(names if names is not None else (), self.images_root, self.ffr_config)
        return super()._build_messages({**example, self.image_key: items})

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = super().__getitem__(item)
        # verl's collator reads every key of the first row, so a row without images must have this one too.
        row.setdefault("multi_modal_inputs", {})
        return row
