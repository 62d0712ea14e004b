"""What a reward costs: `compute_score` against the same rewards written straightforwardly, one `.npy` a vector.

    python -m benchmarks.rewards

All figures are of one run on one machine. Times of an answer are of the CPU, the best of several passes, so that other
work on the machine counts little; the ratios are what travels.

Cold is the first answer that a process gives for a dialogue, its store being open: what eight reward workers meet
most of the time. Warm is an answer whose neighbours have been compared before, as those of a group mostly have.
"""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np
from omegaconf import OmegaConf

from benchmarks.near_misses import near_misses
from ffr_verl import Fragment, format_fragment
from ffr_verl.embeddings import write_store
from ffr_verl.fragments import AnswerStyle
from ffr_verl.recipes import recipe_path
from ffr_verl.rewards import CoherenceMode, compute_score

DIALOGUES, TURNS, IMAGES, DIMENSION = 64, 26, 6, 1536
Row = tuple[str, str, dict[str, Any]]

_IDS = re.compile(r"<\|utt_ids_start\|>\[(.*?)\]<\|utt_ids_end\|>;<\|img_ids_start\|>\[(.*?)\]<\|img_ids_end\|>")


def make_rows(count: int, *, seed: int = 0) -> list[Row]:
    """Answers of eight utterances and two images, golds like them, and what is known of their dialogues."""
    source = random.Random(seed)
    rows = []
    for number in range(count):
        dialogue = number % DIALOGUES
        info = {
            "dialogue_id": f"d{dialogue}",
            "split": "train",
            "utterance_ids": list(range(TURNS)),
            "image_ids": list(range(IMAGES)),
            "image_utterances": [4 * image for image in range(IMAGES)],
            "images": [f"images/{dialogue}_{image}.jpg" for image in range(IMAGES)],
        }
        answer, gold = (
            format_fragment(
                Fragment(tuple(sorted(source.sample(range(TURNS), 8))), tuple(sorted(source.sample(range(IMAGES), 2))))
            )
            for _ in range(2)
        )
        rows.append((answer, gold, info))
    return rows


def write_vectors(folder: Path) -> None:
    """The same vectors as a store and as one file each."""
    generator = np.random.default_rng(0)
    (folder / "files").mkdir()
    vectors = {}
    for dialogue in range(DIALOGUES):
        for turn in range(TURNS):
            vectors[f"utt:d{dialogue}:{turn}"] = generator.normal(size=DIMENSION).astype(np.float32)
        for image in range(IMAGES):
            vectors[f"img:images/{dialogue}_{image}.jpg"] = generator.normal(size=DIMENSION).astype(np.float32)
    write_store(folder / "store", vectors.items(), model="random")
    for key, vector in vectors.items():
        np.save(folder / "files" / (key.replace("/", "_") + ".npy"), vector)


def straightforward(answer: str, gold: str, info: dict[str, Any], *, folder: Path) -> dict[str, float]:
    """f1, format and coherence as one would write them first: a file opened for each vector, numpy for each cosine."""

    def parse(text: str) -> tuple[list[int], list[int]] | None:
        match = _IDS.fullmatch(text)
        if match is None:
            return None
        first, second = ([int(item) for item in group.split(",") if item.strip()] for group in match.groups())
        return first, second

    def f1(predicted: list[int], wanted: list[int]) -> float:
        if not predicted and not wanted:
            return 1.0
        hits = len(set(predicted) & set(wanted))
        if not hits:
            return 0.0
        precision, recall = hits / len(predicted), hits / len(wanted)
        return 2 * precision * recall / (precision + recall) * 0.95 ** abs(len(predicted) - len(wanted))

    predicted, wanted = parse(answer), parse(gold)
    if predicted is None or wanted is None:
        return {"score": 0.0, "f1": 0.0, "coherence": 0.0, "format": 0.0}
    value = 0.5 * f1(predicted[0], wanted[0]) + 0.5 * f1(predicted[1], wanted[1])
    well_formed = float(all(len(set(ids)) == len(ids) for ids in predicted))
    dialogue = info["dialogue_id"]

    def load(key: str) -> np.ndarray:
        return np.load(folder / (key.replace("/", "_") + ".npy"))

    utterances = {i: load(f"utt:{dialogue}:{i}") for i in predicted[0]}
    images = {i: load(f"img:{info['images'][i]}") for i in predicted[1]}
    sequence = []
    for identifier in sorted(set(utterances) | {info["image_utterances"][i] for i in images}):
        if identifier in utterances:
            sequence.append(utterances[identifier])
        held = [vector for i, vector in images.items() if info["image_utterances"][i] == identifier]
        if held:
            sequence.append(np.mean(held, axis=0))
    cosines = [
        float(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1)) for a, b in itertools.pairwise(sequence)
    ]
    coherence = sum(cosines) / len(cosines)
    return {
        "score": value + coherence + 0.3 * well_formed,
        "f1": value,
        "coherence": coherence,
        "format": well_formed,
    }


def recipe_kwargs(store: str) -> dict[str, Any]:
    """The recipe's `reward_kwargs` as verl passes them on every call: nodes of its config, not plain mappings."""
    node = OmegaConf.load(recipe_path("ffr_grpo")).reward.custom_reward_function.reward_kwargs
    node.embeddings = store
    return dict(node)


def microseconds(function: Callable[[Row], Any], rows: Sequence[Row], *, repeats: int = 9) -> float:
    """Mean CPU time a row, the best of `repeats` passes."""
    times = []
    for _ in range(repeats):
        started = time.thread_time()
        for row in rows:
            function(row)
        times.append((time.thread_time() - started) / len(rows) * 1e6)
    return min(times)


def first_and_second(store: Path, rows: Sequence[Row], *, copies: int = 15) -> tuple[float, float]:
    """Microseconds of the first and of the second answer of a dialogue, over copies of the store that are new."""
    firsts, seconds = [], []
    for number in range(copies):
        copy = str(shutil.copytree(store, store.with_name(f"copy-{number}")))
        os.utime(f"{copy}/manifest.json")  # else one in the place of the last, with its times, passes for it: not cold

        def ours(row: Row, copy: str = copy) -> dict[str, float]:
            return compute_score("", row[0], row[1], row[2], embeddings=copy)

        ours(rows[0])  # opens it
        firsts.append(microseconds(ours, rows[1:DIALOGUES], repeats=1))
        seconds.append(microseconds(ours, rows[DIALOGUES + 1 : 2 * DIALOGUES], repeats=1))
        shutil.rmtree(copy)
    return min(firsts), min(seconds)


def _throughput(store: str, threads: int, rows: list[Row], barrier: Any) -> float:
    """Answers a second of one process, once all processes are ready and warm."""

    def part(own: Sequence[Row]) -> None:
        for answer, gold, info in own:
            compute_score("", answer, gold, info, embeddings=store)

    part(rows[:DIALOGUES])
    barrier.wait()
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, [rows[start::threads] for start in range(threads)]))
    return len(rows) / (time.perf_counter() - started)


def throughput(store: str, *, processes: int, threads: int, rows: list[Row]) -> float:
    """Answers a second, in all."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        barrier = manager.Barrier(processes)
        return sum(pool.starmap(_throughput, [(store, threads, rows, barrier)] * processes))


def import_seconds() -> float:
    """Median time that `import ffr_verl.rewards` takes in a new interpreter."""
    code = "import time; t = time.perf_counter(); import ffr_verl.rewards; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


def slowest_fuzz(store: str, count: int = 100_000) -> float:
    """Milliseconds of CPU of the slowest of `count` near-misses, over all modes and both styles."""
    _, gold, info = make_rows(1)[0]
    settings = [
        {"embeddings": store, "coherence_mode": mode, "answer_style": style, "weights": {"f1": 1.0, "mcc": 1.0}}
        for mode, style in itertools.product(get_args(CoherenceMode), get_args(AnswerStyle))
    ]
    for kwargs in settings:
        compute_score("", gold, gold, info, **kwargs)  # opens the store
    slowest = 0.0
    gc.collect()
    gc.disable()  # a pause of the collector is no cost of the reward
    answers = zip(range(count), itertools.cycle(settings), near_misses(random.Random(0)), strict=False)
    for _, kwargs, answer in answers:
        started = time.thread_time()
        compute_score("", answer, gold, info, **kwargs)
        slowest = max(slowest, time.thread_time() - started)
    gc.enable()
    return slowest * 1e3


def main() -> None:
    """Print the figures."""
    rows = make_rows(4096)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_vectors(folder)
        store = str(folder / "store")

        def ours(row: Row) -> dict[str, float]:
            return compute_score("", row[0], row[1], row[2], embeddings=store)

        def theirs(row: Row) -> dict[str, float]:
            return straightforward(*row, folder=folder / "files")

        first, second = first_and_second(folder / "store", rows)
        for row in rows[:DIALOGUES]:
            found, expected = ours(row), theirs(row)
            if any(abs(found[key] - value) > 1e-6 for key, value in expected.items()):
                raise SystemExit(f"the two disagree: {found} {expected}")
        compute, plain = microseconds(ours, rows), microseconds(theirs, rows[:512])
        kwargs = recipe_kwargs(store)
        from_recipe = microseconds(lambda row: compute_score("", row[0], row[1], row[2], **kwargs), rows)
        weights = {"f1": 1.0, "format": 0.3}
        bare = microseconds(lambda row: compute_score("", row[0], row[1], row[2], weights=weights), rows)
        one, eight, sixteen = (
            throughput(store, processes=processes, threads=threads, rows=rows * 16)
            for processes, threads in ((1, 1), (1, 8), (2, 8))
        )
        figures = {
            "compute_score, f1 + coherence + format, cold: first answer of a dialogue (us)": first,
            "the same, second answer of a dialogue, another one (us)": second,
            "the same, warm (us)": compute,
            "the same, warm, settings as verl's naive manager passes them (us)": from_recipe,
            "compute_score, f1 + format (us)": bare,
            "straightforward, a file a vector, page cache warm (us)": plain,
            "ratio straightforward / cold": plain / first,
            "ratio straightforward / warm": plain / compute,
            "1 process x 1 thread (answers/s)": one,
            "1 process x 8 threads (answers/s)": eight,
            "2 processes x 8 threads (answers/s)": sixteen,
            "ratio 2 x 8 / 1 x 8": sixteen / eight,
            "slowest of 100,000 near-misses (ms of CPU)": slowest_fuzz(store),
            "import ffr_verl.rewards (s)": import_seconds(),
        }
    width = max(map(len, figures))
    sys.stdout.write(f"{TURNS} turns, {IMAGES} images, {DIMENSION} dimensions, answers of 8 utterances and 2 images\n")
    for label, value in figures.items():
        sys.stdout.write(f"{label:<{width}}  {value:12,.3f}\n")
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
