"""`ffr-verl plan`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ffr_verl.cli.check import chosen_trainer
from ffr_verl.cli.console import console, warn
from ffr_verl.cli.options import Overrides
from ffr_verl.errors import FFRError, counted
from ffr_verl.recipes import Trainer

if TYPE_CHECKING:
    from ffr_verl.integrations.verl.memory import MemoryPlan, Run

_GIB = 2**30


def plan(
    overrides: Overrides,
    model: Annotated[Path, typer.Option(help="Model folder; only its config.json is read.")],
    gpu_memory: Annotated[float, typer.Option(min=0.001, help="GiB of one GPU, as nvidia-smi tells it.")] = 80.0,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs of a node; the recipe's by default.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; the recipe's by default.")] = None,
    images: Annotated[
        int | None, typer.Option(min=0, help="Most images of a row; rollout.limit_images, or 8 by default.")
    ] = None,
    config_dir: Annotated[Path | None, typer.Option(help="The run's --config-dir, with recipes of your own.")] = None,
    trainer: Annotated[
        Trainer | None,
        typer.Option(help="Which trainer gets it; by default sft_trainer for a recipe with sft in its name."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead, in bytes.")] = False,
) -> None:
    """Memory of a run on each GPU, part by part and phase by phase.

    Needs no GPU and no weights: computed from the model's config.json and the composed recipe. docs/hardware.md has
    the formulas, what is not counted, and settings for usual machines.

    Example: ffr-verl plan --model models/sft --gpu-memory 24 --gpus 1 +recipe=ffr_grpo
    actor_rollout_ref.actor.fsdp_config.param_offload=true
    """
    chosen = chosen_trainer(overrides, trainer)
    from ffr_verl.integrations.verl.memory import plan_memory, read_model, read_run, read_training
    from ffr_verl.integrations.verl.preflight import compose_run

    config = compose_run(chosen, overrides, config_dir=config_dir)
    folder = model.expanduser()
    if not folder.is_dir():
        raise FFRError(
            f"--model: {model}: no such folder; give a Hugging Face model folder, only its config.json is read"
        )
    shape = read_model(folder, read_training(config))
    run = read_run(config, shape, gpus=gpus, nodes=nodes, images=images)
    found = plan_memory(shape, run, gpu=int(gpu_memory * _GIB))
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        _show(found, run)


def _show(plan: MemoryPlan, run: Run) -> None:
    from ffr_verl.integrations.verl.memory.plan import MARGIN, NOT_COUNTED

    shared = f", sequence parallel {run.sequence_parallel}" if run.sequence_parallel > 1 else ""
    gpus, shards = counted(run.gpus, "GPU"), counted(run.shards, "shard")
    _line(f"{run.nodes} x {gpus} of {plan.gpu / _GIB:.4g} GiB, {shards}{shared}; ", end="")
    _line(f"{sum(plan.parameters.values()):,} parameters, {plan.trained:,} trained")
    _line(
        f"a micro-batch: {run.tokens:,} tokens a GPU, {run.visual_tokens:,} of images among the GPUs that share it\n"
    )
    _table("parameters", plan.parameters, unit=1)
    _table("GiB on a GPU, part by part", plan.parts)
    _line(f"{'phase':28}{'GiB':>9}   what lies there")
    for phase in plan.phases:
        inside = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in phase.parts.items() if size)
        _line(f"{phase.name:28}{phase.total / _GIB:9.2f}   {plan.verdict(phase)}: {inside}")
    if plan.kv:
        kv = plan.kv
        _line(
            f"\nvLLM: {kv['bytes a token']:,} bytes of KV cache a token, {kv['tokens']:,} tokens. A replica holds "
            f"{kv['answers at once']} of the longest answers at once, {kv['answers at once, prompts shared']} where a "
            f"group shares its prompt; a step asks each of {kv['replicas']} replicas for {kv['answers of a step']}"
        )
    if any(plan.host.values()):
        inside = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in plan.host.items() if size)
        _line(f"host memory of a node: {inside} GiB")
    _line(f"\nnot counted: {'; '.join(NOT_COUNTED)}. `tight` leaves less than {MARGIN:.0%} of the GPU for them.")
    for note in plan.notes:
        warn(note)
    peak = plan.peak
    _line(f"peak: {peak.name}, {peak.total / _GIB:.2f} of {plan.gpu / _GIB:.4g} GiB: {plan.verdict(peak)}")


def _table(title: str, rows: Mapping[str, int], *, unit: int = _GIB) -> None:
    _line(title)
    for name, value in rows.items():
        _line(f"  {name:24}{value:>15,}" if unit == 1 else f"  {name:24}{value / unit:>15.3f}")
    _line("")


def _line(text: str, end: str = "\n") -> None:
    console.print(text, end=end, markup=False, highlight=False, soft_wrap=True)
