"""The keys of verl's `data.ffr` node, which are ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ffr_verl.errors import FFRError
from ffr_verl.samplers.curriculum_config import CurriculumConfig
from ffr_verl.settings import refuse_unknown_keys

__all__ = ["DEFAULT_MAX_PIXELS", "DataConfig"]

DEFAULT_MAX_PIXELS = 602_112
_WHERE = "data.ffr"


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Settings of `FFRDataset` and `FFRSFTDataset`."""

    images_root: str | None = None  # that image paths are relative to; `None`: the one recorded in the file
    max_pixels: int = DEFAULT_MAX_PIXELS  # images with more are shrunk to at most so many; published
    min_pixels: int | None = None  # images with fewer are enlarged to so many; `None`: the model's own bound
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)  # order of the training rows (RL only)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DataConfig:
        """Check the node of a recipe.

        Raises:
            FFRError: for an unknown key or a value out of range; the message names the key.

        Example:
            >>> DataConfig.from_mapping({"max_pixels": 3136}).max_pixels
            3136
        """
        refuse_unknown_keys(values, allowed=[field.name for field in fields(cls)], where=_WHERE)
        curriculum = CurriculumConfig.from_mapping(values.get("curriculum") or {})
        config = cls(**{**values, "curriculum": curriculum})
        for name in ("max_pixels", "min_pixels"):
            value = getattr(config, name)
            if value is None and name == "min_pixels":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FFRError(f"{_WHERE}.{name}: found {value!r}, expected a whole number of pixels above 0")
        if config.min_pixels is not None and config.min_pixels > config.max_pixels:
            raise FFRError(
                f"{_WHERE}.min_pixels: found {config.min_pixels}, more than max_pixels ({config.max_pixels})"
            )
        if config.images_root is not None and not isinstance(config.images_root, str):
            raise FFRError(f"{_WHERE}.images_root: found {config.images_root!r}, expected the path of a folder")
        return config
