"""What differs between the model families that can be trained: one entry each in `FAMILIES`.

An entry says how an image becomes tokens, how the chat template writes it, which pieces the template acts on, and what
the vision tower is called. All else in this package asks here; another family is one more entry.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ffr_verl.errors import FFRError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """A family of vision-language models.

    Attributes:
        name: `model_type` in the `config.json` of its models.
        patch_size: side of a patch of the vision tower, in pixels.
        merge_size: patches along a side that become one token.
        min_pixels: least pixels of an image; its processor enlarges smaller ones.
        max_pixels: most pixels of an image; its processor shrinks larger ones.
        max_ratio: most that one side of an image may be of the other; its processor refuses others.
        default_system: system message that its chat template adds to a prompt without one.
        answer_start: what its chat template writes before an answer without a thought.
        image_start: token of its chat template before an image.
        image_pad: token that is repeated for each token of the image.
        image_end: token after an image.
        control_tokens: further pieces that its chat template acts on, wherever they stand.
        vision_tower: name of the submodule.
        cpu_dtype: in which vLLM's CPU build runs it.
    """

    name: str
    patch_size: int = 14
    merge_size: int = 2
    min_pixels: int = 3_136
    max_pixels: int = 12_845_056
    max_ratio: int = 200
    default_system: str | None = "You are a helpful assistant."
    answer_start: str = ""
    image_start: str = "<|vision_start|>"
    image_pad: str = "<|image_pad|>"
    image_end: str = "<|vision_end|>"
    control_tokens: tuple[str, ...] = (
        *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_pad|>", "<|video_pad|>"),
        *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
        *("<|quad_start|>", "<|quad_end|>"),
    )
    vision_tower: str = "visual"
    cpu_dtype: str = "float32"

    @property
    def factor(self) -> int:
        """Side of a token in pixels: the sides of an image are multiples of it."""
        return self.patch_size * self.merge_size

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Arguments of its chat template for answers without a thought; transformers warns where one is not needed."""
        return {"enable_thinking": False} if self.answer_start else {}

    @property
    def image_text(self) -> str:
        """What the chat template writes for an image, before its pad is repeated."""
        return f"{self.image_start}{self.image_pad}{self.image_end}"


QWEN2_VL = ModelFamily("qwen2_vl")
_QWEN3_VL = ModelFamily("qwen3_vl", patch_size=16, min_pixels=65_536, max_pixels=16_777_216, default_system=None)
_QWEN3_5 = replace(
    _QWEN3_VL,
    name="qwen3_5",
    answer_start="<think>\n\n</think>\n\n",
    cpu_dtype="bfloat16",  # vLLM 0.24 has its linear attention in no other there
)
FAMILIES: Mapping[str, ModelFamily] = {
    family.name: family
    for family in (
        QWEN2_VL,
        replace(QWEN2_VL, name="qwen2_5_vl"),
        _QWEN3_VL,
        replace(_QWEN3_VL, name="qwen3_vl_moe"),
        _QWEN3_5,
        replace(_QWEN3_5, name="qwen3_5_moe"),
    )
}
UNKNOWN = "unknown"  # name of the family of a model whose configuration cannot be read
# Data may be used with any family, so no text may hold a piece that one of them acts on.
CONTROL_TOKENS = frozenset(
    token
    for family in FAMILIES.values()
    for token in (*family.control_tokens, family.image_start, family.image_pad, family.image_end)
)
VISION_TOWERS = frozenset(family.vision_tower for family in FAMILIES.values())


def is_in_vision_tower(parameter: str) -> bool:
    """Whether a parameter of this name is one of a vision tower.

    Example:
        >>> is_in_vision_tower("model.visual.blocks.0.norm1.weight"), is_in_vision_tower("lm_head.weight")
        (True, False)
    """
    return not VISION_TOWERS.isdisjoint(parameter.split("."))


def family_named(name: str) -> ModelFamily:
    """The family of a `--model-family`.

    Raises:
        FFRError: when there is none of this name.

    Example:
        >>> family_named("qwen3_vl").factor
        32
    """
    if name not in FAMILIES:
        raise FFRError(f"--model-family: found {name!r}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of_model(model: str | Path | None, *, name: str | None = None) -> ModelFamily:
    """The family of a model: the one of this name, else the one that its `config.json` tells, else Qwen2-VL's.

    Its own configuration and processor settings count where they differ from the family's usual ones. A model of an
    unknown family is taken for Qwen2-VL in all that its files do not tell, and a warning says so.

    Args:
        model: its folder, a file in it, or its name on the hub, from which its configuration is fetched.
        name: of a family.

    Raises:
        FFRError: when there is no family of this name.
    """
    named = None if name is None else family_named(name)
    if model is None:
        return named or QWEN2_VL
    folder = _configuration_of(model)
    config = read_json(folder / "config.json")
    found = str(config.get("model_type", UNKNOWN))
    if named is None and found not in FAMILIES:
        is_told = "model_type" in config
        told = f"its model_type ({found}) is none of" if is_told else "no config.json there says that it is one of"
        _warn_of_unknown(str(model), told)
    images = read_json(folder / "preprocessor_config.json") or read_json(folder / "processor_config.json").get(
        "image_processor"
    )
    family = named or FAMILIES.get(found) or replace(QWEN2_VL, name=found)
    return _as_configured(family, _mapping(images), _mapping(config.get("vision_config")))


def looks_local(model: str) -> bool:
    """Whether a model's name must be a folder: on the hub models are named OWNER/NAME.

    Example:
        >>> [looks_local(name) for name in ("models/sft/step", "sft", "~/sft", "Qwen/Qwen2-VL-7B-Instruct")]
        [True, True, True, False]
    """
    owner, _, name = model.partition("/")
    return model.startswith((".", "/", "~")) or not name or "/" in name or Path(owner).is_dir()


def is_absent(model: str) -> bool:
    """Whether a model's name is that of a folder which is not there; one without a slash may be one of the hub's first
    models."""
    return "/" in model and looks_local(model) and not Path(model).expanduser().is_dir()


def _configuration_of(model: str | Path) -> Path:
    """The folder with the `config.json` of a model."""
    path = Path(model).expanduser()
    if path.exists() or looks_local(str(model)):
        return path.parent if path.is_file() else path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(model), allow_patterns=["config.json", "*processor_config.json"]))
    except Exception:  # noqa: BLE001  # the package raises many kinds; what is missing is told with the family
        return path


def family_of_processor(processor: Any) -> ModelFamily:
    """How a loaded processor of transformers makes tokens of images; its other facts are Qwen2-VL's."""
    images = getattr(processor, "image_processor", None)
    return _as_configured(QWEN2_VL, {} if images is None else images.to_dict(), {})


def _as_configured(family: ModelFamily, images: Mapping[str, Any], vision: Mapping[str, Any]) -> ModelFamily:
    """The family as a model's image processor and vision tower are configured."""
    size = _mapping(images.get("size"))
    told = {
        "patch_size": images.get("patch_size") or vision.get("patch_size"),
        "merge_size": images.get("merge_size") or vision.get("spatial_merge_size"),
        "min_pixels": images.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": images.get("max_pixels") or size.get("longest_edge"),
    }
    known: dict[str, Any] = {name: value for name, value in told.items() if isinstance(value, int) and value > 0}
    return replace(family, **known)


def _mapping(value: Any) -> Mapping[str, Any]:
    """Empty for what other families have in its place, such as a number for a size."""
    return value if isinstance(value, Mapping) else {}


@functools.cache  # once for each model
def _warn_of_unknown(model: str, found: str) -> None:
    logger.warning(
        "%s: %s %s. Sizes of images, numbers of prompt tokens and the pieces that no text may hold are taken to be "
        "those of Qwen2-VL where its files tell nothing else, and may be wrong; name the family that it is like with "
        "--model-family, or add an entry to ffr_verl/model_families.py",
        model,
        found,
        ", ".join(FAMILIES),
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of a model's folder; empty where there is none: transformers tells what is wrong."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def folder_revision(folder: Path) -> str:
    """Tells versions of a local model apart: names and sizes of its files, and the content of the small ones."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)}:{size}:".encode())
        if size < 2**20:
            digest.update(file.read_bytes())
    return f"folder-{digest.hexdigest()[:16]}"


def has_chat_template(folder: Path) -> bool:
    """Whether transformers finds a chat template there: in a file of its own, or in the tokenizer's or processor's."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    if any(
        read_json(folder / name).get("chat_template") for name in ("tokenizer_config.json", "processor_config.json")
    ):
        return True
    return any((folder / "additional_chat_templates").glob("*.jinja"))
