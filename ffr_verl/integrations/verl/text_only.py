"""Qwen2-VL and Qwen2.5-VL under verl 0.9.1 and transformers 5: micro-batches in which no row has an image.

verl then runs the vision tower on a blank picture and adds its output times zero, so that every rank of FSDP takes
part; but it calls `.mean()` on the tower's output, which is an object since transformers 5, and the step ends with an
AttributeError. The recipes load this module through verl's own `model.external_lib`, so that only jobs which use them
get the replacement, and only where the fault exists: on any other verl or transformers 4 the module does nothing.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import transformers
import verl
from packaging.version import Version
from verl.models.transformers import qwen2_vl
from verl.utils.transformers_compat import unpack_visual_output

logger = logging.getLogger(__name__)


def is_needed() -> bool:
    """Whether the installed pair of verl and transformers has the fault."""
    return Version(verl.__version__) == Version("0.9.1") and Version(transformers.__version__).major >= 5


def install() -> bool:
    """Replace `verl.models.transformers.qwen2_vl._get_input_embeds` where that is needed; returns whether it was.

    Calls with pixels go to verl's own function unchanged.
    """
    if not is_needed():
        return False
    original: Any = qwen2_vl._get_input_embeds
    if getattr(original, "_ffr_verl_text_only", False):
        return True

    @functools.wraps(original)
    def get_input_embeds(
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if pixel_values is not None or pixel_values_videos is not None:
            return original(
                model, input_ids, attention_mask, pixel_values, pixel_values_videos, image_grid_thw, video_grid_thw
            )
        embeds = model.get_input_embeddings()(input_ids)
        vision = model.config.vision_config
        side = 2 * vision.spatial_merge_size
        channels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        blank = torch.zeros((side * side, channels), dtype=model.visual.dtype, device=embeds.device)
        grid = torch.tensor([[1, side, side]], dtype=torch.long, device=embeds.device)
        features, _ = unpack_visual_output(model.visual(blank, grid_thw=grid))
        embeds = embeds + 0.0 * features.mean().to(embeds.dtype)
        return embeds, None if attention_mask is None else attention_mask.to(embeds.device)

    get_input_embeds._ffr_verl_text_only = True  # type: ignore[attr-defined]
    qwen2_vl._get_input_embeds = get_input_embeds
    logger.info("micro-batches without images: verl %s's Qwen2-VL input embedding replaced", verl.__version__)
    return True


install()
