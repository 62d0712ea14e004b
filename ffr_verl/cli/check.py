"""`ffr-verl check`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from ffr_verl.cli.console import say, warn
from ffr_verl.cli.options import Overrides
from ffr_verl.errors import FFRError
from ffr_verl.recipes import Trainer, recipe_path, trainer_of


def recipe_of(overrides: Sequence[str]) -> str:
    """The recipe that a command line names.

    Raises:
        FFRError: when it names none.
    """
    names = [one.split("=", 1)[1] for one in overrides if one.lstrip("+").startswith("recipe=")]
    if not names:
        raise FFRError("give +recipe=NAME; `ffr-verl recipe list` shows the names")
    return names[0]


def chosen_trainer(overrides: Sequence[str], trainer: Trainer | None) -> Trainer:
    """The trainer that a command line is for: the one given, else by the name of its recipe."""
    return trainer or trainer_of(recipe_of(overrides))


def check(
    overrides: Overrides,
    config_dir: Annotated[Path | None, typer.Option(help="The run's --config-dir, with recipes of your own.")] = None,
    trainer: Annotated[
        Trainer | None,
        typer.Option(help="Which trainer gets it; by default sft_trainer for a recipe with sft in its name."),
    ] = None,
) -> None:
    """Check a run without starting it: all problems at once.

    Keys, data, images, model and checkpoints are checked. A problem would stop the run; with any the status is 2. A
    note says what the run goes without, what was not checked, such as a custom_reward_function other than ours, which
    keys of a recipe verl does not have, and what may change before the start: another GRPO run that is alive, a
    cluster that cannot be joined.

    Example: ffr-verl check +recipe=ffr_grpo actor_rollout_ref.model.path=models/sft
    data.train_files=data/train.rl.parquet data.val_files=data/val.rl.parquet
    """
    chosen = chosen_trainer(overrides, trainer)
    if config_dir is None:
        recipe_path(recipe_of(overrides))  # before verl is loaded, which takes long
    from ffr_verl.integrations.verl.preflight import compose_run, find_problems, verl_problems

    refused: list[str] = []
    config = compose_run(chosen, overrides, config_dir=config_dir, refused=refused)
    found = find_problems(config)
    for text in found.notes:
        warn(f"note: {text}")
    of_verl = verl_problems(config) if chosen == "main_ppo" else []
    found._replace(problems=(*refused, *found.problems, *of_verl)).stop()
    nothing = "nothing else" if found.notes else "no problem"
    say(f"{nothing} found for verl.trainer.{chosen} +recipe={recipe_of(overrides)}")
