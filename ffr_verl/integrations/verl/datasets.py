"""verl's datasets, with image paths below a root, the pixel bound, and a check before training starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.dataset.rl_dataset import RLHFDataset

from ffr_verl.data.parquet_files import Kind, as_list, check_columns, check_images, count_rows, images_root
from ffr_verl.errors import FFRError
from ffr_verl.images import image_source, model_picture
from ffr_verl.integrations.verl import ROW_NUMBER
from ffr_verl.integrations.verl.training_rows import TrainingRows
from ffr_verl.model_families import QWEN2_VL, ModelFamily, family_of_processor
from ffr_verl.rewards.ffr import MICRO_COUNTS
from ffr_verl.samplers.micro_estimate import MicroEstimate
from ffr_verl.samplers.sampler import CurriculumSampler, activate, needs_difficulty
from ffr_verl.settings import DataConfig

__all__ = ["FFRDataset", "FFRSFTDataset"]

logger = logging.getLogger(__name__)


def _checked(files: Sequence[str], kind: Kind, config: DataConfig, processor: Any) -> tuple[Path, ModelFamily]:
    """The images root of good files, and the model's family, with its pixels bounded as configured.

    The preflight check of the recipes opens every image, here those of a sample of rows are decoded.
    """
    check_columns(files, kind)
    family = family_of_processor(processor)
    least = max(config.min_pixels or 0, family.min_pixels)
    most = max(min(config.max_pixels, family.max_pixels), least)
    family = replace(family, min_pixels=least, max_pixels=most)
    root = images_root(files, config)
    check_images(files, root, sample=True, max_pixels=most, family=family)
    return root, family


def _items(images: Any, root: Path, family: ModelFamily) -> list[dict[str, Any]]:
    """A row's images as qwen_vl_utils takes them: a path, or a picture out of the row, and the pixel bounds."""
    bounds = {"max_pixels": family.max_pixels, "min_pixels": family.min_pixels}
    sources = [image_source(image, root) for image in (() if images is None else images)]
    return [{"image": str(source) if isinstance(source, Path) else source, **bounds} for source in sources]


def _opened(part: Any, patch_size: int) -> Any:
    """A part of a message, with the picture where it names a file: qwen_vl_utils would not turn it upright, nor put
    it on white but in RGBA."""
    if not isinstance(part, Mapping) or not isinstance(part.get("image"), (str, bytes)):
        return part
    bounds = {name: part[name] for name in ("max_pixels", "min_pixels")}
    source = part["image"] if isinstance(part["image"], bytes) else Path(part["image"])
    family = replace(QWEN2_VL, patch_size=patch_size, **bounds)
    return {**part, "image": model_picture(source, max_pixels=family.max_pixels, family=family)}


class FFRDataset(RLHFDataset):
    """verl's `RLHFDataset` for `NAME.rl.parquet` of `ffr-verl prepare`.

    Images are found and bounded as `DataConfig` says. Rows without images are fine, and so are files that hold their
    images (`ffr-verl prepare --embed-images`). Further columns of the file, such as a difficulty, are in each row.

    The training rows (`data.train_files`) come in the order of the curriculum, see `CurriculumConfig`; a `published`
    one leaves rows out. `data.shuffle` must be off. torchdata's `StatefulDataLoader` saves and restores its state.

    Each training row has `ffr_row`, its number in the files after verl has dropped overlong prompts, and in
    `extra_info` `micro_counts`, where the policy stands, for the reward's `f1_mode: micro`.

    Raises:
        FFRError: at construction, for a missing file, another kind of file, a setting of `data.ffr` that does not
            exist, images that cannot be read in a sample of rows, or a difficulty file of other rows.
    """

    def __init__(
        self, data_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1
    ) -> None:
        files = as_list(data_files)
        self.ffr_config = DataConfig.from_mapping(config.get("ffr") or {})
        self._root, self._family = _checked(files, "rl", self.ffr_config, processor)
        self.curriculum: CurriculumSampler | None = None
        super().__init__(data_files, tokenizer, config, processor=processor, max_samples=max_samples)
        rows = sum(count_rows(file) for file in self.data_files)
        if rows and not len(self.dataframe):
            most = config.get("max_prompt_length")
            raise FFRError(
                f"{', '.join(files)}: no row is left: the prompts of all {rows:,} have more tokens than "
                f"data.max_prompt_length={most}, or cannot be made, which verl's output above tells; raise it, or cut "
                "the dialogues with `ffr-verl prepare --window`"
            )
        if max_samples < 0 and len(self.dataframe) < rows:
            logger.warning(
                "%s: verl leaves out %d of %d rows: their prompts are longer than data.max_prompt_length, or cannot "
                "be made, which its output above tells",
                ", ".join(files),
                rows - len(self.dataframe),
                rows,
            )
        if files == as_list(config.get("train_files") or ()):
            self._follow_curriculum(files)

    def _follow_curriculum(self, files: Sequence[str]) -> None:
        """Put the training rows into the curriculum's order; rows that verl has dropped as overlong are left out."""
        curriculum = self.ffr_config.curriculum
        if curriculum.difficulty is None and needs_difficulty(curriculum.order):
            logger.warning(
                "data.ffr.curriculum.order: %s needs data.ffr.curriculum.difficulty, which is null: the rows come in "
                "the order of the file",
                curriculum.order,
            )
            curriculum = msgspec.structs.replace(curriculum, order="file", settings={})
        rows = TrainingRows.of(self.dataframe, curriculum, files)
        self.curriculum = CurriculumSampler(rows.difficulty, curriculum, micro=MicroEstimate(*rows.micro_start))
        logger.info("curriculum %s: %d of %d rows", curriculum.order, len(self.curriculum), len(rows.difficulty))
        activate(self.curriculum)

    def __len__(self) -> int:
        return len(self.curriculum) if self.curriculum is not None else super().__len__()

    def __getitem__(self, item: int) -> dict[str, Any]:
        if self.curriculum is None:
            return super().__getitem__(item)
        number = self.curriculum.row_at(item)
        row = super().__getitem__(number)
        if self.curriculum.micro is not None:
            row["extra_info"] = {**row["extra_info"], MICRO_COUNTS: self.curriculum.micro.counts()}
        return {**row, ROW_NUMBER: number}

    def state_dict(self) -> dict[str, Any]:
        """State of the curriculum; empty without one."""
        return {} if self.curriculum is None else self.curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where a `state_dict` was taken; an `FFRError` when it was taken with another curriculum."""
        if self.curriculum is not None:
            self.curriculum.load_state_dict(state)

    def _build_messages(self, example: dict[str, Any], key: str) -> list[dict[str, Any]]:
        items = _items(example.get(self.image_key), self._root, self._family)
        if items and isinstance(items[0]["image"], bytes):
            items = [_opened(item, self._family.patch_size) for item in items]
        return super()._build_messages({**example, self.image_key: items}, key)

    @classmethod
    def _process_multi_modal_info(cls, messages: list[dict[str, Any]], image_patch_size: int, config: Any) -> Any:
        opened = [
            {**message, "content": [_opened(part, image_patch_size) for part in message["content"]]}
            for message in messages
            if isinstance(message["content"], list)
        ]
        return super()._process_multi_modal_info(opened, image_patch_size, config)

    @classmethod
    async def process_vision_info(cls, messages: list[dict[str, Any]], image_patch_size: int, config: Any) -> Any:
        images, videos, _ = await cls.process_multi_modal_info(messages, image_patch_size, config)
        return images, videos


class FFRSFTDataset(MultiTurnSFTDataset):
    """verl's `MultiTurnSFTDataset` for `NAME.sft.parquet` of `ffr-verl prepare`; the loss is on the assistant's
    answer only. Images and errors as with `FFRDataset`.
    """

    def __init__(
        self, parquet_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1
    ) -> None:
        files = as_list(parquet_files)
        self.ffr_config = DataConfig.from_mapping((config or {}).get("ffr") or {})
        self._root, self._family = _checked(files, "sft", self.ffr_config, processor)
        super().__init__(files, tokenizer, config, processor=processor, max_samples=max_samples)

    def _build_messages(self, example: Mapping[str, Any]) -> list[dict[str, Any]]:
        items = _items(example.get(self.image_key), self._root, self._family)
        pictures = [_opened(item, self._family.patch_size)["image"] for item in items]
        return super()._build_messages({**example, self.image_key: pictures})

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = super().__getitem__(item)
        # verl's collator reads every key of the first row, so a row without images must have this one too.
        row.setdefault("multi_modal_inputs", {})
        return row
