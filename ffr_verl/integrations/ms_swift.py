"""What a file of `swift ... --external_plugins FILE` calls. Run with ms-swift 4.6.0."""

from __future__ import annotations

from typing import Any

from ffr_verl.errors import FFRError
from ffr_verl.rewards.batch import BatchReward


def register(*rewards: BatchReward) -> None:
    """Make rewards of `ffr_verl.rewards.batch` known as `ffr_NAME` to `--reward_funcs`; on the curves each is NAME."""
    try:
        from swift.rewards import ORM, orms
    except ImportError:
        raise FFRError("ms-swift is not installed: pip install ms-swift, see docs/other_trainers.md") from None

    class Reward(ORM):
        def __call__(self, completions: Any, **columns: Any) -> list[float]:
            return self.reward(completions, **columns)

    for reward in rewards:
        orms[f"ffr_{reward.__name__}"] = type(reward.__name__, (Reward,), {"reward": staticmethod(reward)})


def keep_columns() -> None:
    """Let `swift infer --remove_unused_columns false` write `dialogue_id`. Without this ms-swift 4.6 hands the columns
    to the model, too, which refuses them ("model_kwargs are not used by the model")."""
    from swift.template import Template

    plain = Template.__init__

    def only_in_the_rows(self: Any, *args: Any, **settings: Any) -> None:
        plain(self, *args, **{**settings, "remove_unused_columns": True})

    Template.__init__ = only_in_the_rows
