"""verl's datasets, with image paths below a root, the pixel bound, and a check before training starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.dataset.rl_dataset import RLHFDataset

from ffr_verl.data.config import DataConfig
from ffr_verl.data.parquet_files import Kind, as_list, check_columns, check_images, images_root
from ffr_verl.images import image_source, model_picture
from ffr_verl.integrations.verl.training_rows import NEED_DIFFICULTY, TrainingRows
from ffr_verl.model_families import QWEN2_VL, family_of_processor
from ffr_verl.rewards.ffr import MICRO_COUNTS
from ffr_verl.samplers.micro_estimate import MicroEstimate
from ffr_verl.samplers.sampler import CurriculumSampler, activate

__all__ = ["FFRDataset", "FFRSFTDataset"]

logger = logging.getLogger(__name__)


class _Images:
    """A dataset's images: below a root, and bounded in pixels for the model of its processor.

    Raises:
        FFRError: for files of another kind, or images that cannot be used, in a sample of rows; the preflight check of
            the recipes opens every image.
    """

    def __init__(self, files: Sequence[str], kind: Kind, config: DataConfig, processor: Any) -> None:
        family = family_of_processor(processor)
        least = max(config.min_pixels or 0, family.min_pixels)
        most = max(min(config.max_pixels, family.max_pixels), least)
        self._family = replace(family, min_pixels=least, max_pixels=most)
        check_columns(files, kind)
        self.root = images_root(files, config)
        check_images(files, self.root, sample=True, max_pixels=self._family.max_pixels, family=self._family)

    def pictures(self, images: Any) -> list[Image.Image]:
        """The pictures of a row's images, as the model sees them."""
        return [self._picture(image_source(image, self.root)) for image in _listed(images)]

    def items(self, images: Any) -> list[dict[str, Any]]:
        """The same, but files are opened later, by `_with_pictures` in another process: for each its path."""
        bounds = {"max_pixels": self._family.max_pixels, "min_pixels": self._family.min_pixels}
        sources = [image_source(image, self.root) for image in _listed(images)]
        return [
            {"image": str(source) if isinstance(source, Path) else self._picture(source), **bounds}
            for source in sources
        ]

    def _picture(self, source: Path | bytes) -> Image.Image:
        return model_picture(source, max_pixels=self._family.max_pixels, family=self._family)


def _listed(images: Any) -> Any:
    return () if images is None else images


def _with_pictures(messages: list[dict[str, Any]], patch_size: int) -> list[dict[str, Any]]:
    """Messages with pictures for paths. qwen_vl_utils would open the files without regard to orientation, and to
    transparency but in RGBA."""

    def part_with_picture(part: Any) -> Any:
        if not isinstance(part, Mapping) or not isinstance(part.get("image"), str):
            return part
        bounds = {name: part[name] for name in ("max_pixels", "min_pixels")}
        family = replace(QWEN2_VL, patch_size=patch_size, **bounds)
        return {**part, "image": model_picture(Path(part["image"]), max_pixels=family.max_pixels, family=family)}

    return [
        {**message, "content": [part_with_picture(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


class FFRDataset(RLHFDataset):
    """verl's `RLHFDataset` for `NAME.rl.parquet` of `ffr-verl prepare`.

    Image paths are taken below `data.ffr.images_root` (by default the root recorded in the file) and images are
    bounded to `data.ffr.max_pixels`. Rows without images are fine, and so are files that hold their images
    (`ffr-verl prepare --embed-images`). Further columns of the file, such as a difficulty, are in each row.

    The training rows (`data.train_files`) come in the order of the curriculum, see `CurriculumConfig`; a `published`
    one leaves rows out, and those that need a difficulty file keep the order of the file without one. `data.shuffle`
    must be off. torchdata's `StatefulDataLoader` saves and restores the curriculum through `state_dict` and
    `load_state_dict`.

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
        self._images = _Images(files, "rl", self.ffr_config, processor)
        self.curriculum: CurriculumSampler | None = None
        super().__init__(data_files, tokenizer, config, processor=processor, max_samples=max_samples)
        rows = sum(pq.read_metadata(file).num_rows for file in self.data_files)
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
        if curriculum.order in NEED_DIFFICULTY and curriculum.difficulty is None:
            logger.warning(
                "data.ffr.curriculum.order: %s needs data.ffr.curriculum.difficulty, which is null: the rows come in "
                "the order of the file",
                curriculum.order,
            )
            curriculum = replace(curriculum, order="file")
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
        return {**row, "ffr_row": number}

    def state_dict(self) -> dict[str, Any]:
        """State of the curriculum; empty without one."""
        return {} if self.curriculum is None else self.curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where a `state_dict` was taken.

        Raises:
            FFRError: when it was taken with another curriculum.
        """
        if self.curriculum is not None:
            self.curriculum.load_state_dict(state)

    def _build_messages(self, example: dict[str, Any], key: str) -> list[dict[str, Any]]:
        items = self._images.items(example.get(self.image_key))
        return super()._build_messages({**example, self.image_key: items}, key)

    @classmethod
    def _process_multi_modal_info(cls, messages: list[dict[str, Any]], image_patch_size: int, config: Any) -> Any:
        return super()._process_multi_modal_info(_with_pictures(messages, image_patch_size), image_patch_size, config)

    @classmethod
    async def process_vision_info(cls, messages: list[dict[str, Any]], image_patch_size: int, config: Any) -> Any:
        images, videos, _ = await cls.process_multi_modal_info(messages, image_patch_size, config)
        return images, videos


class FFRSFTDataset(MultiTurnSFTDataset):
    """verl's `MultiTurnSFTDataset` for `NAME.sft.parquet` of `ffr-verl prepare`; the loss is on the assistant's
    answer only.

    Images as in `FFRDataset`.

    Raises:
        FFRError: at construction, as `FFRDataset`.
    """

    def __init__(
        self, parquet_files: Any, tokenizer: Any, config: Any, processor: Any = None, max_samples: int = -1
    ) -> None:
        files = as_list(parquet_files)
        self.ffr_config = DataConfig.from_mapping((config or {}).get("ffr") or {})
        self._images = _Images(files, "sft", self.ffr_config, processor)
        super().__init__(files, tokenizer, config, processor=processor, max_samples=max_samples)

    def _build_messages(self, example: Mapping[str, Any]) -> list[dict[str, Any]]:
        return super()._build_messages({**example, self.image_key: self._images.pictures(example.get(self.image_key))})

    def __getitem__(self, item: int) -> dict[str, Any]:
        row = super().__getitem__(item)
        # verl's collator reads every key of the first row, so a row without images must have this one too.
        row.setdefault("multi_modal_inputs", {})
        return row
