"""A trainer's command run as a user runs it, and what it left."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ffr_verl.demo.processes import run_logged

__all__ = ["SFT_STEPS", "Stage", "answers_by_row", "run_stage"]

SFT_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a finished command left."""

    metrics: list[dict[str, Any]]
    log: str
    checkpoints: Path
    tensorboard: Path

    def values(self, key: str) -> list[float]:
        return [float(entry["data"][key]) for entry in self.metrics if key in entry["data"]]


def run_stage(name: str, folder: Path, arguments: Sequence[str], *, seconds: float) -> Stage:
    """Run a trainer as a command; its environment says nothing of a platform: the recipe does."""
    metrics, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    for variable in ("VERL_PLATFORM", "VERL_ENGINE_DEVICE", "RANK", "WORLD_SIZE", "MASTER_PORT"):
        os.environ.pop(variable, None)
    run_logged(
        [
            sys.executable,
            "-m",
            *arguments,
            f"trainer.default_local_dir={folder / name}",
            "trainer.logger=[console,file,tensorboard]",
        ],
        log=log,
        on_line=lambda _line: None,
        time_limit=seconds,
        environment={
            "VERL_FILE_LOGGER_PATH": str(metrics),
            "TENSORBOARD_DIR": str(folder / f"{name}.tensorboard"),
            "HF_HUB_OFFLINE": "1",
            "RAY_DEDUP_LOGS": "0",
        },
        cwd=folder,
    )
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    return Stage(entries, log.read_text(), folder / name, folder / f"{name}.tensorboard")


def answers_by_row(file: Path, data: Path) -> dict[int, list[dict[str, Any]]]:
    """The answers of a step's rollouts by the number of their row in `data`; the prompt tells which it is."""
    prompts = [row[-1]["content"].replace("<image>", "") for row in pq.read_table(data).column("prompt").to_pylist()]
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for line in file.read_text().splitlines():
        answer = json.loads(line)
        found[next(row for row, prompt in enumerate(prompts) if prompt in answer["input"])].append(answer)
    return dict(found)
