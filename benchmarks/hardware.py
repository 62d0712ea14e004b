"""The tables of docs/hardware.md: settings for usual machines, and what `ffr-verl plan` says of them.

    python -m benchmarks.hardware

prints them. The models are the shapes of Qwen2-VL-2B and -7B (`benchmarks/models/`): transformers builds 2,208,985,600
parameters of the 2B, as its published checkpoint has, and 8,291,375,616 of the 7B.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffr_verl.integrations.verl.memory import MemoryPlan, plan_memory, read_model, read_run, read_training
from ffr_verl.integrations.verl.preflight import compose_run
from ffr_verl.recipes import trainer_of

__all__ = ["SETTINGS", "TRAINED", "Setting", "planned", "tables"]

_GIB = 2**30
_MODELS = Path(__file__).parent / "models"
_ACTOR = "actor_rollout_ref.actor.fsdp_config."
_VLLM = "actor_rollout_ref.rollout."
# What each kind of training adds after `+recipe=NAME`.
TRAINED = {
    ("LoRA", "ffr_sft"): "",
    ("LoRA", "ffr_grpo"): "",
    ("LoRA, offloaded", "ffr_sft"): "engine.strategy=fsdp2 engine.offload_policy=true",
    ("full", "ffr_sft"): "model.lora_rank=0 engine.strategy=fsdp2 engine.model_dtype=fp32",
    ("full", "ffr_grpo"): f"actor_rollout_ref.model.lora_rank=0 {_ACTOR}model_dtype=fp32",
    ("full, offloaded", "ffr_sft"): "model.lora_rank=0 engine.strategy=fsdp2 engine.model_dtype=fp32 "
    "engine.offload_policy=true",
    ("full, offloaded", "ffr_grpo"): f"actor_rollout_ref.model.lora_rank=0 {_ACTOR}model_dtype=fp32 "
    f"{_ACTOR}offload_policy=true",
}
# GiB that a program sees of a GPU sold with so many GB: a little less.
_MEMORY = {24: 23.5, 40: 39.5, 80: 79.0}


@dataclass(frozen=True, slots=True)
class Setting:
    """A line of a table: a machine with GPUs of so many GB, a model, what is trained, and further overrides."""

    nodes: int
    gpus: int
    memory: int
    model: str
    trained: str
    recipe: str
    further: str = ""

    @property
    def overrides(self) -> list[str]:
        return [f"+recipe={self.recipe}", *TRAINED[self.trained, self.recipe].split(), *self.further.split()]

    @property
    def machine(self) -> str:
        return f"{f'{self.nodes} nodes of ' if self.nodes > 1 else ''}{self.gpus} x {self.memory} GB"


_HALVES = "ulysses_sequence_parallel_size=2"
SETTINGS = (
    Setting(1, 1, 24, "2b", "LoRA", "ffr_sft"),
    Setting(1, 1, 24, "2b", "full, offloaded", "ffr_sft"),
    Setting(1, 1, 24, "7b", "LoRA, offloaded", "ffr_sft"),
    Setting(1, 4, 40, "2b", "full", "ffr_sft"),
    Setting(1, 4, 40, "7b", "LoRA", "ffr_sft"),
    Setting(1, 4, 40, "7b", "full, offloaded", "ffr_sft"),
    Setting(1, 8, 80, "7b", "LoRA", "ffr_sft"),
    Setting(1, 8, 80, "7b", "full", "ffr_sft"),
    Setting(2, 8, 80, "7b", "full", "ffr_sft"),
    Setting(2, 8, 80, "7b", "full", "ffr_sft", f"data.max_length=31072 engine.{_HALVES}"),
    Setting(1, 1, 24, "2b", "LoRA", "ffr_grpo"),
    Setting(1, 1, 24, "7b", "LoRA", "ffr_grpo", f"{_VLLM}gpu_memory_utilization=0.9 {_ACTOR}param_offload=true"),
    Setting(1, 4, 40, "2b", "full", "ffr_grpo"),
    Setting(1, 4, 40, "7b", "LoRA", "ffr_grpo", f"{_VLLM}tensor_model_parallel_size=2"),
    Setting(1, 4, 40, "7b", "full, offloaded", "ffr_grpo", f"{_VLLM}tensor_model_parallel_size=2"),
    Setting(1, 8, 80, "7b", "LoRA", "ffr_grpo", f"{_VLLM}gpu_memory_utilization=0.7"),
    Setting(1, 8, 80, "7b", "full", "ffr_grpo"),
    Setting(2, 8, 80, "7b", "full", "ffr_grpo", f"{_VLLM}gpu_memory_utilization=0.6"),
    Setting(
        *(2, 8, 80, "7b", "full", "ffr_grpo"),
        f"data.max_prompt_length=30048 {_ACTOR}{_HALVES} {_VLLM}gpu_memory_utilization=0.6",
    ),
)


_shape = functools.cache(read_model)


@functools.cache
def planned(setting: Setting) -> MemoryPlan:
    """What `ffr-verl plan` says of a setting."""
    config = compose_run(trainer_of(setting.recipe), setting.overrides)
    shape = _shape(_MODELS / f"qwen2_vl_{setting.model}", read_training(config))
    run = read_run(config, shape, gpus=setting.gpus, nodes=setting.nodes)
    return plan_memory(shape, run, gpu=int(_MEMORY[setting.memory] * _GIB))


def tables() -> str:
    """One Markdown table a stage."""
    return "\n\n".join("\n".join(_table(recipe)) for recipe in ("ffr_sft", "ffr_grpo"))


def _table(recipe: str) -> Iterator[str]:
    head = ["machine", "model", "trained", "further overrides", "peak, GiB", "verdict", "host, GiB a node"]
    head += ["answers at once"] if recipe == "ffr_grpo" else []
    yield _row(head)
    yield f"|{'---|' * len(head)}"
    for setting in SETTINGS:
        if setting.recipe == recipe:
            plan = planned(setting)
            further = "<br>".join(f"`{one}`" for one in setting.further.split())
            cells: list[Any] = [setting.machine, setting.model.upper(), setting.trained, further]
            cells += [f"{plan.peak.name} {plan.peak.total / _GIB:.1f}", plan.verdict(plan.peak)]
            cells.append(f"{sum(plan.host.values()) / _GIB:.0f}")
            if plan.kv:
                cells.append(f"{plan.kv['answers at once']} to {plan.kv['answers at once, prompts shared']}")
            yield _row(cells)


def _row(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.stdout.write(tables() + "\n")
