"""What the replay buffer knows of the answers of a step and verl's own dumps lack, as `STEP.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ffr_verl.files import disk_errors


def write_rollouts(folder: Path, step: int, answers: Iterable[Mapping[str, Any]]) -> None:
    """Add the answers to the folder's file of a step, one a line; verl asks for a validation in several batches.

    An answer has `uid`, as verl's own dump calls it, `dialogue_id`, and whatever else is known of it.
    """
    with disk_errors(folder, "give another sampler_kwargs.dump_dir, or null"):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{step}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(answer, default=_plain) + "\n" for answer in answers)


def _plain(value: Any) -> Any:
    """A number or an array of numpy as Python's own."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
