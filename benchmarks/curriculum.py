"""What a curriculum costs with a million rows: start-up, a step's observe and draw, memory, and the checkpoint's size.

    python -m benchmarks.curriculum [--rows 1000000]

All figures are of one run on one machine.
"""

from __future__ import annotations

import argparse
import pickle
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ffr_verl.samplers import CurriculumConfig, CurriculumSampler, assign_levels
from ffr_verl.samplers.difficulty_file import DifficultyFile

BATCH, STEPS = 64, 500
ORDERS = ("published", "ascending", "competence", "shuffled", "online")


def write_file(path: Path, rows: int) -> np.ndarray:
    """A difficulty file of made-up rows; returns their keys."""
    source = np.random.default_rng(0)
    f1, entropy = source.random(rows).round(3), source.random(rows)
    keys = source.permutation(rows).astype(np.int64)
    columns = {
        "row_key": keys,
        "f1": f1,
        "entropy": entropy,
        "level": assign_levels(f1, entropy),
        "is_negative": source.random(rows) < 0.2,
    }
    pq.write_table(pa.table(columns), path)
    return keys


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(path: Path, keys: np.ndarray, order: str) -> tuple[float, list[float], float, float]:
    """Seconds to start, seconds of each step, bytes a row, megabytes of a checkpoint."""
    before = resident()
    started = time.perf_counter()
    rows = DifficultyFile(path).of_rows(keys, name="bench")
    sampler = CurriculumSampler(rows, CurriculumConfig(order=order, difficulty=str(path)))  # type: ignore[arg-type]
    start = time.perf_counter() - started
    del rows
    pa.default_memory_pool().release_unused()
    held = (resident() - before) / len(keys)
    source = np.random.default_rng(1)
    steps, position = [], 0
    for _ in range(STEPS):
        rewards = source.random(BATCH).tolist()
        started = time.perf_counter()
        drawn = [sampler.row_at((position + place) % len(sampler)) for place in range(BATCH)]
        sampler.update(dict(zip(drawn, rewards, strict=True)))
        steps.append(time.perf_counter() - started)
        position += BATCH
    return start, steps, held, len(pickle.dumps(sampler.state_dict())) / 2**20


def main() -> None:
    """Print one line an order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--order", choices=ORDERS, help="one order in this process; all, each in its own, by default")
    given = parser.parse_args()
    if given.order is None:
        import subprocess

        sys.stdout.write(f"{given.rows:,} rows, {BATCH} rows a step, {STEPS} steps\n")
        sys.stdout.write("order        start s   step ms: median   p99     max   bytes/row   checkpoint MiB\n")
        sys.stdout.flush()
        for order in ORDERS:
            command = [sys.executable, "-m", "benchmarks.curriculum", "--rows", str(given.rows), "--order", order]
            subprocess.run(command, check=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "difficulty.parquet"
        keys = write_file(path, given.rows)
        pa.default_memory_pool().release_unused()
        start, steps, held, checkpoint = measure(path, keys, given.order)
    median, worst, most = statistics.median(steps), float(np.percentile(steps, 99)), max(steps)
    sys.stdout.write(
        f"{given.order:12} {start:7.2f} {median * 1e3:17.3f} {worst * 1e3:6.3f} {most * 1e3:6.3f} {held:11.0f} "
        f"{checkpoint:14.1f}\n"
    )


if __name__ == "__main__":
    main()
