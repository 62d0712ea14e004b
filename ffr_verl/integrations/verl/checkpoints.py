"""The best checkpoint of a run is kept beside the newest ones, which are all that verl keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from ffr_verl.integrations.verl.checkpoint_folders import keep_best
from ffr_verl.integrations.verl.validation import results_go_to


class BestCheckpoint(CheckpointCallback):  # type: ignore[misc]
    """verl's `trainer.checkpoint_callback_class`: keeps the checkpoint whose validation was best in
    `trainer.default_local_dir/best`, by `trainer.v1.sampler.sampler_kwargs.best_checkpoint`.

    verl saves before it validates, so what a step was worth is known at the next save. The last step is validated
    after the last save: `ffr-verl merge RUN --best METRIC` looks at it too.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        self._folder = Path(str(config.trainer.default_local_dir)).expanduser()
        self._metric = (config.trainer.v1.sampler.get("sampler_kwargs") or {}).get("best_checkpoint")
        results_go_to(self._folder)

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **_: Any) -> None:
        if self._metric is not None and not async_save:
            keep_best(self._folder, str(self._metric))
