"""`ffr-verl check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ffr_verl.cli.console import console, warn
from ffr_verl.errors import FFRError


def check(
    overrides: Annotated[
        list[str], typer.Argument(help="What follows `python -m verl.trainer...`: +recipe=NAME, KEY=VALUE ...")
    ],
    config_dir: Annotated[Path | None, typer.Option(help="The run's --config-dir, with recipes of your own.")] = None,
    trainer: Annotated[
        Literal["main_ppo", "sft_trainer"] | None,
        typer.Option(help="Which trainer gets it; by default sft_trainer for a recipe with sft in its name."),
    ] = None,
) -> None:
    """Check a run without starting it: keys, data, images, model, checkpoints, all problems at once.

    Says what the run would say at its start, and what was not checked, such as a reward function of your own. Exits
    with status 2 when there are problems.

    Example: ffr-verl check +recipe=ffr_grpo actor_rollout_ref.model.path=models/sft
    data.train_files=data/train.rl.parquet data.val_files=data/val.rl.parquet
    """
    names = [one.split("=", 1)[1] for one in overrides if one.lstrip("+").startswith("recipe=")]
    if not names:
        raise FFRError("give +recipe=NAME; `ffr-verl recipe list` shows the names")
    from ffr_verl.integrations.verl.preflight import compose_run, find_problems

    chosen = trainer or ("sft_trainer" if "sft" in names[0] else "main_ppo")
    found = find_problems(compose_run(chosen, overrides, config_dir=config_dir))
    for text in found.unchecked:
        warn(text)
    found.stop()
    console.print(f"no problem found for verl.trainer.{chosen} +recipe={names[0]}", highlight=False)
