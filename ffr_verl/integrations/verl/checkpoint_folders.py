"""Checkpoints of a run: is the one that it would resume from whole, and which one was best?

verl finds out late that one is not whole, or begins from nothing without a word; and it keeps the newest ones only.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from ffr_verl.errors import FFRError

__all__ = [
    "BEST",
    "CONTENTS",
    "RESULTS",
    "best_checkpoint",
    "check_resume",
    "keep_best",
    "missing_in_step",
    "read_results",
]

logger = logging.getLogger(__name__)

BEST, RESULTS = "best", "validation.json"

# What verl's `checkpoint.load_contents` names, and the start of its files; `hf_model` is not read on resume.
CONTENTS = {"model": "model", "optimizer": "optim", "extra": "extra_state"}

_TRACKER = "latest_checkpointed_iteration.txt"
_SHARD = re.compile(r"(model|optim|extra_state)_world_size_(\d+)_rank_(\d+)\.pt")


def missing_in_step(
    folder: Path,
    stage: Literal["sft", "grpo"],
    *,
    contents: Collection[str] = tuple(CONTENTS),
    all_ranks: bool = True,
) -> list[str]:
    """What a `global_step_N` lacks to resume from: names of files that are missing or cut short.

    Args:
        folder: of the step.
        stage: `grpo` keeps the model in `actor/`.
        contents: what the run loads (verl's `checkpoint.load_contents`); other keys of `CONTENTS` are not looked for.
        all_ranks: whether the shards of every rank must be here; not so when each node has a disk of its own.
    """
    model = folder / "actor" if stage == "grpo" else folder
    data = [folder / "data.pt"] if stage == "grpo" else sorted(folder.glob("data_*.pt")) or [folder / "data_0.pt"]
    shards = {match.group(0): match for path in model.glob("*.pt") if (match := _SHARD.fullmatch(path.name))}
    wanted = list(data)
    world = max([int(match.group(2)) for match in shards.values()], default=1)
    ranks = range(world) if all_ranks else sorted({int(match.group(3)) for match in shards.values()} or {0})
    for kind in [kind for name, kind in CONTENTS.items() if name in contents]:
        wanted += [model / f"{kind}_world_size_{world}_rank_{rank}.pt" for rank in ranks]
    # torch writes a zip archive whose table of contents comes last.
    return [str(path.relative_to(folder)) for path in wanted if not (path.is_file() and zipfile.is_zipfile(path))]


def check_resume(
    folder: Path,
    stage: Literal["sft", "grpo"],
    *,
    contents: Collection[str] = tuple(CONTENTS),
    all_ranks: bool = True,
) -> int | None:
    """The step that a run with `trainer.resume_mode=auto` resumes from; `None` where it begins.

    Args:
        folder: `trainer.default_local_dir`.
        stage: which trainer wrote it.
        contents, all_ranks: see `missing_in_step`.

    Raises:
        FFRError: when the newest checkpoint is not whole; the message names the newest one that is.
    """
    tracker = folder / _TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        found = f"{tracker}: found {text!r}, expected the number of a step: the run was stopped while it wrote it"
    else:
        step = folder / f"global_step_{text}"
        if not step.is_dir():
            found = f"{tracker} names step {text}, and {step} is not there"
        elif missing := missing_in_step(step, stage, contents=contents, all_ranks=all_ranks):
            found = f"{step}: the checkpoint was cut short: {', '.join(missing[:3])} missing or incomplete"
        else:
            return int(text)
    raise FFRError(f"{found}; {_mend(folder, stage, contents, all_ranks=all_ranks)}")


def _mend(folder: Path, stage: Literal["sft", "grpo"], contents: Collection[str], *, all_ranks: bool) -> str:
    numbers = [path.name.removeprefix("global_step_") for path in folder.glob("global_step_*")]
    for number in sorted([int(number) for number in numbers if number.isdecimal()], reverse=True):
        step = folder / f"global_step_{number}"
        if not missing_in_step(step, stage, contents=contents, all_ranks=all_ranks):
            return f"resume from step {number}: echo {number} > {folder / _TRACKER}"
    return f"no step in it is whole: start again with another trainer.default_local_dir, or remove {folder}"


def read_results(folder: Path) -> dict[int, dict[str, float]]:
    """What the validations of a run found (`validation.json`, which `FFRReplayBuffer` writes), by step; empty without.

    Raises:
        FFRError: when the file cannot be read.
    """
    path = folder / RESULTS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {int(step): {str(name): float(value) for name, value in one.items()} for step, one in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise FFRError(f"{path}: not what a training run wrote ({error})") from None


def best_checkpoint(folder: Path, metric: str) -> tuple[int, float, Path]:
    """The best checkpoint of a GRPO run of those that are there, whole and validated.

    Args:
        folder: `trainer.default_local_dir`.
        metric: of `validation.json`; the largest value is best, of equals the earlier step.

    Returns:
        Its step, its value, and its folder.

    Raises:
        FFRError: when there is none; the message says which metrics and steps there are.
    """
    results = read_results(folder)
    places: dict[int, Path] = {}
    for step in [step for step, found in results.items() if metric in found]:
        for place in (folder / BEST / f"global_step_{step}", folder / f"global_step_{step}"):
            if place.is_dir() and not missing_in_step(place, "grpo"):
                places.setdefault(step, place)
    if not places:
        names = sorted({name for found in results.values() for name in found})
        if results and metric not in names:
            raise FFRError(f"{folder / RESULTS}: no {metric!r} in it; it has {', '.join(names)}")
        steps = ", ".join(map(str, sorted(results))) or "none"
        raise FFRError(f"{folder}: no checkpoint of a validated step is there (validated: {steps})")
    step = max(places, key=lambda one: (results[one][metric], -one))
    return step, results[step][metric], places[step]


def keep_best(folder: Path, metric: str) -> int | None:
    """Keep the best checkpoint in `folder/best`, by links where the disk can; another one there is removed.

    Args:
        folder, metric: see `best_checkpoint`.

    Returns:
        Its step; `None` where no validated step is there.
    """
    try:
        step, value, place = best_checkpoint(folder, metric)
    except FFRError as error:
        if read_results(folder):
            logger.warning("the best checkpoint is not kept: %s", error)
        return None
    target = folder / BEST / f"global_step_{step}"
    if place != target:
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(place, partial, copy_function=_link)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        logger.info("%s %.4f: step %d is the best so far, kept in %s", metric, value, step, target)
    for other in (folder / BEST).glob("global_step_*"):
        if other != target:
            shutil.rmtree(other)
    return step


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
