"""The recipes as files: which there are, where they lie, and copies of them to edit."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from ffr_verl.errors import FFRError

__all__ = ["copy_recipe", "recipe_names", "recipe_path"]


def _folder() -> Path:
    return Path(str(resources.files("ffr_verl.conf"))) / "recipe"


def recipe_names() -> list[str]:
    """Names for `+recipe=NAME`, sorted.

    Example:
        >>> "ffr_grpo" in recipe_names()
        True
    """
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The YAML file of a recipe.

    Raises:
        FFRError: when there is no recipe of that name; the message lists those that exist.
    """
    path = _folder() / f"{name}.yaml"
    if name not in recipe_names():
        raise FFRError(f"no recipe is called {name!r}; there are: {', '.join(recipe_names())}")
    return path


def copy_recipe(name: str, folder: Path, *, force: bool = False) -> list[Path]:
    """Copy a recipe, and those it inherits from, to `folder/recipe/` for editing; returns the files written.

    Run the copy with `--config-dir FOLDER +recipe=NAME`: Hydra looks there before it looks into the package.

    Raises:
        FFRError: when a file is there already and `force` is false; nothing is written then.
    """
    import yaml

    wanted, sources = [name], []
    while wanted:
        path = recipe_path(wanted.pop(0))
        sources.append(path)
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", []):
            if isinstance(entry, str) and entry != "_self_":
                wanted.append(entry)
    targets = [folder / "recipe" / source.name for source in sources]
    existing = [str(target) for target in targets if target.exists()]
    if existing and not force:
        raise FFRError(f"{', '.join(existing)}: there already; give another folder, or --force to replace")
    targets[0].parent.mkdir(parents=True, exist_ok=True)
    for source, target in zip(sources, targets, strict=True):
        shutil.copyfile(source, target)
    return targets
