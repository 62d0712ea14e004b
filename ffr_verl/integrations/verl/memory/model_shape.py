"""What a model's `config.json` says of its size: parameters by part, what training reaches, widths and depths.

The model is built by transformers on torch's `meta` device, LoRA by peft as verl does it, so the counts are those of
the classes that train, and nothing is loaded or allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffr_verl.errors import FFRError
from ffr_verl.model_families import ModelFamily, family_of_model, is_in_vision_tower

PARTS = ("vision tower", "language layers", "embeddings", "head", "other")


@dataclass(frozen=True, slots=True)
class Training:
    """What of a model is trained, and in which units FSDP gathers it.

    Attributes:
        lora_rank: 0 for full fine-tuning.
        target_modules: peft's; read with LoRA only.
        exclude_modules: peft's.
        freeze_tower: whether full fine-tuning leaves the vision tower as it is.
        strategy: `fsdp` or `fsdp2`.
    """

    lora_rank: int = 0
    target_modules: Any = "all-linear"
    exclude_modules: Any = None
    freeze_tower: bool = False
    strategy: str = "fsdp2"


@dataclass(frozen=True, slots=True)
class TowerShape:
    """A vision tower: its blocks, their width and the widest values inside one, values of a patch of pixels."""

    depth: int
    width: int
    inner: int
    patch_values: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's size; all counts are parameters (numbers, not bytes).

    Attributes:
        family: how images become tokens.
        parameters: by part, of `PARTS`.
        lora: parameters of the adapter; 0 without.
        trained: parameters that get gradients.
        trains_tower: whether some of them are in the vision tower.
        root: parameters that FSDP keeps gathered from the first layer to the last: those outside its units.
        units: its two largest units, such as a decoder layer or the head.
        trained_unit: trained parameters of the unit that has the most of them.
        largest: parameters of the largest tensor.
        layers: decoder layers.
        attention_layers: those of them that keep keys and values of every token.
        hidden: width of the language model.
        intermediate: width inside its MLP; of a mixture of experts, of those that a token reaches.
        queries: query heads times their width.
        kv_heads: heads of keys and values.
        head_dim: width of one.
        vocabulary: columns of the logits.
        normalises_queries: whether queries and keys have norms of their own, as in Qwen3-VL.
        tower: `None` for a model of text alone.
    """

    family: ModelFamily
    parameters: Mapping[str, int]
    lora: int
    trained: int
    trains_tower: bool
    root: int
    units: tuple[int, int]
    trained_unit: int
    largest: int
    layers: int
    attention_layers: int
    hidden: int
    intermediate: int
    queries: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    normalises_queries: bool
    tower: TowerShape | None

    @property
    def base(self) -> int:
        """Parameters without the adapter."""
        return sum(self.parameters.values())

    @property
    def total(self) -> int:
        """Parameters with the adapter."""
        return self.base + self.lora


def read_model(folder: Path, training: Training) -> ModelShape:
    """The shape of the model in a folder, of which only `config.json` (and the image processor's settings) is read.

    Raises:
        FFRError: there is none, or transformers knows no such model.
    """
    if not (folder / "config.json").is_file():
        raise FFRError(f"--model: {folder}: no config.json there; give a Hugging Face model folder")
    import torch
    from transformers import AutoConfig
    from verl.utils.model import get_hf_auto_model_class

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = get_hf_auto_model_class(config).from_config(config, attn_implementation="eager")
    except Exception as error:  # transformers raises many kinds for a config that it cannot read
        raise FFRError(f"--model: {folder}/config.json: {' '.join(str(error).split())[:300]}") from error
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise FFRError(f"--model: {folder}/config.json: {type(model).__name__} has no language-model head")
    parts = _parameters_by_part(model)
    if training.lora_rank:
        model = _with_lora(model, training)
    elif training.freeze_tower:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not is_in_vision_tower(name))
    trained = {name: one.numel() for name, one in model.named_parameters() if one.requires_grad}
    root, units, trained_unit = _fsdp_units(model, tied=config.tie_word_embeddings, strategy=training.strategy)
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return ModelShape(
        family=family_of_model(folder),
        parameters=parts,
        lora=sum(trained.values()) if training.lora_rank else 0,
        trained=sum(trained.values()),
        trains_tower=any(is_in_vision_tower(name) for name in trained),
        root=root,
        units=units,
        trained_unit=trained_unit,
        largest=max(one.numel() for one in model.parameters()),
        layers=text.num_hidden_layers,
        attention_layers=sum(kind in ("full_attention", "sliding_attention") for kind in kinds),
        hidden=text.hidden_size,
        intermediate=max(
            getattr(text, "intermediate_size", None) or 0,
            (getattr(text, "moe_intermediate_size", None) or 0) * (getattr(text, "num_experts_per_tok", None) or 0),
        ),
        queries=heads * head_dim,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocabulary=text.vocab_size,
        normalises_queries=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        tower=_tower(getattr(config, "vision_config", None)),
    )


def _parameters_by_part(model: Any) -> dict[str, int]:
    """`named_parameters` tells a tied head once, as the embeddings that it is."""
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if parameter is embeddings:
            part = "embeddings"
        elif parameter is head:
            part = "head"
        elif is_in_vision_tower(name):
            part = "vision tower"
        else:
            part = "language layers" if ".layers." in name else "other"
        counts[part] += parameter.numel()
    return counts


def _with_lora(model: Any, training: Training) -> Any:
    """As verl's FSDP engine builds the adapter (`_build_lora_module`)."""
    from omegaconf import OmegaConf
    from peft import LoraConfig, get_peft_model

    def plain(value: Any) -> Any:
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value

    try:
        return get_peft_model(
            model,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=training.lora_rank,
                target_modules=plain(training.target_modules),
                exclude_modules=plain(training.exclude_modules),
                bias="none",
            ),
        )
    except ValueError as error:
        raise FFRError(f"lora_rank, target_modules, exclude_modules: {' '.join(str(error).split())}") from None


def _fsdp_units(model: Any, *, tied: bool, strategy: str) -> tuple[int, tuple[int, int], int]:
    """The root's parameters, those of the two largest units, and the most trained ones in one of all these.

    Units are the classes that must not be split; with FSDP2 embeddings and head too, unless they are tied (verl's
    `get_fsdp_wrap_policy` and `_select_fsdp2_wrap_targets`).
    """
    classes = set(model._no_split_modules or ())
    ends = set() if tied or strategy == "fsdp" else {"embed_tokens", "lm_head"}
    gathered: set[int] = set()
    counts, trained = [0, 0], [0]
    for name, module in model.named_modules():
        if type(module).__name__ in classes or name.split(".")[-1] in ends:
            own = list(module.parameters())
            gathered.update(map(id, own))
            counts.append(sum(one.numel() for one in own))
            trained.append(sum(one.numel() for one in own if one.requires_grad))
    rest = [one for one in model.parameters() if id(one) not in gathered]
    trained.append(sum(one.numel() for one in rest if one.requires_grad))
    largest, second = sorted(counts)[-1], sorted(counts)[-2]
    return sum(one.numel() for one in rest), (largest, second), max(trained)


def _tower(vision: Any) -> TowerShape | None:
    if vision is None:
        return None
    width = getattr(vision, "embed_dim", None) or vision.hidden_size  # of Qwen2-VL, hidden_size is the output's
    inner = getattr(vision, "intermediate_size", None) or int(width * getattr(vision, "mlp_ratio", 4))
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", None) or 3
    values = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    return TowerShape(depth=vision.depth, width=width, inner=inner, patch_values=values)
