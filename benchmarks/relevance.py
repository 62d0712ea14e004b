"""Whether relevance tells a gold fragment from others of its dialogue, and what a policy could earn by gaming it.

    ffr-verl embed DATA.rl.parquet --model MODEL --output STORE
    python -m benchmarks.relevance DATA.rl.parquet STORE

Prints the share of rows whose gold fragment has a higher relevance than the mean of 100 random fragments of its size
from the same dialogue, and than a single one of them; then what it gives on average to the gold, to a random fragment
of its size, and to answers that a policy could give instead.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.coherence import random_like, rows_to_tell_apart
from ffr_verl import Fragment, format_fragment
from ffr_verl.embeddings import EmbeddingStore
from ffr_verl.rewards.relevance import relevance_reward

__all__ = ["compare"]


def compare(
    file: Path, store: EmbeddingStore, *, draws: int = 100, seed: int = 0
) -> tuple[int, float, float, dict[str, float]]:
    """Rows compared; share of them where the gold beats the mean of the random ones; share of all draws it beats; mean
    relevance of the gold and of what a policy could answer instead."""
    source = random.Random(seed)
    beats_mean, beats_draws = [], []
    values: dict[str, list[float]] = {}
    for gold, info in rows_to_tell_apart(file):

        def score(fragment: Fragment, gold: Fragment = gold, info: dict[str, Any] = info) -> float:
            texts = format_fragment(fragment), format_fragment(gold)
            return relevance_reward(*texts, extra_info=info, store=store)

        value, others = score(gold), [score(random_like(gold, info, source)) for _ in range(draws)]
        beats_mean.append(value > mean(others))
        beats_draws.append(mean((value > other) + 0.5 * (value == other) for other in others))
        single = {one: score(Fragment((one,), ())) for one in info["utterance_ids"]}
        wrong = [one for one in single if one not in gold.utterance_ids]
        nearest = sorted(single, key=lambda one: -single[one])
        for name, found in {
            "gold": value,
            "random of its size": mean(others),
            "nothing": score(Fragment((), ())),
            "whole dialogue": score(Fragment(tuple(single), tuple(range(len(info["images"]))))),
            "one wrong utterance": single[source.choice(wrong)],
            "the nearest utterance": single[nearest[0]],
            "the nearest wrong utterance": max(single[one] for one in wrong),
            "the nearest ones, as many as gold": score(Fragment(tuple(nearest[: len(gold.utterance_ids)]), ())),
        }.items():
            values.setdefault(name, []).append(found)
    return len(beats_mean), mean(beats_mean), mean(beats_draws), {name: mean(all_) for name, all_ in values.items()}


def main() -> None:
    """Print shares and means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("store", type=Path)
    arguments = parser.parse_args()
    rows, over_mean, over_draws, values = compare(arguments.data, EmbeddingStore.open(arguments.store))
    sys.stdout.write(
        f"{rows} rows: gold above the mean of random fragments in {over_mean:.1%} of rows, above a single random one "
        f"in {over_draws:.1%} of draws\n"
    )
    for name, value in values.items():
        sys.stdout.write(f"{name:<36}{value:.3f}\n")


if __name__ == "__main__":
    main()
