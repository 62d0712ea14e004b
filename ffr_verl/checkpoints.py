"""Is the checkpoint that a run would go on from whole? verl finds out late, or begins anew without a word."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from ffr_verl.errors import FFRError

__all__ = ["CONTENTS", "check_resume", "missing_in_step"]

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
    """What a `global_step_N` lacks to go on from: names of files that are missing or cut short.

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
    """The step that a run with `trainer.resume_mode=auto` goes on from; `None` where it begins.

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
            return f"go on from step {number}: echo {number} > {folder / _TRACKER}"
    return f"no step in it is whole: begin anew with another trainer.default_local_dir, or remove {folder}"
