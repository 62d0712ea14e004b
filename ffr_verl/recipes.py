"""The recipes as files: which there are, where they lie, and copies of them to edit."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ffr_verl.errors import FFRError

__all__ = ["copy_recipe", "recipe_names", "recipe_path", "trainer_of"]


def _folder() -> Path:
    return Path(str(resources.files("ffr_verl.conf"))) / "recipe"


def recipe_names() -> list[str]:
    """Names for `+recipe=NAME`, sorted; parts that recipes have in common begin with `_` and are none.

    Example:
        >>> "ffr_grpo" in recipe_names()
        True
    """
    return sorted(path.stem for path in _folder().glob("[!_]*.yaml"))


def trainer_of(name: str) -> str:
    """The trainer of verl that a recipe is for.

    Example:
        >>> trainer_of("ffr_gdpo_cpu"), trainer_of("ffr_sft")
        ('main_ppo', 'sft_trainer')
    """
    return "sft_trainer" if name.startswith("ffr_sft") else "main_ppo"


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe.

    Raises:
        FFRError: when there is no recipe of that name; the message lists those that exist.
    """
    path = _folder() / f"{name}.yaml"
    if name not in recipe_names():
        raise FFRError(f"no recipe is called {name!r}; there are: {', '.join(recipe_names())}")
    return path


def copy_recipe(name: str, folder: Path, *, new_name: str | None = None, force: bool = False) -> Path:
    """Copy a recipe to `folder/recipe/NEW_NAME.yaml` for editing; recipes that it inherits from stay in the package.

    Run the copy with `--config-dir FOLDER +recipe=NEW_NAME`. It needs a name of its own: Hydra looks into the folder
    of `--config-dir` last, so a packaged recipe of the same name would silently be taken instead.

    Args:
        name: a packaged recipe.
        folder: where the folder `recipe` is made.
        new_name: name of the copy; `my_NAME` by default.
        force: replace a file that is there.

    Returns:
        The file written.

    Raises:
        FFRError: when there is no such recipe, the new name is one of the package, or a file is there and `force` is
            false.
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
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    text = source.read_text(encoding="utf-8")
    partial.write_text(
        text.replace(f"+recipe={name} ", f"--config-dir {folder} +recipe={new_name} "), encoding="utf-8"
    )
    partial.replace(target)
    return target
