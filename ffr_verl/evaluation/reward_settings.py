"""The settings of the rewards that a run was trained with, out of its recipe or the configuration that Hydra keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ffr_verl.errors import FFRError
from ffr_verl.files import refuse_special
from ffr_verl.recipes import recipe_path
from ffr_verl.rewards.ffr import RewardConfig

__all__ = ["read_reward_kwargs"]

_RELATIVE = "relative paths in it start at the current folder, as in a run of verl"
_PLACE = ("reward", "custom_reward_function", "reward_kwargs")


def read_reward_kwargs(path: Path) -> dict[str, Any]:
    """The `reward_kwargs` of a file, checked.

    Args:
        path: YAML: a recipe (those that it inherits from are read too), `.hydra/config.yaml` of a run, or the
            `reward_kwargs` alone; or the folder of a run, which holds `.hydra/config.yaml`. Relative paths in it start
            at the current folder, as they do in a run.

    Raises:
        FFRError: when it cannot be read, has none, or they are refused by `RewardConfig`.
    """
    file = path / ".hydra" / "config.yaml" if path.is_dir() else path
    kwargs = _kwargs_of(file)
    if not kwargs:
        raise FFRError(f"{file}: no {'.'.join(_PLACE)}; give a recipe, a run's .hydra/config.yaml, or them alone")
    try:
        RewardConfig.from_kwargs(kwargs)
    except FFRError as error:
        relative = [] if "embeddings" not in kwargs and "components" not in kwargs else [_RELATIVE]
        raise FFRError("\n".join([f"{file}: {line}" for line in [*str(error).split("\n"), *relative]])) from None
    return kwargs


def _kwargs_of(file: Path) -> dict[str, Any]:
    refuse_special(file)
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise FFRError(f"--reward-kwargs {file}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(found, Mapping):
        raise FFRError(f"--reward-kwargs {file}: found no mapping; give YAML such as length_penalty: 0.95")
    places = [_at(found, _PLACE[start:]) for start in range(len(_PLACE))]
    own = next((place for place in places if place is not None), None)
    if own is None and not {"reward", "defaults"} & set(found):
        return dict(found)  # they stand alone
    kwargs: dict[str, Any] = {}
    for name in [name for name in found.get("defaults") or () if name != "_self_"]:
        if isinstance(name, str):
            kwargs = _merged(kwargs, _kwargs_of(_inherited(file, name)))
    return _merged(kwargs, {} if own is None else own)


def _at(found: Any, path: tuple[str, ...]) -> Mapping[str, Any] | None:
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else None


def _inherited(file: Path, name: str) -> Path:
    for folder in (file.parent, recipe_path("ffr_grpo").parent):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise FFRError(f"--reward-kwargs {file}: inherits {name}, which is not there; give the run's .hydra/config.yaml")


def _merged(kwargs: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Key by key, as Hydra merges them."""
    both = {name: {**(kwargs.get(name) or {}), **(more.get(name) or {})} for name in ("weights", "components")}
    return {**kwargs, **more, **{name: values for name, values in both.items() if values}}
