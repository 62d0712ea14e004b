"""What our dataset, reward and buffer add to a whole GRPO step, against verl's own and a constant reward.

    python -m benchmarks.grpo_step [--steps 14] [--rounds 2]

Both runs are verl's trainer on the CPU with vLLM. verl's own buffer looks at the rollouts every 2 s by default, which
would hide everything; here it takes our interval, so that the rest is compared. Runs take turns; a run's first two
steps, which warm up, are left out. All figures are of one call on one machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ffr_verl.data.demo import write_demo_set
from ffr_verl.data.prepare import prepare
from ffr_verl.demo.base_model import write_base_model
from ffr_verl.demo.processes import run_logged

WARM_UP, INTERVAL = 2, 0.1
# A reward that costs nothing, and verl's buffer with our polling interval.
VERLS_OWN = f"""
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


def constant(data_source, solution_str, ground_truth, extra_info=None, **_):
    return 0.0


class Buffer(ReplayBuffer):
    def __init__(self, **arguments):
        super().__init__(**{{**arguments, "poll_interval": {INTERVAL}}})
"""


def write_inputs(folder: Path) -> None:
    """Model, rows, and a difficulty file for the curriculum."""
    from ffr_verl.samplers.difficulty_file import difficulty_table, rows_of_files, write_difficulty

    write_base_model(folder / "model")
    write_demo_set(folder, train_rows=512, heldout_rows=8)
    # Pictures in the file, where verl's own dataset finds them too.
    prepare(folder / "train.json", images_root=folder, output=folder, split="train", embed_images=True)
    rows = list(rows_of_files([folder / "train.rl.parquet"]))
    source = np.random.default_rng(0)
    answers = [{"response": row["reward_model"]["ground_truth"], "logprobs": [-source.random()]} for row in rows]
    write_difficulty(difficulty_table(rows, answers, model="made up"), folder / "difficulty.parquet")
    (folder / "verls_own.py").write_text(VERLS_OWN)


def run(folder: Path, kind: str, number: int, steps: int) -> list[float]:
    """Seconds of each step of a run."""
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
    return [entry["data"]["timing_s/step"] for entry in entries if "timing_s/step" in entry["data"]][WARM_UP:]


def main() -> None:
    """Print both distributions and the ratio of their medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    seconds: dict[str, list[float]] = {"verl": [], "ours": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        for number in range(given.rounds):
            for kind in seconds if number % 2 == 0 else reversed(seconds):
                seconds[kind] += run(folder, kind, number, given.steps)
                sys.stdout.write(f"{kind}: {' '.join(f'{value:.2f}' for value in seconds[kind])}\n")
                sys.stdout.flush()
    for kind, values in seconds.items():
        quartiles = np.percentile(values, [0, 25, 50, 75, 100])
        shown = "  ".join(f"{value:.3f}" for value in quartiles)
        sys.stdout.write(f"{kind:5} {len(values)} steps, s: min, quartiles, max  {shown}\n")
    ratio = np.median(seconds["ours"]) / np.median(seconds["verl"])
    sys.stdout.write(f"ratio of the medians: {ratio:.3f}\n")


if __name__ == "__main__":
    main()
