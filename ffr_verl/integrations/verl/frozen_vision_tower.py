"""The vision tower keeps its weights in both stages, as published, with full fine-tuning too.

verl 0.9.1 has a key `freeze_vision_tower` that its FSDP engine never reads. With LoRA `model.exclude_modules` is
enough; for full fine-tuning this module registers verl's FSDP engine once more, for this device's vendor, with the
tower's gradients turned off right after the model is built. verl looks up an engine of the vendor before the general
one, so nothing of verl is replaced.

The recipes give `external_lib: ffr_verl.integrations.verl.frozen_vision_tower`, which loads `text_only` beside it too;
the latter alone leaves the tower to be trained.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from verl.utils.device import get_device_name, get_vendor
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from ffr_verl.integrations.verl import text_only
from ffr_verl.model_families import is_in_vision_tower

__all__ = ["FrozenVisionTowerEngine", "freeze_vision_tower", "text_only"]

logger = logging.getLogger(__name__)


def freeze_vision_tower(module: Any) -> int:
    """Turn gradients of a model's vision tower off.

    Args:
        module: a transformers model; its tower is the submodule of that name in `model_families`, wherever it is.

    Returns:
        The number of parameters (tensors) frozen; 0 for a model without a tower.
    """
    frozen = 0
    for name, parameter in module.named_parameters():
        if is_in_vision_tower(name):
            parameter.requires_grad_(False)
            frozen += 1
    return frozen


class FrozenVisionTowerEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine for language models whose vision tower is not trained."""

    def _build_module(self) -> Any:
        module = super()._build_module()
        frozen = freeze_vision_tower(module)
        flat = self.engine_config.strategy == "fsdp" and not self.engine_config.use_orig_params
        if frozen and flat and not self.model_config.lora_rank:
            raise ValueError(
                "full fine-tuning with a frozen vision tower: FSDP1 puts frozen and trained parameters into one flat "
                "parameter; give strategy=fsdp2, or use_orig_params=true, in the engine's config"
            )
        logger.info("vision tower: %d parameters frozen", frozen)
        return module


def install() -> None:
    """Register the engine for this device and vendor."""
    device = os.environ.get("VERL_ENGINE_DEVICE") or get_device_name()
    register = EngineRegistry.register(
        model_type="language_model", backend=["fsdp", "fsdp2"], device=device, vendor=get_vendor()
    )
    register(FrozenVisionTowerEngine)


install()
