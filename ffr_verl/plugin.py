"""The entry point of group `verl.plugins`: `import verl` imports this module, in every process that uses verl.

It adds the recipes to Hydra's search path, makes the CPU platform known and adds the reward manager `ffr` to verl's
registry. None of them changes a job that does not ask for it. verl logs a failing plugin at DEBUG only, and then
`+recipe=ffr_grpo` would silently be a plain value, so a failure here is a WARNING that names the cause.
"""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

logger = logging.getLogger(__name__)

_CPU_RECIPE = re.compile(r"\+{1,2}recipe=\[?.*ffr_\w+_cpu\]?")  # a copy's name too: my_ffr_grpo_cpu


def _register_recipes() -> None:
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class FFRRecipes(SearchPathPlugin):
        """Appends the packaged recipes, so that folders of the user and of verl come first."""

        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append(provider="ffr-verl", path="pkg://ffr_verl.conf")

    Plugins.instance().register(FFRRecipes)


def _register_platform() -> None:
    from ffr_verl.integrations.verl import cpu_platform

    # verl looks for an accelerator, and warns where there is none, before the callback of a recipe runs.
    if any(map(_CPU_RECIPE.fullmatch, sys.argv[1:])):
        cpu_platform.activate()


def _register_reward_manager() -> None:
    # verl's registry comes with its whole reward loop, three seconds to import: ours waits until somebody needs it.
    from wrapt import register_post_import_hook

    def add(_registry: Any) -> None:
        from ffr_verl.integrations.verl import reward_manager  # noqa: F401  # importing it registers it

    register_post_import_hook(add, "verl.experimental.reward_loop.reward_manager")


def register() -> None:
    """Register recipes and platform once a process; what fails is a WARNING with its cause and what is lost by it."""
    for step, loss in (
        (_register_recipes, "+recipe=ffr_... will not be found"),
        (_register_platform, "the *_cpu recipes and VERL_PLATFORM=cpu will not work"),
        (_register_reward_manager, "reward.reward_manager.name=ffr will be unknown"),
    ):
        try:
            step()
        except Exception as error:  # noqa: BLE001  # verl would hide whatever it is
            logger.warning(
                "ffr-verl plugin: %s failed with %s: %s; %s. `ffr-verl doctor` tells more.",
                step.__name__.lstrip("_"),
                type(error).__name__,
                error,
                loss,
            )


register()
