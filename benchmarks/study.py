"""Does GRPO improve the SFT model, and which order of the rows does it best? Real verl runs on two cores, for hours.

    python -m benchmarks.study --output study --seeds 0 1 2

For each seed a training and a held-out set are drawn, the base model of the package goes through stage 1, scores the
training rows, and goes through stage 2 once for each order. The held-out F1 (the reward's, greedy answers) is what
verl's own validation wrote down; intervals are bootstrapped over the held-out rows, differences paired. A finished run
is kept: the same command goes on where it stopped. Ends with `study.md` and `study.png`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ffr_verl.data.demo import write_demo_set
from ffr_verl.data.parquet_writer import whole_or_nothing
from ffr_verl.demo.processes import run_logged

ORDERS = ("published", "competence", "online", "shuffled")
_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class StudySettings:
    """What every run of the study has in common.

    Attributes:
        train_rows: of the drawn training set.
        heldout_rows: that no stage trains on.
        sft_steps: updates of stage 1, 32 rows each.
        sft_lr: peak learning rate of stage 1.
        grpo_steps: steps of stage 2.
        prompts: of a step, with 8 answers each.
        updates: optimiser steps of a GRPO step.
        grpo_lr: learning rate of stage 2.
        kl: coefficient of the KL term.
        test_every: GRPO steps between two validations.
    """

    train_rows: int = 2048
    heldout_rows: int = 256
    sft_steps: int = 64
    sft_lr: float = 3e-3
    grpo_steps: int = 40
    prompts: int = 16
    updates: int = 2
    grpo_lr: float = 1e-3
    kl: float = 0.001
    test_every: int = 10


def say(text: str) -> None:
    """A line of progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run(command: Sequence[str], log: Path, *, seconds: float, metrics: Path | None = None, cwd: Path) -> None:
    """A command of the pipeline, its output in a log."""
    say(f"$ {shlex.join(command)}")
    environment = {"HF_HUB_OFFLINE": "1", "RAY_DEDUP_LOGS": "0"}
    if metrics is not None:
        metrics.unlink(missing_ok=True)
        environment["VERL_FILE_LOGGER_PATH"] = str(metrics)
    taken = run_logged(
        [sys.executable, "-m", *command],
        log=log,
        on_line=lambda _line: None,
        time_limit=seconds,
        environment=environment,
        cwd=cwd,
    )
    say(f"  {taken:.0f} s")


def prepare_seed(folder: Path, seed: int, settings: StudySettings) -> None:
    """Data, SFT model and difficulty of a seed; what is there is kept."""
    from ffr_verl.demo.base_model import write_base_model

    parquet, logs = folder / "parquet", folder / "logs"
    if not (folder / "base" / "config.json").is_file():
        write_base_model(folder / "base")
    if not (parquet / "heldout.rl.parquet").is_file():
        write_demo_set(
            folder / "data", train_rows=settings.train_rows, heldout_rows=settings.heldout_rows, seed=1000 + seed
        )
        for split in ("train", "heldout"):
            arguments = ["--images-root", str(folder / "data"), "--output", str(parquet), "--split", split]
            run(
                ["ffr_verl", "prepare", str(folder / "data" / f"{split}.json"), *arguments],
                logs / f"prepare_{split}.log",
                seconds=300,
                cwd=folder,
            )
    if not (folder / "sft" / "config.json").is_file():
        shutil.rmtree(folder / "runs" / "sft", ignore_errors=True)
        run(
            [
                "verl.trainer.sft_trainer",
                "+recipe=ffr_sft_cpu",
                f"model.path={folder / 'base'}",
                f"data.train_files={parquet / 'train.sft.parquet'}",
                "data.max_length=1024",
                "data.micro_batch_size_per_gpu=32",
                f"trainer.seed={seed}",
                f"optim.lr={settings.sft_lr}",
                f"trainer.total_training_steps={settings.sft_steps}",
                f"trainer.save_freq={settings.sft_steps}",
                "trainer.logger=[console,file]",
                f"trainer.default_local_dir={folder / 'runs' / 'sft'}",
            ],
            logs / "sft.log",
            seconds=1800,
            metrics=logs / "sft.jsonl",
            cwd=folder,
        )
        run(
            ["ffr_verl", "merge", str(folder / "runs" / "sft"), "--output", str(folder / "sft"), "--force"],
            logs / "merge.log",
            seconds=300,
            cwd=folder,
        )
    if not (folder / "difficulty.parquet").is_file():
        arguments = ["--model", str(folder / "sft"), "--data", str(parquet / "train.rl.parquet")]
        arguments += ["--output", str(folder / "difficulty.parquet"), "--max-model-len", "1024"]
        run(["ffr_verl", "score", *arguments, "--max-new-tokens", "48"], logs / "score.log", seconds=1800, cwd=folder)


def run_grpo(folder: Path, order: str, seed: int, settings: StudySettings) -> None:
    """Stage 2 with an order; a finished run is kept, a cut one is begun anew."""
    place = folder / "runs" / order
    last = place / "validation" / f"{settings.grpo_steps}.jsonl"
    if last.is_file():
        return
    shutil.rmtree(place, ignore_errors=True)
    run(
        [
            "verl.trainer.main_ppo",
            "+recipe=ffr_grpo_cpu",
            f"actor_rollout_ref.model.path={folder / 'sft'}",
            f"data.train_files={folder / 'parquet' / 'train.rl.parquet'}",
            f"data.val_files={folder / 'parquet' / 'heldout.rl.parquet'}",
            f"data.ffr.curriculum.difficulty={folder / 'difficulty.parquet'}",
            f"data.ffr.curriculum.order={order}",
            f"data.ffr.curriculum.seed={seed}",
            "data.max_prompt_length=768",
            "data.max_response_length=48",
            f"data.train_batch_size={settings.prompts}",
            "data.filter_overlong_prompts=false",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={settings.prompts // settings.updates}",
            f"actor_rollout_ref.actor.optim.lr={settings.grpo_lr}",
            f"actor_rollout_ref.actor.kl_loss_coef={settings.kl}",
            f"actor_rollout_ref.rollout.seed={seed}",
            f"trainer.total_training_steps={settings.grpo_steps}",
            "trainer.total_epochs=100",
            "trainer.save_freq=-1",
            f"trainer.test_freq={settings.test_every}",
            "trainer.logger=[console,file]",
            f"trainer.validation_data_dir={place / 'validation'}",
            f"trainer.default_local_dir={place}",
        ],
        folder / "logs" / f"{order}.log",
        seconds=3600,
        metrics=folder / "logs" / f"{order}.jsonl",
        cwd=folder,
    )


def heldout_f1(folder: Path, order: str) -> dict[int, np.ndarray]:
    """F1 of each held-out row at each validated step, the rows in one order."""
    found: dict[int, np.ndarray] = {}
    for file in (folder / "runs" / order / "validation").glob("*.jsonl"):
        answers = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        answers.sort(key=lambda answer: (str(answer["input"]), str(answer["gts"])))
        found[int(file.stem)] = np.array([answer["f1"] for answer in answers])
    return dict(sorted(found.items()))


def interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Mean and the ends of its bootstrap 95 % interval over rows."""
    source = np.random.default_rng(seed)
    means = values[source.integers(0, len(values), (_RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def write_results(root: Path, seeds: Sequence[int], orders: Sequence[str], settings: StudySettings) -> str:
    """The table of what is finished as `study.md`, the curves as `study.png`; returns the table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lines = [
        "| order | seed | after SFT | after GRPO | difference (95 % interval, paired) |",
        "|---|---|---|---|---|",
    ]
    for order, marker in zip(orders, "os^Dv", strict=False):
        curves, gains = [], []
        for seed in seeds:
            values = heldout_f1(root / f"seed_{seed}", order)
            if settings.grpo_steps not in values:
                continue
            before, after = values[0], values[settings.grpo_steps]
            mean, low, high = interval(after - before, seed=seed)
            gains.append(after - before)
            curves.append([float(one.mean()) for one in values.values()])
            first, last = interval(before, seed=seed), interval(after, seed=seed)
            lines.append(
                f"| {order} | {seed} | {first[0]:.3f} ({first[1]:.3f} to {first[2]:.3f}) | {last[0]:.3f} "
                f"({last[1]:.3f} to {last[2]:.3f}) | {mean:+.3f} ({low:+.3f} to {high:+.3f}) |"
            )
        if curves:
            mean, low, high = interval(np.concatenate(gains))
            lines.append(f"| **{order}** | all | | | **{mean:+.3f} ({low:+.3f} to {high:+.3f})** |")
            steps = sorted(heldout_f1(root / f"seed_{seeds[0]}", order))
            axes.plot(steps, np.mean(curves, axis=0), marker=marker, label=f"{order} ({len(curves)} seeds)")
    axes.set_xlabel("GRPO step (0: the SFT model)")
    axes.set_ylabel("held-out F1, mean over seeds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    table = "\n".join(lines) + "\n"
    with whole_or_nothing([root / "study.md", root / "study.png"]) as (text, picture):
        text.write_text(table, encoding="utf-8")
        figure.savefig(picture, format="png")
    return table


def main() -> None:
    """Run what is missing, write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    for name, value in asdict(StudySettings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    root, seeds, orders = given.pop("output").absolute(), given.pop("seeds"), given.pop("orders")
    settings = StudySettings(**given)
    for seed in seeds:
        folder = root / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        prepare_seed(folder, seed, settings)
        for order in orders:
            run_grpo(folder, order, seed, settings)
            say(write_results(root, seeds, orders, settings))


if __name__ == "__main__":
    main()
