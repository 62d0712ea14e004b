"""A trainer's command run as a user runs it, and what it left."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from ffr_verl.demo.processes import run_logged
from ffr_verl.integrations.verl.training_rows import TrainingRows
from ffr_verl.samplers import CurriculumConfig, CurriculumSampler
from ffr_verl.settings import OnlineConfig

__all__ = [
    "ONLINE_ANSWERS",
    "ONLINE_BATCH",
    "ONLINE_SEED",
    "ONLINE_STEPS",
    "SFT_STEPS",
    "Stage",
    "answers_by_row",
    "check_steps",
    "is_written",
    "latest",
    "online_sampler",
    "run_stage",
    "stop_when",
]

SFT_STEPS = 60
# Of the runs that are stopped and resumed: `online_arguments`.
ONLINE_STEPS, ONLINE_BATCH, ONLINE_ANSWERS, ONLINE_SEED = 4, 8, 4, 5


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a finished command left."""

    metrics: list[dict[str, Any]]
    log: str
    checkpoints: Path
    tensorboard: Path

    def values(self, key: str) -> list[float]:
        return [float(entry["data"][key]) for entry in self.metrics if key in entry["data"]]


def run_stage(
    name: str,
    folder: Path,
    arguments: Sequence[str],
    *,
    seconds: float,
    launcher: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Stage:
    """Run a trainer as a command; its environment says nothing of a platform: the recipe does."""
    metrics, log = folder / f"{name}.jsonl", folder / f"{name}.log"
    for variable in ("VERL_PLATFORM", "VERL_ENGINE_DEVICE", "RANK", "WORLD_SIZE", "MASTER_PORT"):
        os.environ.pop(variable, None)
    run_logged(
        [
            *launcher,
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
            **(environment or {}),
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


def online_sampler(data: Path, difficulty: Path) -> CurriculumSampler:
    """The curriculum of `online_arguments` without a run."""
    config = CurriculumConfig(
        order="online", seed=ONLINE_SEED, difficulty=str(difficulty), online=OnlineConfig(metric="reward")
    )
    rows = TrainingRows.of(datasets.Dataset.from_parquet(str(data)), config, [str(data)])
    return CurriculumSampler(rows.difficulty, config)


def check_steps(
    stage: Stage, sampler: CurriculumSampler, rollouts: Path, data: Path, *, logged_from: int = 1
) -> set[int]:
    """Each step's rows, and its curves of curriculum and reward, are those of a run of the sampler alone, which is
    told the rewards that the real run wrote down; returns the rows. The log of a resumed run begins with a later step.
    """
    rows = set[int]()
    for step in range(1, ONLINE_STEPS + 1):
        drawn = [sampler.row_at((step - 1) * ONLINE_BATCH + place) for place in range(ONLINE_BATCH)]
        found = answers_by_row(rollouts / f"{step}.jsonl", data)
        wanted = {row: ONLINE_ANSWERS * count for row, count in Counter(drawn).items()}
        assert {row: len(group) for row, group in found.items()} == wanted, f"rows of step {step}"
        rows |= set(drawn)
        metrics = sampler.update({row: float(np.std([one["score"] for one in group])) for row, group in found.items()})
        metrics["ffr/reward/score/mean"] = float(np.mean([one["score"] for group in found.values() for one in group]))
        if step >= logged_from:
            logged = next(
                entry["data"] for entry in stage.metrics if entry["step"] == step and "actor/loss" in entry["data"]
            )
            assert {name: logged[name] for name in metrics} == pytest.approx(metrics, abs=1e-5)
    return rows


def stop_when(condition: Callable[[], bool], signal_number: int, *, named: str = "") -> threading.Event:
    """Signal every process that this one has started, of a title with `named` in it, as soon as the condition holds;
    the event tells that it was done."""
    done = threading.Event()

    def started() -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if named in "".join(process.cmdline()[:1]):
                    found.append(process)
        return found

    def watch() -> None:
        # Listed beforehand: while a list is made, the trainer goes on, and a checkpoint takes a tenth of a second.
        processes, listed = started(), time.monotonic()
        deadline = listed + 300
        while time.monotonic() < deadline:
            if condition():
                for newer in (False, True):
                    for process in {*started()} - {*processes} if newer else processes:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            process.send_signal(signal_number)
                            done.set()
                return
            time.sleep(0.002)
            if time.monotonic() > listed + 2:
                processes, listed = started(), time.monotonic()

    threading.Thread(target=watch, daemon=True).start()
    return done


def is_written(rollouts: Path) -> bool:
    """Whether all answers of the first step stand in verl's dump of them."""
    file = rollouts / "1.jsonl"
    return file.is_file() and file.read_bytes().count(b"\n") == ONLINE_BATCH * ONLINE_ANSWERS


def latest(checkpoints: Path) -> str:
    file = checkpoints / "latest_checkpointed_iteration.txt"
    return file.read_text() if file.is_file() else ""
