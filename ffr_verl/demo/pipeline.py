"""`ffr-verl demo`: both training stages on a drawn data set and a tiny Qwen2-VL, by a user's commands.

What a finished command made is kept with a record of the settings, so a second call resumes where the first one ended,
and verl itself resumes a training stage from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ffr_verl.demo.processes import StageFailed, alone_on_the_machine, run_logged
from ffr_verl.demo.stages import (
    NO_FLASH_ATTENTION,
    DemoSettings,
    Stage,
    has_flash_attention,
    installed_stack,
    stages_of,
)
from ffr_verl.errors import FFRError
from ffr_verl.files import whole_or_nothing

# What verl, Ray and vLLM print on the way to the first step, and what it means.
_MILESTONES = (
    ("Started a local Ray instance", "Ray has started, loading the data"),
    ("dataloader initialized", "data loaded, starting the trainer"),
    ("actor and ref model engine initialized", "trainer ready, starting vLLM"),
    ("vLLMHttpServer.*Loading safetensors", "vLLM has the model, warming up"),
    ("checkpoint engine manager initialized", "vLLM ready, answering the held-out rows"),
    ("Initial validation metrics", "first step"),
)
_SHOWN = ("train/loss", "critic/score/mean", "actor/kl_loss", "response_length/mean")


class _Record:
    """Which stages are finished, with which settings and in how many seconds; one JSON file."""

    def __init__(self, path: Path, settings: DemoSettings) -> None:
        self._path = path
        self._settings = dataclasses.asdict(settings)
        self.seconds: dict[str, float] = {}
        self.is_of_other_settings = False
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            self.is_of_other_settings = content["settings"] != self._settings
            if not self.is_of_other_settings:
                self.seconds = content["seconds"]

    def finished(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 1)
        self.write()

    def write(self) -> None:
        content = {"settings": self._settings, "seconds": self.seconds}
        with whole_or_nothing([self._path]) as (temporary,):
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _loading(stage: Stage) -> str:
    """What a stage does before it says anything itself."""
    what = stage.command[stage.command.index("-m") + 1 :]
    if what[0] != "ffr_verl":
        return "loading torch and verl"
    return {
        "merge": "loading torch and the checkpoint",
        "score": "loading the model into vLLM",
        "infer": "loading the model into vLLM",
    }.get(what[1], "reading its files")


def _progress(stage: Stage, live: Live, console: Console) -> Callable[[str], None]:
    """Show the newest step of verl's console log: a line that changes in a terminal, a line now and then elsewhere."""
    started = time.monotonic()
    text_now, printed = _loading(stage), started

    def on_line(line: str) -> None:
        nonlocal text_now, printed
        match = re.search(r"step:(\d+) - (.*)", line)
        if match and match.group(1) != "0":
            values = dict(part.split(":", 1) for part in match.group(2).split(" - ") if ":" in part)
            shown = [
                f"{name.removesuffix('/mean').split('/')[-1]} {float(number[1]):.3f}"
                for name in _SHOWN
                if name in values and (number := re.match(r"(?:np\.\w+\()?([-\d.e]+)", values[name]))
            ]
            text_now = f"step {match.group(1)} of {stage.total_steps}  " + "  ".join(shown)
        for pattern, meaning in _MILESTONES:
            if re.search(pattern, line):
                text_now = meaning
        elapsed = time.monotonic() - started
        text = f"  {stage.name}: {elapsed:4.0f} s  {text_now}"
        if console.is_terminal:
            live.update(Text(text, no_wrap=True, overflow="ellipsis"))
        elif time.monotonic() - printed > 15:
            printed = time.monotonic()
            console.print(text, highlight=False, soft_wrap=True)

    return on_line


def _shown(stage: Stage) -> str:
    return shlex.join([Path(part).name if part == sys.executable else part for part in stage.command])


def _run_stage(stage: Stage, root: Path, console: Console) -> float:
    log = root / "logs" / f"{stage.name.lower().replace(' ', '_')}.log"
    environment = {"RAY_DEDUP_LOGS": "0", "HF_HUB_OFFLINE": "1"}
    if stage.total_steps is not None:
        attempt = len(list(log.parent.glob(f"{log.stem}.metrics.*.jsonl")))
        environment["VERL_FILE_LOGGER_PATH"] = str(log.with_suffix(f".metrics.{attempt}.jsonl"))
    console.print(f"\n$ {_shown(stage)}", style="bold", markup=False, highlight=False, soft_wrap=True)
    is_grpo = "verl.trainer.main_ppo" in stage.command
    alone = alone_on_the_machine(
        lambda text: console.print(f"  {text}", markup=False, highlight=False, soft_wrap=True)
    )
    with (
        alone if is_grpo else contextlib.nullcontext(),
        Live(console=console, refresh_per_second=4, transient=True) as live,
    ):
        try:
            seconds = run_logged(
                stage.command,
                log=log,
                on_line=_progress(stage, live, console),
                time_limit=stage.time_limit,
                environment=environment,
            )
        except StageFailed as error:
            raise StageFailed(f"the stage {stage.name} {error}") from None
    if not stage.makes.exists():
        raise StageFailed(f"the stage {stage.name} ended well but did not make {stage.makes}; its output is in {log}")
    console.print(f"  {stage.name}: done in {seconds:.0f} s, log {log}", highlight=False, markup=False)
    return seconds


def print_commands(root: Path, settings: DemoSettings, console: Console) -> None:
    """What `run_demo` would run, a command a line."""
    for stage in stages_of(root.absolute(), settings, flash_attention=has_flash_attention()):
        console.print(_shown(stage), markup=False, highlight=False, soft_wrap=True)


def run_demo(root: Path, settings: DemoSettings, *, restart: bool, console: Console) -> None:
    """Run below the folder `root` what is not finished yet and print the table.

    All is done again with other settings than last time, and where `restart` says so. `StageFailed` names the log of
    a command that failed; an `FFRError` says that `root` holds files of something else.
    """
    if installed_stack() != settings.stack:
        wanted = settings.stack
        raise FFRError(f"the vLLM that is installed is not of the {wanted} stack: make demo STACK={wanted}")
    root = root.absolute()
    path = root / "record.json"
    if root.exists() and not path.is_file() and any(root.iterdir()):
        raise FFRError(f"{root}: holds files that the demo did not make; give another --output, or an empty folder")
    record = _Record(path, settings)
    if restart or record.is_of_other_settings:
        for name in ("data", "parquet", "models", "runs", "logs", "heldout"):
            shutil.rmtree(root / name, ignore_errors=True)
        for page in ("report.html", "run.html"):
            (root / page).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        record = _Record(path, settings)
    record.write()
    if settings.stack == "gpu" and not has_flash_attention():
        console.print(NO_FLASH_ATTENTION, markup=False, highlight=False, soft_wrap=True)

    if "make data and model" not in record.seconds:
        from transformers.utils import logging as transformers_logging

        from ffr_verl.data.demo import write_demo_set
        from ffr_verl.demo.base_model import write_base_model

        started = time.monotonic()
        console.print("Drawing the data set and building the tiny Qwen2-VL", highlight=False)
        rows = {"train_rows": settings.train_rows, "heldout_rows": settings.heldout_rows}
        write_demo_set(root / "data", **rows)
        transformers_logging.disable_progress_bar()
        write_base_model(root / "models" / "base")
        record.finished("make data and model", time.monotonic() - started)
    for stage in stages_of(root, settings, flash_attention=has_flash_attention()):
        if stage.name in record.seconds and stage.makes.exists():
            console.print(f"  {stage.name}: finished before ({record.seconds[stage.name]:.0f} s)", highlight=False)
            continue
        record.finished(stage.name, _run_stage(stage, root, console))
    _print_results(root, record, console)


# What the table shows, and where it stands in a result of `ffr-verl evaluate --json`.
_FIGURES = (
    ("micro F1, joint", ("micro", "joint", "f1")),
    ("micro F1, utterances", ("micro", "utterance", "f1")),
    ("micro F1, images", ("micro", "image", "f1")),
    ("MCC, joint", ("micro", "joint", "mcc")),
    ("MCC, utterances", ("micro", "utterance", "mcc")),
    ("MCC, images", ("micro", "image", "mcc")),
    ("macro F1 of the published reward", ("rewards", "f1")),
    ("macro F1, gold with utterances", ("macro_where_gold", "utterance")),
    ("macro F1, gold with images", ("macro_where_gold", "image")),
    ("utterances named a row", ("answers", "utterances")),
    ("images named per row", ("answers", "images")),
    ("empty answers", ("answers", "empty")),
    ("malformed", ("answers", "malformed")),
    ("ids outside the dialogue", ("answers", "outside")),
)


def _figure(values: Any, path: Sequence[str]) -> Any:
    return functools.reduce(operator.getitem, path, values)


def _columns(first: str, *numbers: str) -> Table:
    table = Table(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _print_results(root: Path, record: _Record, console: Console) -> None:
    measured = {name: json.loads((root / "heldout" / f"{name}.json").read_bytes()) for name in ("sft", "grpo")}
    nothing_read = {
        name: found["answers"]["malformed"] == 1.0 and not found["micro"]["joint"]["recall"]
        for name, found in measured.items()
    }
    comparison = measured["grpo"]["comparison"]
    table = _columns("", "after SFT", "after GRPO", "GRPO less SFT")
    for label, place in _FIGURES:
        values = {name: _figure(found, place) for name, found in measured.items()}
        difference = _figure(comparison["difference"], place)
        least, most = _figure(comparison["intervals"], place)
        gold = measured["sft"][place[0]].get(f"gold_{place[1]}") if place[0] == "answers" else None
        table.add_row(
            label if gold is None else f"{label} (gold {gold:.2f})",
            *["no answers" if nothing_read[name] else f"{value:.3f}" for name, value in values.items()],
            f"{difference:+.3f} ({least:+.3f} to {most:+.3f})",
            end_section=label in ("MCC, images", "macro F1, gold with images"),
        )
    console.print(
        "\nHeld-out rows, greedy answers. Published metric (micro) first; paired bootstrap 95 % intervals:",
        highlight=False,
    )
    console.print(table)
    times = _columns("stage", "seconds")
    for name, seconds in record.seconds.items():
        times.add_row(name, f"{seconds:.0f}")
    times.add_row("[bold]all[/bold]", f"[bold]{sum(record.seconds.values()):.0f}[/bold]")
    console.print(times)
    for label, path in (
        ("report, to look at in a browser", root / "report.html"),
        ("the run: its curves, its answers in groups", root / "run.html"),
        ("SFT model", root / "models" / "sft"),
        ("GRPO model", root / "models" / "grpo"),
        ("rollouts with rewards", root / "runs" / "grpo" / "rollouts"),
        ("logs", root / "logs"),
    ):
        console.print(f"{label}: {path}", highlight=False, markup=False, soft_wrap=True)
