"""Rows a second and peak memory of `ffr-verl prepare`, against a plain `datasets` map without any check.

    python -m benchmarks.data [--rows 20000] [--most 200000] [--rounds 3]

Both make the same two files of the same generated rows, each in a process of its own, by turns; the fastest round of
each counts, as other work on the machine can only slow them. Then `prepare` alone is run on 2,000 and on `--most`
rows, to see how its memory grows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["run_plain", "run_prepare", "write_rows"]

_UTTERANCE = re.compile(r"<\|utt_id_start\|>(\d+)<\|utt_id_end\|>")
_IMAGE = re.compile(r"<\|img_id_start\|>\d+<\|img_id_end\|>")
_QUERY = re.compile(r"<\|query_start\|>(.*?)<\|query_end\|>")


def write_rows(folder: Path, rows: int) -> Path:
    """JSONL of rows of about 25 turns and 3 images."""
    from ffr_verl.data.demo import demo_rows

    path = folder / f"{rows}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in demo_rows(folder / "images", rows=rows, turns_per_topic=(7, 10), image_share=0.11):
            file.write(json.dumps(row) + "\n")
    return path


def run_prepare(source: Path, output: Path) -> None:
    """`ffr-verl prepare`."""
    from ffr_verl.data.prepare import prepare

    prepare(source, images_root=source.parent, output=output, split="t", max_images=64)


def _rl_row(row: dict[str, Any], index: int) -> dict[str, Any]:
    user = row["messages"][1]["content"]
    pieces = _UTTERANCE.split(user)
    return {
        "data_source": "ffr/mldr",
        "prompt": row["messages"][:-1],
        "images": row["images"],
        "ability": "ffr",
        "reward_model": {"style": "rule", "ground_truth": row["solution"]},
        "extra_info": {
            "index": index,
            "split": "t",
            "dialogue_id": row["dialogue_id"],
            "query": _QUERY.findall(user)[0],
            "utterance_ids": [int(identifier) for identifier in pieces[1::2]],
            "image_ids": list(range(len(row["images"]))),
            "image_utterances": list(
                itertools.chain.from_iterable(
                    [int(identifier)] * len(_IMAGE.findall(body))
                    for identifier, body in zip(pieces[1::2], pieces[2::2], strict=True)
                )
            ),
            "images": row["images"],
        },
    }


def run_plain(source: Path, output: Path) -> None:
    """What a user would write with `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=str(source), split="train", cache_dir=str(output / "cache"))
    output.mkdir(parents=True, exist_ok=True)
    rl = rows.map(_rl_row, with_indices=True, remove_columns=rows.column_names)
    rl.to_parquet(str(output / "t.rl.parquet"))
    rows.map(
        lambda row: {"messages": row["messages"], "images": row["images"], "dialogue_id": row["dialogue_id"]},
        remove_columns=["solution"],
    ).to_parquet(str(output / "t.sft.parquet"))


def _measured(what: str, source: Path, output: Path) -> tuple[float, float]:
    """Seconds of the work once everything is imported, and peak memory in MiB of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data", "--child", what, str(source), str(output)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, kilobytes = run.stdout.split()[-2:]
    return float(seconds), float(kilobytes) / 1024


def _child(what: str, source: Path, output: Path) -> None:
    run = run_prepare if what == "prepare" else run_plain
    few = output.parent / f"few_{what}.jsonl"
    with source.open(encoding="utf-8") as file:
        few.write_text("".join(itertools.islice(file, 10)), encoding="utf-8")
    run(few, output.parent / f"warm_{output.name}")  # whatever is imported on first use
    started = time.perf_counter()
    run(source, output)
    seconds = time.perf_counter() - started
    sys.stdout.write(f"{seconds} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}\n")


def _figures(rows: int, most: int, rounds: int) -> Iterator[tuple[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_rows(folder, rows)
        measured: dict[str, list[tuple[float, float]]] = {"plain": [], "prepare": []}
        for number in range(rounds):
            for what, found in measured.items():
                found.append(_measured(what, source, folder / f"{what}_{number}"))
        (plain, _), (ours, _) = min(measured["plain"]), min(measured["prepare"])
        plain_memory, our_memory = (max(memory for _, memory in found) for found in measured.values())
        yield f"prepare, {rows:,} rows (rows/s)", rows / ours
        yield f"datasets map, {rows:,} rows (rows/s)", rows / plain
        yield "ratio prepare / datasets map", plain / ours
        yield "prepare, peak memory (MiB)", our_memory
        yield "datasets map, peak memory (MiB)", plain_memory
        for count in (2_000, most):
            _, memory = _measured("prepare", write_rows(folder, count), folder / "memory")
            yield f"prepare, peak memory at {count:,} rows (MiB)", memory


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--most", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, source, output = arguments.child
        _child(what, Path(source), Path(output))
        return
    for name, value in _figures(arguments.rows, arguments.most, arguments.rounds):
        sys.stdout.write(f"{name:50} {value:12,.2f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
