"""Memory of a run, planned from a model's `config.json` and a composed config: `ffr-verl plan`."""

from ffr_verl.integrations.verl.memory.plan import MemoryPlan, Phase, plan_memory
from ffr_verl.integrations.verl.memory.run import Run, read_run

__all__ = ["MemoryPlan", "Phase", "Run", "plan_memory", "read_run"]
