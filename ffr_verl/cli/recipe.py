"""`ffr-verl recipe list|show|diff|copy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ffr_verl.cli.console import console, say
from ffr_verl.cli.options import Force, RecipeName

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The recipes for `+recipe=NAME`: list, show, diff, copy to edit.",
)


@app.command("list")
def recipe_list() -> None:
    """Names of the recipes, and what each is for."""
    from ffr_verl.recipes import recipe_names, recipe_purpose

    width = max(map(len, recipe_names()))
    for name in recipe_names():
        typer.echo(f"{name:{width}}  {recipe_purpose(name)}")


@app.command("show")
def recipe_show(name: RecipeName) -> None:
    """Print a recipe's YAML."""
    from ffr_verl.recipes import recipe_path

    typer.echo(recipe_path(name).read_text(encoding="utf-8"), nl=False)


@app.command("diff")
def recipe_diff(
    name: RecipeName,
    other: Annotated[
        str | None, typer.Argument(metavar="FILE", help="A YAML file, such as an edited copy, or another recipe.")
    ] = None,
) -> None:
    """Show which values differ between a recipe and a file.

    Inherited values are compared too. Without FILE it is what the recipe changes in verl's own defaults, which needs
    verl and takes some seconds.

    Example: ffr-verl recipe diff ffr_grpo conf/recipe/my_ffr_grpo.yaml
    """
    from ffr_verl.recipes import differences, read_recipe, recipe_names, recipe_path, trainer_of

    path = recipe_path(name)
    if other is None:
        from ffr_verl.integrations.verl.preflight import composed

        first, second = "verl's defaults", name
        with console.status("composing verl's configuration"):
            found = differences(*[composed(trainer_of(name), given) for given in ([], [f"+recipe={name}"])])
    else:
        first, second = name, other
        file = recipe_path(other) if other in recipe_names() else Path(other)
        found = differences(read_recipe(path), read_recipe(file))
    say(f"{first} -> {second}: {len(found)} values differ" if found else f"{first} and {second} set the same values")
    for key, *values in found:
        say(f"{key}: {' -> '.join('(not set)' if value is ... else str(value) for value in values)}")


@app.command("copy")
def recipe_copy(
    name: RecipeName,
    folder: Annotated[Path, typer.Argument(help="Folder that gets recipe/NEW_NAME.yaml.")],
    new_name: Annotated[str | None, typer.Option("--name", help="Name of the copy; my_NAME by default.")] = None,
    force: Force = False,
) -> None:
    """Copy a recipe for editing.

    Run the copy with `--config-dir FOLDER +recipe=NEW_NAME`. It has a name of its own because Hydra looks into
    --config-dir after the installed recipes.
    """
    from ffr_verl.recipes import copy_recipe, trainer_of

    path = copy_recipe(name, folder, new_name=new_name, force=force)
    typer.echo(f"wrote {path}")
    typer.echo(
        f"edit it, then: python -m verl.trainer.{trainer_of(name)} --config-dir {folder} +recipe={path.stem} ..."
    )
