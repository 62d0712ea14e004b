"""The recipes as files: which there are, where they lie, copies of them to edit, and what differs between two."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ffr_verl.errors import FFRError, did_you_mean
from ffr_verl.files import read_yaml, whole_or_nothing

__all__ = [
    "Trainer",
    "copy_recipe",
    "differences",
    "leaves",
    "read_recipe",
    "recipe_names",
    "recipe_path",
    "recipe_purpose",
    "trainer_of",
    "unknown_keys",
]

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
        hint = did_you_mean(name, recipe_names())
        raise FFRError(f"no recipe is called {name!r}; {hint}there are: {', '.join(recipe_names())}")
    return _FOLDER / f"{name}.yaml"


def recipe_purpose(name: str) -> str:
    """The first sentence of a recipe's file.

    Example:
        >>> recipe_purpose("ffr_sft_cpu")
        'Stage 1 on CPU: ffr_sft with what the CPU needs, nothing else.'
    """
    lines = recipe_path(name).read_text(encoding="utf-8").splitlines()
    about = itertools.takewhile(lambda line: line.startswith("# "), lines[1:])
    return re.split(r"(?<=\.) (?=[A-Z])", " ".join(line[2:] for line in about))[0]


def read_recipe(file: Path, by: Sequence[Path] = ()) -> dict[str, Any]:
    """What a recipe sets, with what it inherits: recipes of the same folder, else packaged ones; `by` are the files
    that inherit it.

    Raises:
        FFRError: for a file that cannot be read, holds no mapping, or inherits what is not there.
    """
    if file.resolve() in by:
        raise FFRError(f"{file}: inherits itself: {', '.join(path.name for path in by)}")
    found = read_yaml(file, mend="give the YAML file of a recipe")
    if not isinstance(found, dict):
        raise FFRError(f"{file}: found no mapping; give the YAML file of a recipe")
    try:
        json.dumps(found, default=str)
    except (ValueError, RecursionError, TypeError) as error:  # it holds itself, or a number that is not written out
        raise FFRError(f"{file}: {error}; give the YAML file of a recipe") from None
    names = found.pop("defaults", None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FFRError(f"{file}: defaults: found {names!r}, expected a list of recipes and _self_")
    merged: dict[str, Any] = {}
    for name in names if "_self_" in names else [*names, "_self_"]:
        merged = _merged(
            merged, found if name == "_self_" else read_recipe(_inherited(file, name), [*by, file.resolve()])
        )
    return merged


def _inherited(file: Path, name: str) -> Path:
    beside, packaged = file.parent / f"{name}.yaml", _FOLDER / f"{name}.yaml"
    is_name = Path(name).name == name and len(name) < 200
    found = beside if is_name and beside.is_file() else packaged
    if not is_name or not found.is_file():
        raise FFRError(f"{file}: inherits {name}, which is neither beside it nor packaged; bring it there")
    return found


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Key by key, as Hydra merges them; the second one wins."""
    both = {
        name: _merged(first[name], value)
        for name, value in second.items()
        if isinstance(value, Mapping) and isinstance(first.get(name), Mapping)
    }
    return {**first, **second, **both}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys whose values differ, sorted, with both values; `...` where a side does not set the key.

    Example:
        >>> differences({"optim": {"lr": "1e-4"}, "n": 8}, {"optim": {"lr": 0.0001}, "top_p": 0.85})
        [('n', 8, Ellipsis), ('top_p', Ellipsis, 0.85)]
    """
    flat = [dict(leaves(side)) for side in (first, second)]
    keys = sorted({*flat[0], *flat[1]})
    pairs = [(key, flat[0].get(key, ...), flat[1].get(key, ...)) for key in keys]
    return [(key, one, other) for key, one, other in pairs if _number(one) != _number(other)]


def unknown_keys(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Dotted keys of a composed config that neither verl's `defaults` nor any packaged recipe has, where they have
    others: misspelled, perhaps. With each a question that names a near one, or an empty text.

    Example:
        >>> unknown_keys({"trainer": {"total_epoch": 2}}, {"trainer": {"total_epochs": 30}})
        [('trainer.total_epoch', "did you mean 'total_epochs'? ")]
    """
    return list(_unknown_keys(config, [defaults, *[read_recipe(recipe_path(name)) for name in recipe_names()]], ""))


def _unknown_keys(
    node: Mapping[str, Any], known: Sequence[Mapping[str, Any]], place: str
) -> Iterator[tuple[str, str]]:
    for name, value in node.items():
        there = [one[name] for one in known if name in one]
        if not there:
            yield f"{place}{name}", did_you_mean(name, itertools.chain.from_iterable(known))
        elif isinstance(value, Mapping) and all(isinstance(one, Mapping) and one for one in there):
            yield from _unknown_keys(value, there, f"{place}{name}.")


def leaves(node: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values, those of mappings inside included."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a text, Hydra as a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def copy_recipe(name: str, folder: Path, *, new_name: str | None = None, force: bool = False) -> Path:
    """Copy a recipe to `folder/recipe/NEW_NAME.yaml` for editing; recipes that it inherits from stay in the package.

    Run the copy with `--config-dir FOLDER +recipe=NEW_NAME`. It needs a name of its own (`my_NAME` by default): Hydra
    looks into the folder of `--config-dir` last, so a packaged recipe of the same name would silently be taken
    instead. An existing file is replaced with `force` only. Returns the file written.
    """
    source = recipe_path(name)
    new_name = new_name or f"my_{name}"
    if (_FOLDER / f"{new_name}.yaml").is_file():
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
