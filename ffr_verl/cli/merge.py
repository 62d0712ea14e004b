"""`ffr-verl merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffr_verl.cli.console import clean_up_when_terminated, console, wrote
from ffr_verl.cli.options import Force


def merge(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="default_local_dir of a run (newest step), a global_step_N in it, or its actor folder."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to make: config, weights, tokenizer, processor.")],
    best: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Take the checkpoint of a GRPO run whose validation was best by this metric, such as micro_joint_f1, "
            "instead of the newest.",
        ),
    ] = None,
    force: Force = False,
    trust_checkpoint: Annotated[
        bool,
        typer.Option(help="Merge shards that hold more than tensors: reading them runs code that they bring."),
    ] = False,
) -> None:
    """Make a Hugging Face folder of a checkpoint, LoRA folded in.

    Works for both stages, with LoRA and full fine-tuning. The result starts stage 2, and vLLM and transformers load
    it.

    Example: ffr-verl merge checkpoints/ffr/sft --output models/sft
    """
    from ffr_verl.integrations.verl.checkpoint_folders import best_checkpoint
    from ffr_verl.integrations.verl.merge import merge_checkpoint

    if best is not None:
        step, value, checkpoint = best_checkpoint(checkpoint, best)
        console.print(f"step {step} is the best: {best} {value:.4f}", highlight=False, markup=False, soft_wrap=True)
    clean_up_when_terminated()
    with console.status("merging"):
        merged = merge_checkpoint(checkpoint, output, force=force, trust=trust_checkpoint)
    wrote(merged)
