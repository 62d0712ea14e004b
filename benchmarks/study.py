"""Does GRPO improve the SFT model by the published metric, and which of its parts does it? Real verl runs on two
cores, for hours.

    python -m benchmarks.study --output study --seeds 0 1 2 --arms default published

For each seed a training and a held-out set are drawn, the base model of the package goes through stage 1, scores the
training rows, and goes through stage 2 once for each arm. The answers are those of verl's own validation (greedy);
`ffr_verl.evaluation` makes micro F1 and MCC of them, and intervals of the paired difference to the SFT model. A
finished run is kept: the same command resumes where it stopped. Writes `study.jsonl` (a line for each arm, seed and
metric, at the last step), `study_curves.jsonl` (at every validated step), `study.md` and `study.png`. Runs that
`study_curves.jsonl` holds are finished, whether their folders are there or not: a copy of that file in a new output
folder goes on where another machine stopped, with a new SFT model for a seed, whose figures each line has.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ffr_verl.data.demo import write_demo_set
from ffr_verl.demo.processes import run_logged
from ffr_verl.evaluation.bootstrap import BootstrapSettings, interval, resampled_metrics
from ffr_verl.evaluation.counts import RowCounts
from ffr_verl.evaluation.result import count_records, result_of
from ffr_verl.evaluation.row_statistics import nested
from ffr_verl.files import whole_or_nothing
from ffr_verl.predictions import read_verl_dump

_REWARD, _CURRICULUM = "reward.custom_reward_function.reward_kwargs", "data.ffr.curriculum"
_SHUFFLED = (f"{_CURRICULUM}.order=shuffled", f"{_CURRICULUM}.strata=null")
_ADVANTAGE = "trainer.v1.sampler.sampler_kwargs.advantage"

# What each arm changes: a recipe, and overrides of it.
ARMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "default": ("ffr_grpo_cpu", ()),
    "default, fewer steps": ("ffr_grpo_cpu", ()),
    "shuffled": ("ffr_grpo_cpu", _SHUFFLED),
    "published": ("ffr_grpo_published_cpu", ()),
    "published, shuffled": ("ffr_grpo_published_cpu", _SHUFFLED),
    "strata alone": ("ffr_grpo_published_cpu", (f"{_CURRICULUM}.order=competence", f"{_CURRICULUM}.strata=gold")),
    "micro reward alone": ("ffr_grpo_cpu", (*_SHUFFLED, f"{_ADVANTAGE}.credit=answer")),
    "gdpo alone": ("ffr_gdpo_cpu", _SHUFFLED),
    "gdpo, micro reward": (
        "ffr_gdpo_cpu",
        (
            *_SHUFFLED,
            f"{_REWARD}.f1_mode=micro_f1_mcc",
            *(f"~{_ADVANTAGE}.components.f1_{kind}" for kind in ("utterances", "images")),
            *(f"+{_ADVANTAGE}.components.f1_micro_{kind}=0.5" for kind in ("utterances", "images")),
        ),
    ),
    "shuffled, strata": ("ffr_grpo_cpu", (f"{_CURRICULUM}.order=shuffled",)),
    "competence": ("ffr_grpo_cpu", (f"{_CURRICULUM}.order=competence",)),
    "group filter": ("ffr_grpo_cpu", ("algorithm.filter_groups.enable=true",)),
    "group filter by f1": (
        "ffr_grpo_cpu",
        ("algorithm.filter_groups.enable=true", "algorithm.filter_groups.metric=f1"),
    ),
    "one update a step": ("ffr_grpo_cpu", ("actor_rollout_ref.actor.ppo_mini_batch_size=16",)),
    "four updates a step": ("ffr_grpo_cpu", ("actor_rollout_ref.actor.ppo_mini_batch_size=4",)),
    "constant lr": ("ffr_grpo_cpu", ("actor_rollout_ref.actor.optim.lr_scheduler_type=constant",)),
    "lr x 2": ("ffr_grpo_cpu", ("actor_rollout_ref.actor.optim.lr=1e-3",)),
}
# Arms that make fewer steps, as a share of the others'; the learning rate ends with them.
SHORTER: Mapping[str, float] = {"default, fewer steps": 2 / 3}
# What a plain call runs.
FIRST = (
    "default",
    "default, fewer steps",
    "shuffled",
    "published",
    "strata alone",
    "micro reward alone",
    "gdpo alone",
)
METRICS = (
    ("micro", "joint", "f1"),
    ("micro", "joint", "mcc"),
    ("micro", "utterance", "f1"),
    ("micro", "image", "f1"),
    ("micro", "utterance", "mcc"),
    ("micro", "image", "mcc"),
    ("macro", "joint", "f1"),
    ("macro_where_gold", "utterance"),
    ("macro_where_gold", "image"),
    ("rewards", "f1"),
    ("answers", "outside"),
    ("answers", "malformed"),
    ("answers", "empty"),
    ("answers", "utterances"),
    ("answers", "images"),
)
# What the table shows.
_COLUMNS = {
    "micro joint F1": "micro_joint_f1",
    "micro joint MCC": "micro_joint_mcc",
    "micro utterance F1": "micro_utterance_f1",
    "micro image F1": "micro_image_f1",
    "macro F1, gold with utterances": "macro_where_gold_utterance",
    "macro F1, gold with images": "macro_where_gold_image",
    "macro F1 of the published reward": "rewards_f1",
}
# What the short table shows: gains by seed.
_GAINS = ("micro joint F1", "micro image F1", "micro utterance F1", "macro F1 of the published reward")
# What a further table shows, by seed: of the answers of the SFT model and after GRPO, with the number's format.
_NAMED = {
    "images a row": ("answers_images", ".2f"),
    "utterances a row": ("answers_utterances", ".2f"),
    "empty answers": ("answers_empty", ".0%"),
    "malformed": ("answers_malformed", ".1%"),
    "with ids outside": ("answers_outside", ".1%"),
}
_BOOTSTRAP = BootstrapSettings(resamples=2000)
_ANSWERS = 8  # of a prompt


def _option(default: float, about: str) -> Any:
    return field(default=default, metadata={"help": f"{about} (default: %(default)s)"})


@dataclass(frozen=True, slots=True)
class StudySettings:
    """What every run of the study has in common."""

    train_rows: int = _option(2048, "rows of the drawn training set")
    heldout_rows: int = _option(512, "rows that no stage trains on")
    sft_steps: int = _option(64, "updates of stage 1, 32 rows each")
    sft_lr: float = _option(3e-3, "peak learning rate of stage 1")
    grpo_steps: int = _option(84, "steps of stage 2")
    prompts: int = _option(16, f"prompts of a step of stage 2, with {_ANSWERS} answers each")
    updates: int = _option(2, "updates of a step of stage 2")
    grpo_lr: float = _option(5e-4, "learning rate of stage 2")
    kl: float = _option(0.001, "coefficient of the KL term")
    test_every: int = _option(14, "steps of stage 2 between two validations")


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
            arguments = ["--images-root", str(folder / "data"), "--output", str(parquet), "--split", split, "--force"]
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


def run_grpo(folder: Path, arm: str, seed: int, settings: StudySettings) -> None:
    """Stage 2 of an arm; a finished run is kept, a cut one begins again."""
    place, baseline = folder / "runs" / slug(arm), folder / "sft.jsonl"
    steps = steps_of(arm, settings)
    last = place / "validation" / f"{steps}.jsonl"
    if last.is_file() and baseline.is_file():
        return
    shutil.rmtree(place, ignore_errors=True)
    recipe, overrides = ARMS[arm]
    run(
        [
            "verl.trainer.main_ppo",
            f"+recipe={recipe}",
            f"actor_rollout_ref.model.path={folder / 'sft'}",
            f"data.train_files={folder / 'parquet' / 'train.rl.parquet'}",
            f"data.val_files={folder / 'parquet' / 'heldout.rl.parquet'}",
            f"{_CURRICULUM}.difficulty={folder / 'difficulty.parquet'}",
            f"{_CURRICULUM}.seed={seed}",
            "data.max_prompt_length=768",
            "data.max_response_length=48",
            f"data.train_batch_size={settings.prompts}",
            "data.filter_overlong_prompts=false",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={settings.prompts // settings.updates}",
            f"actor_rollout_ref.actor.optim.lr={settings.grpo_lr}",
            f"actor_rollout_ref.actor.kl_loss_coef={settings.kl}",
            f"actor_rollout_ref.rollout.seed={seed}",
            f"trainer.total_training_steps={steps}",
            "trainer.total_epochs=100",
            "trainer.save_freq=-1",
            f"trainer.val_before_train={not baseline.is_file()}",
            f"trainer.test_freq={settings.test_every}",
            "trainer.logger=[console,file]",
            f"trainer.validation_data_dir={place / 'validation'}",
            f"trainer.default_local_dir={place}",
            *overrides,
        ],
        folder / "logs" / f"{slug(arm)}.log",
        seconds=3600,
        metrics=folder / "logs" / f"{slug(arm)}.jsonl",
        cwd=folder,
    )
    if not baseline.is_file():
        shutil.copy2(place / "validation" / "0.jsonl", baseline)


def steps_of(arm: str, settings: StudySettings) -> int:
    """Steps of an arm's stage 2."""
    return round(SHORTER.get(arm, 1.0) * settings.grpo_steps)


def slug(arm: str) -> str:
    """The name of an arm's files.

    Example:
        >>> slug("published, shuffled")
        'published_shuffled'
    """
    return arm.replace(",", "").replace(" ", "_")


def counts_of(dump: Path) -> RowCounts:
    """The counts of a validation, its rows in the order of prompt and gold, so that two models' rows are pairs."""
    answers = sorted(read_verl_dump(dump), key=lambda one: (one.prompt, one.labels))
    return count_records(answers)


def generated(metrics: Path, settings: StudySettings) -> dict[int, int]:
    """Answers generated up to each step, those of replaced groups included."""
    total, found = 0, {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["step"] == 0:
            continue
        extra = [value for name, value in entry["data"].items() if name.startswith("training/filter_groups/")]
        total += round((settings.prompts + sum(extra)) * _ANSWERS)
        found[entry["step"]] = total
    return found


def results_of(folder: Path, arm: str, seed: int, settings: StudySettings) -> list[dict[str, Any]]:
    """The lines of `study.jsonl` of a finished run."""
    place, metrics = folder / "runs" / slug(arm), folder / "logs" / f"{slug(arm)}.jsonl"
    if not (place / "validation" / f"{steps_of(arm, settings)}.jsonl").is_file():
        return []
    before, answers = counts_of(folder / "sft.jsonl"), generated(metrics, settings)
    timings = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    lines = []
    for dump in sorted((place / "validation").glob("*.jsonl"), key=lambda path: int(path.stem)):
        step = int(dump.stem)
        if step == 0:
            continue
        after = counts_of(dump)
        values = [result_of(one, bootstrap=BootstrapSettings(resamples=0)).to_dict() for one in (before, after)]
        first, second = resampled_metrics([after, before], _BOOTSTRAP)
        bounds = nested(interval(first - second, level=_BOOTSTRAP.level).tolist())
        seconds = sum([entry["data"].get("timing_s/step", 0.0) for entry in timings if entry["step"] <= step])
        for path in METRICS:
            sft, grpo, (low, high) = (_at(one, path) for one in (*values, bounds))
            lines.append(
                {
                    "arm": arm,
                    "default": arm == "default",
                    "seed": seed,
                    "metric": "_".join(path),
                    "sft": round(sft, 5),
                    "grpo": round(grpo, 5),
                    "difference": round(grpo - sft, 5),
                    "low": round(low, 5),
                    "high": round(high, 5),
                    "generated_answers": answers[step],
                    "steps": step,
                    "seconds": round(seconds),
                    "heldout_rows": len(after),
                }
            )
    return lines


def recorded_lines(root: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The lines of `study_curves.jsonl`, by arm and seed."""
    records, found = root / "study_curves.jsonl", defaultdict(list)
    for text in records.read_text(encoding="utf-8").splitlines() if records.is_file() else []:
        line = json.loads(text)
        found[line["arm"], line["seed"]].append(line)
    return dict(found)


def _change(line: Mapping[str, Any]) -> str:
    bounds = f"{line['low']:+.3f} to {line['high']:+.3f}"
    return f"{line['sft']:.3f} → {line['grpo']:.3f} ({line['difference']:+.3f}, {bounds})"


def table_head(names: Iterable[str]) -> list[str]:
    """The first two lines of a table in Markdown."""
    cells = list(names)
    return [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]


def _values(line: Mapping[str, Any] | None, form: str) -> str:
    return "–" if line is None else f"{line['sft']:{form}} → {line['grpo']:{form}}"


def _gain(line: Mapping[str, Any] | None) -> str:
    return "–" if line is None else f"{line['difference']:+.3f}"


def _at(values: Any, path: Sequence[str]) -> Any:
    for name in path:
        values = values[name]
    return values


def write_results(root: Path, arms: Sequence[str], settings: StudySettings) -> str:
    """What is finished, of every seed, as `study.jsonl`, `study.md` and `study.png`; returns the tables."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    numbers = [folder.name.removeprefix("seed_") for folder in root.glob("seed_*")]
    recorded = recorded_lines(root)
    seeds = sorted({int(number) for number in numbers if number.isdecimal()} | {seed for _, seed in recorded})
    lines = []
    for arm in arms:
        for seed in seeds:
            lines += results_of(root / f"seed_{seed}", arm, seed, settings) or recorded.get((arm, seed), [])
    last = [line for line in lines if line["steps"] == steps_of(line["arm"], settings)]
    of_seeds = f"arm (seeds {', '.join(map(str, seeds))})"
    gains = table_head([of_seeds, *_GAINS, "micro joint F1, best validation", "answers"])
    named = table_head([of_seeds, *_NAMED])
    rows = table_head(["arm", "seed", *_COLUMNS, "ids outside", "answers", "seconds"])
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    runs = Counter(arm for arm, _ in {(line["arm"], line["seed"]) for line in last})
    for arm in arms:
        joint = [line for line in lines if line["arm"] == arm and line["metric"] == "micro_joint_f1"]
        of_arm = {(line["metric"], line["seed"]): line for line in last if line["arm"] == arm}
        if of_arm:
            cells = [", ".join([_gain(of_arm.get((_COLUMNS[name], seed))) for seed in seeds]) for name in _GAINS]
            best = {line["seed"]: line for line in sorted(joint, key=lambda line: line["difference"])}
            cells.append(", ".join([_gain(best.get(seed)) for seed in seeds]))
            answers = sorted({line["generated_answers"] for line in of_arm.values()})
            cells.append(" to ".join([f"{count:,}" for count in dict.fromkeys((answers[0], answers[-1]))]))
            gains.append(f"| {arm} | {' | '.join(cells)} |")
            cells = [
                ", ".join([_values(of_arm.get((metric, seed)), form) for seed in seeds])
                for metric, form in _NAMED.values()
            ]
            named.append(f"| {arm} | {' | '.join(cells)} |")
        for seed in seeds:
            found = {line["metric"]: line for line in last if line["arm"] == arm and line["seed"] == seed}
            if found:
                cells = [_change(found[metric]) for metric in _COLUMNS.values()]
                one = found["answers_outside"]
                cells += [f"{one['grpo']:.1%}", f"{one['generated_answers']:,}", f"{one['seconds']:,}"]
                rows.append(f"| {arm} | {seed} | {' | '.join(cells)} |")
        if runs[arm] == max(runs.values(), default=0):  # means of other seeds would not be alike
            steps = sorted({line["steps"] for line in joint})
            by_step = [[line for line in joint if line["steps"] == step] for step in steps]
            axes.plot(
                [0, *[np.mean([line["generated_answers"] for line in of_step]) for of_step in by_step]],
                [0, *[np.mean([line["difference"] for line in of_step]) for of_step in by_step]],
                marker="o",
                label=f"{arm} (seeds {', '.join(map(str, sorted({line['seed'] for line in joint})))})",
            )
    axes.axhline(0, color="0.7", linewidth=1)
    axes.set_xlabel("generated answers")
    axes.set_ylabel("held-out micro joint F1 less the SFT model's")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    table = "\n".join([*gains, "", *named, "", *rows]) + "\n"
    outputs = [root / name for name in ("study.jsonl", "study_curves.jsonl", "study.md", "study.png")]
    with whole_or_nothing(outputs) as (records, curves, text, picture):
        for path, found_lines in ((records, last), (curves, lines)):
            path.write_text("".join([json.dumps(line) + "\n" for line in found_lines]), encoding="utf-8")
        text.write_text(table, encoding="utf-8")
        figure.savefig(picture, format="png")
    return table


def main() -> None:
    """Run what is missing, write the results."""
    arms = [f"  {arm!r}: {' '.join([f'+recipe={recipe}', *changes])}" for arm, (recipe, changes) in ARMS.items()]
    arms += [f"  {arm!r} makes {share:.0%} of the steps." for arm, share in SHORTER.items()]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Arms, with the recipe and what they change in it:\n\n" + "\n".join(arms),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("study"), help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="(default: 0 1 2)")
    first = f"in quotation marks (default: {', '.join(map(repr, FIRST))})"
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(FIRST), metavar="ARM", help=first)
    for one in fields(StudySettings):
        kind, flag = type(one.default), f"--{one.name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=one.default, metavar="N", help=one.metadata["help"])
    given = vars(parser.parse_args())
    root, seeds, arms = given.pop("output").absolute(), given.pop("seeds"), given.pop("arms")
    settings = StudySettings(**given)
    for arm in arms:
        for seed in seeds:
            if any(line["steps"] == steps_of(arm, settings) for line in recorded_lines(root).get((arm, seed), [])):
                continue
            folder = root / f"seed_{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            prepare_seed(folder, seed, settings)
            run_grpo(folder, arm, seed, settings)
            say(write_results(root, list(ARMS), settings))


if __name__ == "__main__":
    main()
