"""Memory of a run on each GPU, part by part, from a model's shape and a composed config: `ffr-verl plan`.

All of it is arithmetic, with the rules of verl 0.9.1's FSDP engine, torch's AdamW and vLLM 0.24. Sizes of values in
bytes: `s` of a stored parameter (`model_dtype`), `d` of a computed value (`mixed_precision.param_dtype`; bf16 when not
given), `r` of a gradient on its way (`reduce_dtype`; fp32). `T` is the tokens of a micro-batch on one GPU, `h`, `q`,
`i` the widths of the language model, its queries and its MLP, `w` that of the vision tower.

| part | bytes on a GPU | source |
|---|---|---|
| weights | s · parameters / shards | FSDP: a rank stores its share; `fsdp_size=-1` is all GPUs |
| gradients | s · trained / shards | FSDP reduces in r, stores in the parameter's dtype |
| optimiser | 2 · s · trained / shards | torch.optim.AdamW: two moments, like the parameter |
| optimiser's step | s · trained / shards | torch's foreach loop holds one more list |
| gathered weights | d · (root + the two largest units) | FSDP: one computes, the next is fetched, the root stays |
| gathered gradients | (d + r) · trained of the largest unit | computed, then copied to be reduced |
| layer inputs | T · layers · h · d | what gradient checkpointing keeps |
| one layer | T · (8h + 2dh + 4dq + 4di + ...), backward 2d(i + h) | what autograd saves: `_saved` |
| logits | T · vocabulary · d · copies + T · h · (5 + 2d) | one copy with flash-attn, else three: `_logits` |
| pixels | patches · values of one · 4 | the processor's fp32 |
| vision tower | patches · (values of one · d + w · (30 + 7d)) | one block's attention, which rotates in fp32 |
| reference model | 0 | with LoRA the base itself, else verl keeps it in the host's memory |
| vLLM | `gpu_memory_utilization` of the GPU | vLLM's request_memory; weights and a trial run leave the KV cache |
| KV cache of a token | 2 · layers · heads / tensor parallel · width · bytes | vLLM's FullAttentionSpec |
| weights on their way | the adapter; or two buckets and the largest tensor | verl's BucketedWeightSender |

Phases are those of verl's trainer v1 in the modes `sync` and `colocate_async`. While vLLM answers, the trainer's
parameters and optimiser lie beside it unless they are offloaded. While the trainer computes, vLLM sleeps: with an
adapter its weights go to the host's memory (level 1), without they are dropped (level 2). It does not sleep where
`free_cache_engine` or `enable_sleep_mode` is off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ffr_verl.inference.generate import LORA_RANKS
from ffr_verl.integrations.verl.memory.model_shape import ModelShape
from ffr_verl.integrations.verl.memory.run import Rollout, Run

GIB = 2**30
MARGIN = 0.1  # of a GPU, for what is not counted
NOT_COUNTED = (
    "CUDA contexts (two processes a GPU in GRPO)",
    "NCCL buffers",
    "CUDA graphs and compiled kernels of vLLM",
    "fragmentation of the allocator",
    "batches on their way, metrics, checkpoints being written",
)
_KV_BLOCK = 16  # tokens of vLLM's cache blocks
_SAMPLER_BYTES = 20  # of a logit in vLLM's trial run with top-p: itself in fp32, softmax, sorted, their indices


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a step: what lies on a GPU at its peak, in bytes."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The plan of a run.

    Attributes:
        parameters: of the model, by part.
        trained: of them, or of the adapter.
        parts: bytes on a GPU of each part by itself, whichever phase it belongs to.
        phases: in the order of a step.
        gpu: bytes of a GPU.
        kv: of vLLM on a GPU: bytes of a token and of the pool, longest answers at once (each with its own prompt, and
            with one prompt a group), answers of a step; the latter three of a replica. Empty for SFT.
        host: bytes in the host's memory of a node, by part.
        notes: what the numbers rest on or run into.
    """

    parameters: Mapping[str, int]
    trained: int
    parts: Mapping[str, int]
    phases: tuple[Phase, ...]
    gpu: int
    kv: Mapping[str, int]
    host: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    def verdict(self, phase: Phase) -> Literal["fits", "tight", "too large"]:
        """`tight`: it leaves less than `MARGIN` of the GPU for what is not counted. Nothing fits where the KV cache
        does not hold one of the longest answers."""
        if phase.total > self.gpu or self.kv.get("answers at once", 1) <= 0:
            return "too large"
        return "fits" if phase.total <= (1 - MARGIN) * self.gpu else "tight"

    def as_dict(self) -> dict[str, Any]:
        """For `--json`: bytes throughout."""
        found = asdict(self)
        for phase, entry in zip(self.phases, found["phases"], strict=True):
            entry.update(total=phase.total, verdict=self.verdict(phase))
        return {**found, "peak": self.peak.total, "verdict": self.verdict(self.peak), "not_counted": list(NOT_COUNTED)}


def plan_memory(shape: ModelShape, run: Run, *, gpu: int) -> MemoryPlan:
    """Memory of a run, see the top of this module for the formulas.

    Args:
        shape: of the model.
        run: of the config.
        gpu: bytes of one GPU.
    """
    shards = run.shards
    weights = math.ceil(run.stored * shape.total / shards)
    gradients = math.ceil(run.stored * shape.trained / shards)
    moments, step = 2 * gradients, gradients
    if run.accumulates_whole_gradients:
        gradients = run.computed * shape.trained
    gathered = run.computed * (shape.root + sum(shape.units))
    gathered_gradients = (run.computed + run.reduced) * shape.trained_unit
    kept, at_once = _activations(shape, run)
    logits = _logits(shape, run, run.tokens, training=True)
    pixels, tower = _images(shape, run.visual_tokens, run.computed)
    parts = {
        "weights": weights,
        "gradients": gradients,
        "optimiser": moments,
        "optimiser's step": step,
        "gathered weights": gathered,
        "gathered gradients": gathered_gradients,
        "layer inputs" if run.checkpoints_layers else "all layers": kept,
        "one layer": at_once,
        "logits": logits,
        "pixels": pixels,
        "vision tower": tower,
    }
    computing = {"weights": weights, "optimiser": moments, "gradients": gradients}
    if run.all_offloaded:
        computing, step = dict.fromkeys(computing, 0), 0
    resting = {
        "weights": 0 if run.parameters_offloaded else weights,
        "optimiser": 0 if run.optimizer_offloaded else moments,
    }
    update = Phase(
        "update",
        {
            **computing,
            "gathered": gathered + gathered_gradients,
            "activations": pixels + max(tower, kept + max(at_once, logits)),
        },
    )
    stepping = Phase("optimiser's step", {**computing, "optimiser's step": step})
    host = {
        "offloaded weights and gradients": (weights + gradients) * run.gpus if run.parameters_offloaded else 0,
        "offloaded optimiser": moments * run.gpus if run.optimizer_offloaded else 0,
    }
    parameters = {**shape.parameters, **({"LoRA": shape.lora} if shape.lora else {})}
    if run.rollout is None:
        return MemoryPlan(parameters, shape.trained, parts, (update, stepping), gpu, {}, host, run.notes)

    vllm = _vllm(shape, run.rollout, gpu)
    asked_logits = _logits(shape, run, run.log_prob_tokens, training=False)
    parts.update(
        {
            "logits, log-probs": asked_logits,
            "reference model": 0,
            "vLLM weights": vllm["weights"],
            "vLLM's trial run": vllm["activations"],
            "KV cache": vllm["pool"],
        }
    )
    if run.reference == "separate":
        host["reference model"] = math.ceil(run.reference_stored * shape.base / shards) * run.gpus
    if run.rollout.sleeps and run.rollout.adapter_rank:
        host["sleeping vLLM"] = vllm["weights"] * run.gpus
    asking = {
        "weights": computing["weights"],
        "optimiser": resting["optimiser"],
        "gathered": gathered,
        "activations": pixels + max(tower, _forward(shape, run), asked_logits),
    }
    adapter = run.rollout.adapter_rank > 0
    on_their_way = run.stored * shape.lora if adapter else 2 * run.rollout.bucket + run.stored * shape.largest
    sending = {**resting, "weights": computing["weights"], "on their way": on_their_way}
    awake = 0 if run.rollout.sleeps else vllm["budget"]
    phases = (
        Phase("rollout", {**resting, "vLLM": vllm["budget"]}),
        Phase("log-probs", {**asking, "vLLM": awake}),
        Phase("update", {**update.parts, "vLLM": awake}),
        Phase("optimiser's step", {**stepping.parts, "vLLM": awake}),
        Phase("weights to vLLM", {**sending, "vLLM": awake or vllm["weights"]}),
    )
    notes = (*run.notes, *_rollout_notes(vllm, run.rollout))
    return MemoryPlan(parameters, shape.trained, parts, phases, gpu, _answers(run, vllm), host, notes)


def _activations(shape: ModelShape, run: Run) -> tuple[int, int]:
    """What the forward pass keeps for the backward pass, and what one layer adds at the peak of the latter.

    With gradient checkpointing that is each layer's input, and a layer is computed once more; without, all of them.
    """
    saved = _saved(shape, run)
    backward = run.tokens * 2 * run.computed * (shape.intermediate + shape.hidden)
    backward += run.tokens * shape.hidden * (1 if run.checkpoints_layers else 10)  # norms in fp32, still there without
    kept = shape.layers * (run.tokens * shape.hidden * run.computed if run.checkpoints_layers else saved)
    if shape.trains_tower and shape.tower:
        patches = run.visual_tokens * shape.family.merge_size**2
        kept += patches * shape.tower.depth * shape.tower.width * run.computed
    return kept, (saved if run.checkpoints_layers else 0) + backward


def _saved(shape: ModelShape, run: Run) -> int:
    """What autograd saves in one decoder layer.

    Of a token: the input of both norms in fp32 (4h each) and their outputs (dh each); query, key, value and output of
    flash attention, keys and values repeated to the query heads as verl's patched attention does (4dq), and before
    that (dk); gate, its activation, up and their product (4di); sums of softmax and norms in fp32; what the adapter
    makes of each linear's input. Full fine-tuning saves what the weight of a norm is multiplied with as well (2dh), a
    model with norms of queries and keys their inputs in fp32 and outputs. Without flash attention there is a mask of
    all pairs of tokens, eager attention keeps their scores.
    """
    size, hidden, keys = run.computed, shape.hidden, shape.kv_heads * shape.head_dim
    token = 8 * hidden + 2 * size * hidden + size * (4 * shape.queries + keys + 4 * shape.intermediate)
    token += 4 * (shape.queries // shape.head_dim) + 8
    token += 7 * size * run.training.lora_rank if shape.lora else 2 * size * hidden
    if shape.normalises_queries:
        token += (4 + size) * (shape.queries + keys)
    pairs = math.ceil(run.tokens / run.row_tokens) * min(run.tokens, run.row_tokens) ** 2
    if run.attention == "eager":
        return run.tokens * token + pairs * (shape.queries // shape.head_dim) * (4 + size)
    return run.tokens * token + (0 if run.has_flash else pairs * (1 + size))


def _forward(shape: ModelShape, run: Run) -> int:
    """The peak inside a layer without gradients: gate, up and their product, beside three of the hidden width."""
    return run.log_prob_tokens * run.computed * 3 * (shape.intermediate + shape.hidden)


def _logits(shape: ModelShape, run: Run, tokens: int, *, training: bool) -> int:
    """Logits of a micro-batch and what is made of them, with the last hidden states.

    In training flash-attn's cross-entropy writes the gradient over the logits; without it log-softmax and the gradient
    are two more copies. The entropy of a training step takes three more. Log-probs ask for the entropy as well, which
    takes two more where it is not compiled.
    """
    ends = tokens * shape.hidden * (5 + (2 if shape.lora else 4) * run.computed)
    if run.fused_kernels:
        return ends
    if training:
        copies = 1 if run.has_flash else 3
        copies += 3 if run.entropy_in_update else 0
    else:
        copies = 1 if run.compiles else 3
    return tokens * shape.vocabulary * run.computed * copies + ends


def _images(shape: ModelShape, tokens: int, computed: int) -> tuple[int, int]:
    """Pixels of so many visual tokens, and the peak inside the vision tower while they pass it."""
    if shape.tower is None:
        return 0, 0
    patches = tokens * shape.family.merge_size**2
    tower = shape.tower
    inside = max(tower.width * (30 + 7 * computed), 2 * computed * (tower.width + tower.inner))
    return patches * tower.patch_values * 4, patches * (tower.patch_values * computed + inside)


def _vllm(shape: ModelShape, rollout: Rollout, gpu: int) -> dict[str, int]:
    """Of vLLM on a GPU: its budget, weights, what its trial run takes, and the KV cache that is left.

    The trial run passes images of the most tokens that the model's processor allows through the tower and keeps what
    comes out, then a batch of `max_num_batched_tokens`, then samples for `max_num_seqs` answers.
    """
    size, parallel = rollout.bytes_a_value, rollout.tensor_parallel
    budget = int(rollout.utilization * gpu)
    weights = math.ceil(size * shape.base / parallel)
    if rollout.adapter_rank:
        room = next((one for one in LORA_RANKS if one >= rollout.adapter_rank), rollout.adapter_rank)
        weights += size * shape.lora * room // rollout.adapter_rank
    batch = rollout.max_num_batched_tokens * size * 3 * (shape.intermediate // parallel + shape.hidden)
    sampler = rollout.max_num_seqs * shape.vocabulary * _SAMPLER_BYTES
    most = max(rollout.max_num_batched_tokens, shape.family.max_pixels // shape.family.factor**2)
    pixels, tower = _images(shape, most, size)
    cache = most * shape.hidden * size if shape.tower else 0
    activations = cache + max(pixels + tower, batch + sampler)
    token = 2 * shape.attention_layers * math.ceil(shape.kv_heads / parallel) * shape.head_dim * size
    pool = budget - weights - activations
    return {"budget": budget, "weights": weights, "activations": activations, "token": token, "pool": pool}


def _answers(run: Run, vllm: Mapping[str, int]) -> dict[str, int]:
    rollout = run.rollout
    assert rollout is not None
    blocks = max(0, vllm["pool"]) // (vllm["token"] * _KV_BLOCK)
    prompt, answer = (math.ceil(one / _KV_BLOCK) for one in (rollout.prompt_tokens, rollout.answer_tokens))
    replicas = run.world // rollout.tensor_parallel
    return {
        "bytes a token": vllm["token"],
        "pool": vllm["pool"],
        "tokens": blocks * _KV_BLOCK,
        "answers at once": min(blocks // (prompt + answer), rollout.max_num_seqs),
        "answers at once, prompts shared": min(
            blocks // (prompt + rollout.answers * answer) * rollout.answers, rollout.max_num_seqs
        )
        if rollout.prefix_caching
        else 0,
        "answers of a step": math.ceil(rollout.prompts * rollout.answers / replicas),
        "replicas": replicas,
    }


def _rollout_notes(vllm: Mapping[str, int], rollout: Rollout) -> list[str]:
    if vllm["pool"] >= vllm["token"] * (rollout.prompt_tokens + rollout.answer_tokens):
        return []
    need = (vllm["weights"] + vllm["activations"]) / GIB
    return [
        f"gpu_memory_utilization={rollout.utilization}: vLLM gets {vllm['budget'] / GIB:.1f} GiB, its weights and "
        f"trial run take {need:.1f}, and the rest does not hold one row. Raise it or tensor_model_parallel_size, or "
        "lower max_num_batched_tokens or max_pixels of the model's image processor"
    ]
