"""`ffr-verl recipe list|show|copy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The recipes for `+recipe=NAME`: list, show, copy to edit.")


@app.command("list")
def recipe_list() -> None:
    """Names of the recipes, and what each is for."""
    from ffr_verl.recipes import recipe_names, recipe_path

    for name in recipe_names():
        purpose = next(
            line.lstrip("# ").rstrip()
            for line in recipe_path(name).read_text(encoding="utf-8").splitlines()
            if line.startswith("# ") and "@package" not in line
        )
        typer.echo(f"{name:16} {purpose}")


@app.command("show")
def recipe_show(name: Annotated[str, typer.Argument(help="Name of a recipe, as in `ffr-verl recipe list`.")]) -> None:
    """Print a recipe's YAML."""
    from ffr_verl.recipes import recipe_path

    typer.echo(recipe_path(name).read_text(encoding="utf-8"), nl=False)


@app.command("copy")
def recipe_copy(
    name: Annotated[str, typer.Argument(help="Name of a recipe, as in `ffr-verl recipe list`.")],
    folder: Annotated[Path, typer.Argument(help="Folder that gets recipe/NEW_NAME.yaml.")],
    new_name: Annotated[str | None, typer.Option("--name", help="Name of the copy; my_NAME by default.")] = None,
    force: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
) -> None:
    """Copy a recipe for editing; run the copy with `--config-dir FOLDER +recipe=NEW_NAME`.

    The copy has a name of its own because Hydra looks into --config-dir after the installed recipes.
    """
    from ffr_verl.recipes import copy_recipe, trainer_of

    path = copy_recipe(name, folder, new_name=new_name, force=force)
    typer.echo(f"wrote {path}")
    typer.echo(
        f"edit it, then: python -m verl.trainer.{trainer_of(name)} --config-dir {folder} +recipe={path.stem} ..."
    )
