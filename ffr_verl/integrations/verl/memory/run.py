"""What of a composed config of verl decides the memory of its run."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf

from ffr_verl.errors import FFRError
from ffr_verl.integrations.verl.memory.model_shape import ModelShape, Training
from ffr_verl.settings import DATASET_PATHS, DEFAULT_MAX_IMAGES, DEFAULT_MAX_PIXELS

_SIZES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "half": 2}


@dataclass(frozen=True, slots=True)
class Rollout:
    """vLLM beside the trainer, as a recipe for GRPO sets it."""

    tensor_parallel: int
    bytes_a_value: int
    utilization: float
    max_num_seqs: int
    max_num_batched_tokens: int
    sleeps: bool
    prefix_caching: bool
    adapter_rank: int
    prompts: int
    answers: int
    prompt_tokens: int
    answer_tokens: int
    bucket: int


@dataclass(frozen=True, slots=True)
class Run:
    """What of a composed config decides its memory; sizes of values in bytes, the other counts on one GPU."""

    gpus: int
    nodes: int
    shards: int
    sequence_parallel: int
    training: Training
    stored: int
    computed: int
    reduced: int
    parameters_offloaded: bool
    optimizer_offloaded: bool
    all_offloaded: bool
    accumulates_whole_gradients: bool
    checkpoints_layers: bool
    tokens: int
    log_prob_tokens: int
    row_tokens: int
    visual_tokens: int
    attention: str
    fused_kernels: bool
    entropy_in_update: bool
    compiles: bool
    reference: Literal["none", "base", "separate"]
    reference_stored: int
    rollout: Rollout | None
    notes: tuple[str, ...]

    @property
    def world(self) -> int:
        """GPUs in all."""
        return self.gpus * self.nodes

    @property
    def has_flash(self) -> bool:
        """Whether flash-attn is there, of whose cross-entropy verl makes use too."""
        return self.attention == "flash_attention_2"


Get = Callable[..., Any]  # the value of a key, or a default where it is missing or null


def read_training(config: Any) -> Training:
    """What a composed config trains of its model.

    Raises:
        FFRError: a strategy of verl that is not planned.
    """
    get, model, engine = _reader(config), *_nodes(config)
    strategy = str(get(f"{engine.rpartition('.')[0] or engine}.strategy", "fsdp"))
    if strategy not in ("fsdp", "fsdp2"):
        raise FFRError(f"strategy={strategy}: the plan knows fsdp and fsdp2")
    return Training(
        lora_rank=int(get(f"{model}.lora_rank", 0)),
        target_modules=get(f"{model}.target_modules", "all-linear"),
        exclude_modules=get(f"{model}.exclude_modules"),
        freeze_tower="frozen_vision_tower" in str(get(f"{model}.external_lib")),
        strategy=strategy,
    )


def _reader(config: Any) -> Get:
    def get(key: str, default: Any = None) -> Any:
        value = OmegaConf.select(config, key)
        return default if value is None else value

    return get


def _nodes(config: Any) -> tuple[str, str]:
    """Where the model and the engine stand in the config of each trainer."""
    if "actor_rollout_ref" in config:
        return "actor_rollout_ref.model", "actor_rollout_ref.actor.fsdp_config"
    return "model", "engine"


def _size(get: Get, key: str, default: str) -> int:
    name = str(get(key, default)).removeprefix("torch.")
    if name not in _SIZES:
        raise FFRError(f"{key}: found {name!r}; the plan knows {', '.join(_SIZES)}")
    return _SIZES[name]


def read_run(
    config: Any, shape: ModelShape, *, gpus: int | None = None, nodes: int | None = None, images: int | None = None
) -> Run:
    """What of a composed config decides its memory.

    Args:
        config: of `compose_run`.
        shape: of the model, read with `read_training(config)`.
        gpus: of a node; the config's when not given.
        nodes: the config's when not given.
        images: of a row; when not given `rollout.limit_images`, or 8, the published number.

    Raises:
        FFRError: numbers that do not divide, or a mode of verl that is not planned.
    """
    grpo, training = "actor_rollout_ref" in config, read_training(config)
    get, model, engine = _reader(config), *_nodes(config)
    node = "actor_rollout_ref.actor"
    mode = get("trainer.v1.trainer_mode", "sync") if grpo else "sync"
    if mode not in ("sync", "colocate_async"):
        raise FFRError(f"trainer.v1.trainer_mode={mode}: the plan knows sync and colocate_async")
    gpus = gpus or int(get("trainer.n_gpus_per_node", 1))
    nodes = nodes or int(get("trainer.nnodes", 1))
    world = gpus * nodes
    sequence = int(get(f"{engine}.ulysses_sequence_parallel_size", 1))
    if grpo:  # verl reads either key
        sequence = max(sequence, int(get(f"{node}.ulysses_sequence_parallel_size", 1)))
    shards = int(get(f"{engine}.fsdp_size", -1))
    shards = world if shards < 0 or shards >= world else shards
    for key, value in (("ulysses_sequence_parallel_size", sequence), ("fsdp_size", shards)):
        if world % value:
            raise FFRError(f"{key}={value} does not divide {world} GPUs ({nodes} x {gpus})")

    row = (
        int(get("data.max_prompt_length", 512)) + int(get("data.max_response_length", 512))
        if grpo
        else int(get("data.max_length", 1024))
    )
    micro_batch: tuple[str, ...] = (
        "data.use_dynamic_bsz",
        "data.max_token_len_per_gpu",
        "data.micro_batch_size_per_gpu",
    )
    if grpo:
        keys = ("use_dynamic_bsz", "ppo_max_token_len_per_gpu", "ppo_micro_batch_size_per_gpu")
        micro_batch = tuple(f"{node}.{key}" for key in keys)
    tokens = log_prob_tokens = _micro_batch_tokens(get, row, micro_batch, sequence)
    if grpo:
        keys = ("use_dynamic_bsz", "max_token_len_per_gpu", "micro_batch_size_per_gpu")
        micro_batch = tuple(f"actor_rollout_ref.rollout.log_prob_{key}" for key in keys)
        log_prob_tokens = _micro_batch_tokens(get, row, micro_batch, sequence)
    too_long = []
    if min(tokens, log_prob_tokens) * sequence < row:
        too_long.append(
            f"a micro-batch holds {min(tokens, log_prob_tokens) * sequence:,} tokens, a row may have {row:,}: verl "
            "stops at a longer one"
        )
    is_ours = get("data.custom_cls.path") in DATASET_PATHS  # verl's own has no bound
    most = int(get("data.ffr.max_pixels", DEFAULT_MAX_PIXELS if is_ours else shape.family.max_pixels))
    most = min(most, shape.family.max_pixels)
    of_image = most // shape.family.factor**2
    images = images if images is not None else int(get("actor_rollout_ref.rollout.limit_images", DEFAULT_MAX_IMAGES))
    together = max(tokens, log_prob_tokens) * sequence  # of the ranks that share a micro-batch
    visual = min(max(1, together // row) * min(images * of_image, row), together) if shape.tower else 0

    attention = str(get(f"{model}.override_config.attn_implementation", "flash_attention_2"))
    reference: Literal["none", "base", "separate"] = "none"
    if grpo and (get(f"{node}.use_kl_loss") or get("algorithm.use_kl_in_reward")):
        reference = "base" if shape.lora else "separate"
    stored = _size(get, f"{engine}.model_dtype", "fp32")
    optimizer = get(f"{node}.optim.optimizer" if grpo else "optim.optimizer", "AdamW")
    all_offloaded = training.strategy == "fsdp2" and bool(get(f"{engine}.offload_policy", False))
    return Run(
        gpus=gpus,
        nodes=nodes,
        shards=shards,
        sequence_parallel=sequence,
        training=training,
        stored=stored,
        computed=_size(get, f"{engine}.mixed_precision.param_dtype", "bf16"),
        reduced=_size(get, f"{engine}.mixed_precision.reduce_dtype", "fp32"),
        parameters_offloaded=all_offloaded or bool(get(f"{engine}.param_offload", False)),
        optimizer_offloaded=all_offloaded or bool(get(f"{engine}.optimizer_offload", False)),
        all_offloaded=all_offloaded,
        accumulates_whole_gradients=bool(get(f"{engine}.use_no_sync_for_gradient_accumulation", False)),
        checkpoints_layers=bool(get(f"{model}.enable_gradient_checkpointing", True)),
        tokens=tokens,
        log_prob_tokens=log_prob_tokens,
        row_tokens=row,
        visual_tokens=visual,
        attention=attention,
        fused_kernels=bool(get(f"{model}.use_fused_kernels", False)),
        entropy_in_update=bool(grpo and (get(f"{node}.calculate_entropy") or get(f"{node}.entropy_coeff"))),
        compiles=bool(get(f"{node}.use_torch_compile" if grpo else "engine.use_torch_compile", True)),
        reference=reference,
        reference_stored=_size(get, "actor_rollout_ref.ref.fsdp_config.model_dtype", "fp32"),
        rollout=_read_rollout(get, world=world, rank=training.lora_rank) if grpo else None,
        notes=(*_notes(get, shape, stored=stored, optimizer=optimizer, attention=attention), *too_long),
    )


def _micro_batch_tokens(get: Get, row: int, keys: tuple[str, ...], sequence: int) -> int:
    """Tokens of a micro-batch on a GPU: as many as may be packed, or rows padded to the longest."""
    dynamic, tokens, rows = keys
    if get(dynamic, False):
        return int(get(tokens, row))
    return math.ceil(int(get(rows, 1)) * row / sequence)


def _read_rollout(get: Get, *, world: int, rank: int) -> Rollout:
    node = "actor_rollout_ref.rollout"
    parallel = int(get(f"{node}.tensor_model_parallel_size", 1))
    if world % parallel:
        raise FFRError(f"{node}.tensor_model_parallel_size={parallel} does not divide {world} GPUs")
    merged = bool(get("actor_rollout_ref.model.lora.merge", False))
    return Rollout(
        tensor_parallel=parallel,
        bytes_a_value=_size(get, f"{node}.dtype", "bfloat16"),
        utilization=float(get(f"{node}.gpu_memory_utilization", 0.5)),
        max_num_seqs=int(get(f"{node}.max_num_seqs", 256)),
        max_num_batched_tokens=int(get(f"{node}.max_num_batched_tokens", 8192)),
        sleeps=bool(get(f"{node}.free_cache_engine", True)) and bool(get(f"{node}.enable_sleep_mode", True)),
        prefix_caching=bool(get(f"{node}.enable_prefix_caching", True)),
        adapter_rank=0 if merged else rank,
        prompts=int(get("data.train_batch_size", 1)),
        answers=int(get(f"{node}.n", 1)),
        prompt_tokens=int(get("data.max_prompt_length", 512)),
        answer_tokens=int(get("data.max_response_length", 512)),
        bucket=int(get(f"{node}.checkpoint_engine.update_weights_bucket_megabytes", 2048)) * 2**20,
    )


def _notes(get: Get, shape: ModelShape, *, stored: int, optimizer: str, attention: str) -> list[str]:
    notes = []
    if stored == 2 and not shape.lora:
        notes.append(
            "full fine-tuning with model_dtype=bf16: a weight has 8 bits, and steps of AdamW below half of the last "
            "one are lost; model_dtype=fp32 takes twice the bytes"
        )
    if optimizer != "AdamW":
        notes.append(f"optim.optimizer={optimizer}: counted as torch's AdamW")
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        notes.append("flash-attn is not installed here; the plan is for a machine that has it")
    if get("trainer.device") == "cpu":
        notes.append("trainer.device=cpu: vLLM takes VLLM_CPU_KVCACHE_SPACE for its cache, not a share of a GPU")
    if shape.attention_layers < shape.layers:
        notes.append(
            f"{shape.layers - shape.attention_layers} of {shape.layers} layers keep a state instead of keys and "
            "values; the state is not counted"
        )
    return notes
