"""What our dataset, reward and buffer add to a whole GRPO step, against verl's own and a constant reward.

    python -m benchmarks.grpo_step [--steps 14] [--rounds 2]

Both runs are verl's trainer on the CPU with vLLM. verl's own buffer looks at the rollouts every 2 s by default, which
would hide everything; here it takes our interval, so that the rest is compared. The two draw rows in different orders,
so all rows have three images and prompts of nearly the same length. Runs take turns; a run's first two steps, which
warm up, are left out. All figures are of one call on one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ffr_verl.data.demo import write_demo_set
from ffr_verl.data.prepare import prepare
from ffr_verl.demo.base_model import write_base_model
from ffr_verl.demo.processes import run_logged

WARM_UP, INTERVAL = 2, 0.1
ROWS, IMAGES = 256, 3
PARTS = ("gen", "old_log_prob", "adv", "update_actor", "update_weights")
# A reward that costs nothing, and verl's buffer with our polling interval.
VERLS_OWN = f"""
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


def constant(data_source, solution_str, ground_truth, extra_info=None, **_):
    return 0.0


class Buffer(ReplayBuffer):
    def __init__(self, **arguments):
        super().__init__(**{{**arguments, "poll_interval": {INTERVAL}}})
"""


def equal_rows(table: pa.Table) -> pa.Table:
    """The rows with `IMAGES` images whose prompts are nearest to each other in length, as many as `ROWS`."""
    images = np.array([len(row or []) for row in table["images"].to_pylist()])
    length = np.array([sum(len(turn["content"]) for turn in row) for row in table["prompt"].to_pylist()])
    rows = np.flatnonzero(images == IMAGES)
    rows = rows[np.argsort(length[rows], kind="stable")]
    first = np.argmin(length[rows[ROWS - 1 :]] - length[rows[: len(rows) - ROWS + 1]])
    return table.take(np.sort(rows[first : first + ROWS]))


def write_inputs(folder: Path) -> None:
    """Model, rows, and a difficulty file for the curriculum."""
    from ffr_verl.data.parquet_files import rows_of_files
    from ffr_verl.samplers.difficulty_file import difficulty_table, write_difficulty

    write_base_model(folder / "model")
    write_demo_set(folder, train_rows=4000, heldout_rows=8)
    # Pictures in the file, where verl's own dataset finds them too.
    prepare(folder / "train.json", images_root=folder, output=folder, split="train", embed_images=True)
    pq.write_table(equal_rows(pq.read_table(folder / "train.rl.parquet")), folder / "train.rl.parquet")
    rows = list(rows_of_files([folder / "train.rl.parquet"]))
    source = np.random.default_rng(0)
    answers = [{"response": row["reward_model"]["ground_truth"], "logprobs": [-source.random()]} for row in rows]
    write_difficulty(difficulty_table(rows, answers, model="made up"), folder / "difficulty.parquet")
    (folder / "verls_own.py").write_text(VERLS_OWN)


def run(folder: Path, kind: str, number: int, steps: int) -> list[dict[str, float]]:
    """verl's `timing_s` of each step of a run."""
    metrics = folder / f"{kind}_{number}.jsonl"
    arguments = [
        "+recipe=ffr_grpo_cpu",
        f"actor_rollout_ref.model.path={folder / 'model'}",
        f"data.train_files={folder / 'train.rl.parquet'}",
        f"data.val_files={folder / 'train.rl.parquet'}",
        "data.max_prompt_length=768",
        "data.max_response_length=32",
        "data.train_batch_size=16",
        "data.filter_overlong_prompts=false",
        "algorithm.filter_groups.enable=false",
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        # Equal work: answers have one length, and the model stays what it is.
        "actor_rollout_ref.rollout.ignore_eos=true",
        "actor_rollout_ref.actor.optim.lr=0",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=100",
        "trainer.val_before_train=false",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "trainer.logger=[file]",
        f"trainer.default_local_dir={folder / kind}_{number}",
    ]
    if kind == "ours":
        arguments += [f"data.ffr.curriculum.difficulty={folder / 'difficulty.parquet'}"]
        arguments += ["data.ffr.curriculum.order=online"]
    else:
        arguments += [
            "data.custom_cls.path=null",
            "data.custom_cls.name=null",
            "reward.reward_manager.name=naive",
            f"reward.custom_reward_function.path={folder / 'verls_own.py'}",
            "reward.custom_reward_function.name=constant",
            "~reward.custom_reward_function.reward_kwargs",
            f"trainer.v1.sampler.custom_sampler.path={folder / 'verls_own.py'}",
            "trainer.v1.sampler.custom_sampler.name=Buffer",
        ]
    run_logged(
        [sys.executable, "-m", "verl.trainer.main_ppo", *arguments],
        log=folder / f"{kind}_{number}.log",
        on_line=lambda _line: None,
        time_limit=900,
        environment={"VERL_FILE_LOGGER_PATH": str(metrics), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
    )
    entries: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [
        {key.removeprefix("timing_s/"): value for key, value in entry["data"].items() if key.startswith("timing_s/")}
        for entry in entries
        if "timing_s/step" in entry["data"]
    ][WARM_UP:]


def main() -> None:
    """Print both distributions and the ratio of their medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    timings: dict[str, list[dict[str, float]]] = {"verl": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for number in range(given.rounds):
            for kind in timings if number % 2 == 0 else reversed(timings):
                steps = run(folder, kind, number, given.steps)
                timings[kind] += steps
                seconds = " ".join(f"{step['step']:.2f}" for step in steps)
                sys.stdout.write(f"{kind}: {seconds}\n")
                sys.stdout.flush()
    medians = {}
    for kind, steps in timings.items():
        quartiles = np.percentile([step["step"] for step in steps], [0, 25, 50, 75, 100])
        medians[kind] = quartiles[2]
        shown = "  ".join(f"{value:.3f}" for value in quartiles)
        sys.stdout.write(f"{kind:5} {len(steps)} steps, s: min, quartiles, max  {shown}\n")
        parts = "  ".join(f"{part} {np.median([step.get(part, np.nan) for step in steps]):.3f}" for part in PARTS)
        sys.stdout.write(f"      medians of the parts  {parts}\n")
    sys.stdout.write(f"ratio of the medians: {medians['ours'] / medians['verl']:.3f}\n")


if __name__ == "__main__":
    main()
