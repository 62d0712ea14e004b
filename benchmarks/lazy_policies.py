"""What policies that have learnt nothing earn from each F1 mode, beside the gold: a reward should not pay for them.

    python -m benchmarks.lazy_policies data/train.rl.parquet

`f1_mode` micro and micro_f1_mcc are asked as a run asks them at its start, from a policy that names as many ids as are
gold and has half of them right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ffr_verl.data.parquet_files import rows_of_files
from ffr_verl.evaluation import BootstrapSettings, evaluate
from ffr_verl.fragments import Fragment, format_fragment, parse_leniently
from ffr_verl.rewards import compute_score
from ffr_verl.rewards.ffr import F1Mode
from ffr_verl.rewards.reading import row_universes

Policy = Callable[[Fragment, Mapping[str, Any]], Fragment]

POLICIES: Mapping[str, Policy] = {
    "the gold": lambda gold, info: gold,
    "nothing at all": lambda gold, info: Fragment((), ()),
    "the gold without its images": lambda gold, info: Fragment(gold.utterance_ids, ()),
    "everything": lambda gold, info: Fragment(tuple(info["utterance_ids"]), tuple(info["image_ids"])),
    "the first turn": lambda gold, info: Fragment(
        (0,), tuple([one for one, turn in zip(info["image_ids"], info["image_utterances"], strict=True) if turn == 0])
    ),
    "no fragment (malformed)": lambda gold, info: Fragment((), ()),
}


def table_of(file: Path) -> str:
    """The Markdown table for the rows of an RL file."""
    rows = [
        (row["extra_info"], row["reward_model"]["ground_truth"], row["prompt"]) for row in rows_of_files([str(file)])
    ]
    golds = [parse_leniently(solution) for _, solution, _ in rows]
    counts = {}
    universes = np.mean([row_universes(info) for info, *_ in rows], axis=0).tolist()
    for kind, ids, universe in (("utterance", "utterance_ids", universes[0]), ("image", "image_ids", universes[1])):
        gold = float(np.mean([len(getattr(one, ids)) for one in golds]))
        counts[kind] = [gold / 2, gold, max(gold, 1e-3), universe]
    modes = get_args(F1Mode)
    lines = [
        f"| answer | {' | '.join(modes)} | micro joint F1 | micro joint MCC |",
        f"|---|{'---|' * (len(modes) + 2)}",
    ]
    for name, policy in POLICIES.items():
        answers = [
            "utterances" if "malformed" in name else format_fragment(policy(gold, info))
            for gold, (info, *_) in zip(golds, rows, strict=True)
        ]
        earned = []
        for mode in modes:
            scores = [
                compute_score(
                    "", answer, solution, {**info, "micro_counts": counts}, f1_mode=mode, weights={"f1": 1.0}
                )
                for answer, (info, solution, _) in zip(answers, rows, strict=True)
            ]
            earned.append(f"{np.mean([one['score'] for one in scores]):.3f}")
        records = [
            {"response": answer, "labels": solution, "dialogue_id": info["dialogue_id"], "messages": prompt}
            for answer, (info, solution, prompt) in zip(answers, rows, strict=True)
        ]
        micro = evaluate(records, bootstrap=BootstrapSettings(resamples=0)).micro["joint"]
        lines.append(f"| {name} | {' | '.join(earned)} | {micro['f1']:.3f} | {micro['mcc']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table for each file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="NAME.rl.parquet of `ffr-verl prepare`")
    for file in parser.parse_args().files:
        sys.stdout.write(f"{file}\n\n{table_of(file)}\n\n")


if __name__ == "__main__":
    main()
