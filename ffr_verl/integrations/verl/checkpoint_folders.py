"""Checkpoints of a run: is the one that it would resume from whole, and which one was best?

verl finds out late that one is not whole, or begins from nothing without a word; and it keeps the newest ones only.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from ffr_verl.errors import FFRError
from ffr_verl.files import refuse_special

logger = logging.getLogger(__name__)

Stage = Literal["sft", "grpo"]
RESULTS = "validation.json"
# What verl's `checkpoint.load_contents` names, and the start of its files; `hf_model` is not read on resume.
CONTENTS = {"model": "model", "optimizer": "optim", "extra": "extra_state"}
SHARD = re.compile(r"(model|optim|extra_state)_world_size_(\d+)_rank_(\d+)\.pt")


def steps_of(folder: Path) -> list[tuple[int, Path]]:
    """Numbers and folders of the steps that a run has saved, the newest first."""
    names = [(path.name.removeprefix("global_step_"), path) for path in folder.glob("global_step_*")]
    return sorted([(int(number), path) for number, path in names if number.isdecimal()], reverse=True)


def missing_in_step(
    folder: Path, stage: Stage, *, contents: Collection[str] = tuple(CONTENTS), all_ranks: bool = True
) -> list[str]:
    """What a `global_step_N` lacks to resume from: names of files that are missing or cut short.

    `contents` is what the run loads (verl's `checkpoint.load_contents`); other keys of `CONTENTS` are not looked for.
    `all_ranks`: whether the shards of every rank must be here; not so when each node has a disk of its own.
    """
    model = folder / "actor" if stage == "grpo" else folder
    data = [folder / "data.pt"] if stage == "grpo" else sorted(folder.glob("data_*.pt")) or [folder / "data_0.pt"]
    shards = _shards(model)
    world = max([int(match.group(2)) for match in shards], default=1)
    ranks = range(world) if all_ranks else sorted({int(match.group(3)) for match in shards} or {0})
    for kind in [kind for name, kind in CONTENTS.items() if name in contents]:
        data += [model / f"{kind}_world_size_{world}_rank_{rank}.pt" for rank in ranks]
    # torch writes a zip archive whose table of contents comes last.
    return [str(path.relative_to(folder)) for path in data if not (path.is_file() and zipfile.is_zipfile(path))]


def _shards(model: Path) -> list[re.Match[str]]:
    """The shards' names, taken apart."""
    return [match for path in sorted(model.glob("*.pt")) if (match := SHARD.fullmatch(path.name))]


def check_resume(
    folder: Path,
    stage: Stage,
    *,
    contents: Collection[str] = tuple(CONTENTS),
    all_ranks: bool = True,
    ranks: int | None = None,
) -> int | None:
    """The step that a run of so many `ranks` with `trainer.resume_mode=auto` resumes from; `None` where it begins.

    An `FFRError` when the newest checkpoint of `folder` (`trainer.default_local_dir`) is not whole, with the newest
    one that is, or was written by another number of ranks. The other arguments are those of `missing_in_step`.
    """
    tracker = folder / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None

    def missing_in(step: Path) -> list[str]:
        return missing_in_step(step, stage, contents=contents, all_ranks=all_ranks)

    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        found = f"{tracker}: found {text!r}, expected the number of a step: the run was stopped while it wrote it"
    else:
        step = folder / f"global_step_{text}"
        if not step.is_dir():
            found = f"{tracker} names step {text}, and {step} is not there"
        elif missing := missing_in(step):
            found = f"{step}: the checkpoint was cut short: {', '.join(missing[:3])} missing or incomplete"
        else:
            written = {int(shard.group(2)) for shard in _shards(step / "actor" if stage == "grpo" else step)}
            if ranks is not None and written and ranks not in written:
                raise FFRError(
                    f"{step}: written by {max(written)} ranks, and this run has {ranks}; verl resumes with as many "
                    f"only: give {max(written)} (trainer.nnodes x trainer.n_gpus_per_node, or torchrun's), or another "
                    "trainer.default_local_dir and, as the model's path, what `ffr-verl merge` makes of it"
                )
            return int(text)
    for number, step in steps_of(folder):
        if not missing_in(step):
            raise FFRError(f"{found}; resume from step {number}: echo {number} > {tracker}")
    raise FFRError(
        f"{found}; no step in it is whole: start again with another trainer.default_local_dir, or remove {folder}"
    )


def read_results(folder: Path) -> dict[int, dict[str, float]]:
    """What the validations of a run found (`validation.json`, which `FFRReplayBuffer` writes), by step; empty without,
    an `FFRError` when the file cannot be read."""
    path = folder / RESULTS
    refuse_special(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {int(step): {str(name): float(value) for name, value in one.items()} for step, one in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        raise FFRError(f"{path}: not what a training run wrote ({error})") from None


def best_checkpoint(folder: Path, metric: str) -> tuple[int, float, Path]:
    """Step, value and folder of the best checkpoint of a GRPO run, of those that are there, whole and validated.

    The largest value of `metric` is best, of equals the earlier step. Where there is none an `FFRError` says which
    metrics and steps there are.
    """
    results = read_results(folder)
    places: dict[int, Path] = {}
    for step in [step for step, found in results.items() if math.isfinite(found.get(metric, math.nan))]:
        for place in (folder / f"global_step_{step}", folder / "best" / f"global_step_{step}"):
            if place.is_dir() and not missing_in_step(place, "grpo"):
                places[step] = place
    if not places:
        names = sorted({name for found in results.values() for name in found})
        if results and metric not in names:
            raise FFRError(f"{folder / RESULTS}: no {metric!r} in it; it has {', '.join(names)}")
        steps = ", ".join(map(str, sorted(results))) or "none"
        raise FFRError(f"{folder}: no checkpoint of a validated step is there (validated: {steps})")
    step = max(places, key=lambda one: (results[one][metric], -one))
    return step, results[step][metric], places[step]


def keep_best(folder: Path, metric: str) -> int | None:
    """Keep the best checkpoint in `folder/best`, by links where the disk can, and remove another one there. Returns
    its step; `None` where no validated step is there."""
    try:
        step, value, place = best_checkpoint(folder, metric)
    except FFRError as error:
        if any(read_results(folder)):  # a first save comes before the validation of its step, after that of step 0
            logger.warning("the best checkpoint is not kept: %s", error)
        return None
    target = folder / "best" / f"global_step_{step}"
    if place != target:
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(place, partial, copy_function=_link)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        logger.info("%s %.4f: step %d is the best so far, kept in %s", metric, value, step, target)
    for other in target.parent.glob("global_step_*"):
        if other != target:
            shutil.rmtree(other)
    return step


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
