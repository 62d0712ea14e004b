"""Memory of a run, planned from a model's `config.json` and a composed config: `ffr-verl plan`."""

from ffr_verl.integrations.verl.memory.model_shape import ModelShape, read_model
from ffr_verl.integrations.verl.memory.plan import MemoryPlan, Phase, plan_memory
from ffr_verl.integrations.verl.memory.run import Run, read_run, read_training

__all__ = ["MemoryPlan", "ModelShape", "Phase", "Run", "plan_memory", "read_model", "read_run", "read_training"]
