"""The settings of the rewards that a run was trained with, out of its recipe or the configuration that Hydra keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ffr_verl.errors import FFRError
from ffr_verl.recipes import read_recipe
from ffr_verl.rewards.config import REWARD_NODES, RewardConfig, reward_node

_RELATIVE = "relative paths in it start at the current folder, as in a run of verl"


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
    try:
        found = read_recipe(file)
    except FFRError as error:
        raise FFRError(f"--reward-kwargs {error}") from None
    is_whole = not {"reward", "data", "trainer", "custom_reward_function"}.isdisjoint(found)
    reward = found["reward"] if isinstance(found.get("reward"), Mapping) else found
    node = reward_node(reward)
    places = [one for place in ([node] if node else REWARD_NODES) if (one := _at(reward, place))]
    kwargs = places[0] if places else {} if is_whole else found
    if not kwargs:
        what = f"reward.{node or REWARD_NODES[0]}"
        raise FFRError(f"{file}: no {what}; give a recipe, a run's .hydra/config.yaml, or them alone")
    try:
        RewardConfig.from_kwargs(kwargs)
    except FFRError as error:
        relative = [] if "embeddings" not in kwargs and "components" not in kwargs else [_RELATIVE]
        raise FFRError("\n".join([f"{file}: {line}" for line in [*str(error).split("\n"), *relative]])) from None
    return kwargs


def _at(found: Any, place: str) -> dict[str, Any]:
    for name in place.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}
