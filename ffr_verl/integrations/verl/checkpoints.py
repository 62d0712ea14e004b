"""The best checkpoint of a run is kept beside the newest ones.

verl keeps the newest checkpoints only, and saves before it validates, so what a step was worth is known at the next
save.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from ffr_verl.checkpoints import missing_in_step
from ffr_verl.integrations.verl.validation import read_results, results_go_to

__all__ = ["BEST", "BestCheckpoint", "keep_best"]

logger = logging.getLogger(__name__)

BEST = "best"


class BestCheckpoint(CheckpointCallback):  # type: ignore[misc]
    """verl's `trainer.checkpoint_callback_class`: keeps the checkpoint whose validation was best in
    `trainer.default_local_dir/best`, by `trainer.v1.sampler.sampler_kwargs.best_checkpoint`.

    Files are linked, not copied, where the disk can. The last step is validated after the last save:
    `ffr-verl merge RUN --best METRIC` looks at it too.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        self._folder = Path(str(config.trainer.default_local_dir)).expanduser()
        self._metric = (config.trainer.v1.sampler.get("sampler_kwargs") or {}).get("best_checkpoint")
        results_go_to(self._folder)

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **_: Any) -> None:
        if self._metric is not None and not async_save:
            keep_best(self._folder, str(self._metric))


def keep_best(folder: Path, metric: str) -> int | None:
    """Keep the best of the steps that were validated and are there, in `folder/best/global_step_N`.

    Args:
        folder: `trainer.default_local_dir`.
        metric: of its `validation.json`; the largest value is best, of equals the earlier step.

    Returns:
        Its step; `None` where no validated step is there.
    """
    values = {step: found[metric] for step, found in read_results(folder).items() if metric in found}
    places = {}
    for step in values:
        for place in (folder / BEST / f"global_step_{step}", folder / f"global_step_{step}"):
            if place.is_dir() and not missing_in_step(place, "grpo"):
                places.setdefault(step, place)
    if not places:
        return None
    best = max(places, key=lambda step: (values[step], -step))
    target = folder / BEST / f"global_step_{best}"
    if places[best] != target:
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(places[best], partial, copy_function=_link)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        logger.info("%s %.4f: step %d is the best so far, kept in %s", metric, values[best], best, target)
    for other in (folder / BEST).glob("global_step_*"):
        if other != target:
            shutil.rmtree(other)
    return best


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
