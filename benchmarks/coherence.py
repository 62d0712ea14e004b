"""Whether coherence tells a gold fragment from others of its dialogue, and what a policy could earn by gaming it.

    ffr-verl embed DATA.rl.parquet --model MODEL --output STORE
    python -m benchmarks.coherence DATA.rl.parquet STORE

Prints the share of rows whose gold fragment has a higher `continuous` coherence than the mean of 100 random fragments
of its size from the same dialogue, and than a single one of them; then what each mode gives on average to the gold, to
a random fragment of its size, to the whole dialogue, to the most coherent pair of utterances outside the gold, and to
one utterance outside it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import pyarrow.parquet as pq

from ffr_verl import Fragment
from ffr_verl.embeddings import EmbeddingStore
from ffr_verl.fragments import parse_gold
from ffr_verl.rewards import CoherenceMode, CoherenceScorer

__all__ = ["compare", "random_like", "rows_to_tell_apart", "tricks"]


def rows_to_tell_apart(file: Path) -> Iterator[tuple[Fragment, dict[str, Any]]]:
    """Rows whose gold has at least two utterances, and not all of them: there must be something to tell apart."""
    table = pq.read_table(file, columns=["reward_model", "extra_info"])
    for reward, info in zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True):
        gold = parse_gold(reward["ground_truth"])
        if gold is not None and 2 <= len(gold.utterance_ids) < len(info["utterance_ids"]) - 1:
            yield gold, info


def random_like(gold: Fragment, info: dict[str, Any], source: random.Random) -> Fragment:
    utterances = source.sample(info["utterance_ids"], len(gold.utterance_ids))
    return Fragment(tuple(utterances), tuple(source.sample(range(len(info["images"])), len(gold.image_ids))))


def compare(file: Path, store: EmbeddingStore, *, draws: int = 100, seed: int = 0) -> tuple[int, float, float]:
    """Gold against random fragments, by `continuous` coherence.

    Returns:
        Rows compared; share of them where the gold beats the mean of the random ones; share of all draws it beats.
    """
    source, scorer = random.Random(seed), CoherenceScorer(store)
    beats_mean, beats_draws = [], []
    for gold, info in rows_to_tell_apart(file):
        value = scorer.score(gold, gold, info)
        others = [scorer.score(random_like(gold, info, source), gold, info) for _ in range(draws)]
        beats_mean.append(value > mean(others))
        beats_draws.append(mean((value > other) + 0.5 * (value == other) for other in others))
    return len(beats_mean), mean(beats_mean), mean(beats_draws)


def tricks(file: Path, store: EmbeddingStore, *, seed: int = 0) -> dict[str, dict[CoherenceMode, float]]:
    """Mean coherence in each mode of the gold and of fragments that a policy could answer with instead."""
    source, scorer = random.Random(seed), CoherenceScorer(store)
    modes: tuple[CoherenceMode, ...] = get_args(CoherenceMode)
    values: dict[str, dict[CoherenceMode, list[float]]] = {}
    for gold, info in rows_to_tell_apart(file):
        wrong = [identifier for identifier in info["utterance_ids"] if identifier not in gold.utterance_ids]
        pairs = (Fragment(pair, ()) for pair in itertools.combinations(wrong, 2))
        fragments = {
            "gold": gold,
            "random of its size": random_like(gold, info, source),
            "whole dialogue": Fragment(tuple(info["utterance_ids"]), tuple(range(len(info["images"])))),
            "most coherent wrong pair": max(pairs, key=lambda pair: scorer.score(pair, gold, info)),
            "one wrong utterance": Fragment((source.choice(wrong),), ()),
        }
        for name, fragment in fragments.items():
            for mode in modes:
                found = scorer.score(fragment, gold, info, mode)
                values.setdefault(name, {}).setdefault(mode, []).append(found)
    return {name: {mode: mean(found) for mode, found in row.items()} for name, row in values.items()}


def main() -> None:
    """Print shares and means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("store", type=Path)
    arguments = parser.parse_args()
    store = EmbeddingStore.open(arguments.store)
    rows, over_mean, over_draws = compare(arguments.data, store)
    sys.stdout.write(
        f"{rows} rows: gold above the mean of random fragments in {over_mean:.1%} of rows, above a single random one "
        f"in {over_draws:.1%} of draws\n"
    )
    modes = get_args(CoherenceMode)
    sys.stdout.write(f"{'mean coherence':<26}" + "".join(f"{mode:>15}" for mode in modes) + "\n")
    for name, row in tricks(arguments.data, store).items():
        sys.stdout.write(f"{name:<26}" + "".join(f"{row[mode]:15.3f}" for mode in modes) + "\n")


if __name__ == "__main__":
    main()
