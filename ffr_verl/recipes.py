"""The recipes as files: which there are, where they lie, and copies of them to edit."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from ffr_verl.errors import FFRError
from ffr_verl.files import whole_or_nothing

__all__ = ["Trainer", "copy_recipe", "recipe_names", "recipe_path", "trainer_of"]

Trainer = Literal["main_ppo", "sft_trainer"]
_FOLDER = Path(str(resources.files("ffr_verl.conf"))) / "recipe"


def recipe_names() -> list[str]:
    """Names for `+recipe=NAME`, sorted; parts that recipes have in common begin with `_` and are none."""
    return sorted(path.stem for path in _FOLDER.glob("[!_]*.yaml"))


def trainer_of(name: str) -> Trainer:
    """The trainer of verl that a recipe is for, by its name: `sft` stands in those of stage 1, in copies too."""
    return "sft_trainer" if "sft" in name else "main_ppo"


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe; an `FFRError` that lists the recipes when there is none of that name."""
    if name not in recipe_names():
        raise FFRError(f"no recipe is called {name!r}; there are: {', '.join(recipe_names())}")
    return _FOLDER / f"{name}.yaml"


def copy_recipe(name: str, folder: Path, *, new_name: str | None = None, force: bool = False) -> Path:
    """Copy a recipe to `folder/recipe/NEW_NAME.yaml` for editing; recipes that it inherits from stay in the package.

    Run the copy with `--config-dir FOLDER +recipe=NEW_NAME`. It needs a name of its own (`my_NAME` by default): Hydra
    looks into the folder of `--config-dir` last, so a packaged recipe of the same name would silently be taken
    instead. An existing file is replaced with `force` only. Returns the file written.
    """
    source = recipe_path(name)
    new_name = new_name or f"my_{name}"
    if new_name in recipe_names():
        raise FFRError(f"--name: {new_name!r} is a packaged recipe, which Hydra would take instead; give another name")
    if Path(new_name).name != new_name:
        raise FFRError(f"--name: found {new_name!r}; give a plain name such as my_{name}")
    target = folder / "recipe" / f"{new_name}.yaml"
    if target.exists() and not force:
        raise FFRError(f"{target}: there already; give another --name or folder, or --force to replace it")
    text = source.read_text(encoding="utf-8").replace(f"+recipe={name} ", f"--config-dir {folder} +recipe={new_name} ")
    with whole_or_nothing([target], mend="give another folder") as (temporary,):
        temporary.write_text(text, encoding="utf-8")
    return target
