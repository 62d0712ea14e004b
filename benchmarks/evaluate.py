"""What an evaluation costs: `evaluate_file` against the same metrics written straightforwardly with `json` and sets.

    python -m benchmarks.evaluate

All figures are of one run on one machine; the ratio is what travels.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ffr_verl import Fragment, format_fragment
from ffr_verl.evaluation import BootstrapSettings, evaluate_file

ROWS, QUERIES, REPEATS = 20_000, 3, 5
_WORDS = re.findall(
    "[a-z]+",
    "the a we you they it is was have had will would go went see saw think thought like liked want wanted house "
    "garden dog cat train ticket friend summer winter picture camera dinner morning evening tomorrow yesterday "
    "really maybe always where when who what nice good bad small large old new and but or with from about of to in",
)
_INSTRUCTION = (
    "Answer with ids only, an empty list where nothing matches, exactly as <|utt_ids_start|>[utterance ids]"
    "<|utt_ids_end|>;<|img_ids_start|>[image ids]<|img_ids_end|>"
)


def make_rows(count: int, *, queries: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Predictions of about 3.8 kB: dialogues of 14 to 38 turns with up to 7 images, `queries` rows of each in turn.

    Half of the fragments are dense, half scattered; 15 % are empty. Two answers in five are right, three in a hundred
    malformed, and one in a hundred names an utterance that the dialogue does not have.
    """
    source = random.Random(seed)
    for number in range(count):
        if number % queries == 0:
            turns, images = source.randint(14, 38), source.randint(0, 7)
            holders = [source.randrange(turns) for _ in range(images)]
            lines, shown = [], 0
            for turn in range(turns):
                text = " ".join(source.choices(_WORDS, k=source.randint(7, 22)))
                for _ in range(holders.count(turn)):
                    text += f"<|img_id_start|>{shown}<|img_id_end|><image>"
                    shown += 1
                lines.append(f"<|utt_id_start|>{turn}<|utt_id_end|> user{turn % 2 + 1}: {text}")
            paths = [f"images/{source.getrandbits(48):012x}.jpg" for _ in range(images)]
        gold = _fragment(source, turns, images)
        answer = gold if source.random() < 0.4 else _fragment(source, turns, images)
        if source.random() < 0.01:
            answer = Fragment((*answer.utterance_ids, turns + 2), answer.image_ids)
        response = format_fragment(answer)
        if source.random() < 0.03:
            response = source.choice(["", response[:-7], "I think " + response, response.replace("]", ",]", 1)])
        query = " ".join(source.choices(_WORDS, k=9))
        prompt = f"Find what matches <|query_start|>{query}<|query_end|>.\n{_INSTRUCTION}\n\n" + "\n".join(lines)
        yield {
            "response": response,
            "labels": format_fragment(gold),
            "messages": [
                {"role": "system", "content": "You retrieve fragments from multimodal dialogues."},
                {"role": "user", "content": prompt},
            ],
            "images": paths,
            "dialogue_id": f"dialogue_{number // queries:06}",
        }


def _fragment(source: random.Random, turns: int, images: int) -> Fragment:
    if source.random() < 0.15:
        return Fragment((), ())
    size = source.randint(3, 8)
    if source.random() < 0.5:
        first = source.randrange(turns - size)
        utterances = tuple(range(first, first + size))
    else:
        utterances = tuple(sorted(source.sample(range(turns), size)))
    return Fragment(utterances, tuple(sorted(source.sample(range(images), min(images, source.randint(0, 2))))))


_OF_DIALOGUE = {kind: re.compile(rf"<\|{kind}_id_start\|>(\d+)<\|{kind}_id_end\|>") for kind in ("utt", "img")}
_OF_ANSWER = {
    kind: re.compile(rf"<\|{kind}_ids_start\|>(.*?)<\|{kind}_ids_end\|>", re.DOTALL) for kind in ("utt", "img")
}
_WHOLE = re.compile(
    r"<\|utt_ids_start\|>\[(\d+(, ?\d+)*)?\]<\|utt_ids_end\|>;<\|img_ids_start\|>\[(\d+(, ?\d+)*)?\]<\|img_ids_end\|>"
)


def straightforward(path: Path) -> dict[str, Any]:
    """Micro and macro averages, malformed answers and ids outside the dialogue, as one would write them first."""

    def ids(text: str, kind: str) -> set[int]:
        match = _OF_ANSWER[kind].search(text)
        try:
            return set(json.loads(match.group(1))) if match else set()
        except json.JSONDecodeError:
            return set()

    def metrics(tp: int, fp: int, fn: int, tn: int) -> list[float]:
        precision = tp / (tp + fp) if tp + fp else 0.0
        recall = tp / (tp + fn) if tp + fn else 0.0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        return [precision, recall, f1, (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0]

    def joint(one: list[float], other: list[float]) -> list[float]:
        harmonic = [2 * a * b / (a + b) if a + b else 0.0 for a, b in zip(one[:2], other[:2], strict=True)]
        return harmonic + [(a + b) / 2 for a, b in zip(one[2:], other[2:], strict=True)]

    summed = {"utt": [0, 0, 0, 0], "img": [0, 0, 0, 0]}
    outside = {"utt": 0, "img": 0}
    macro = {"utt": [0.0] * 4, "img": [0.0] * 4, "joint": [0.0] * 4}
    rows = malformed = 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            prompt = next(message["content"] for message in row["messages"] if message["role"] == "user")
            of_row = {}
            for kind, totals in summed.items():
                of_dialogue = {int(found) for found in _OF_DIALOGUE[kind].findall(prompt)}
                universe = set(range(max(of_dialogue, default=20) + 1))
                predicted, gold = ids(row["response"], kind), ids(row["labels"], kind)
                outside[kind] += len(predicted - of_dialogue)
                found = (
                    len(predicted & gold),
                    len(predicted - gold),
                    len(gold - predicted),
                    len(universe - predicted - gold),
                )
                for place, value in enumerate(found):
                    totals[place] += value
                of_row[kind] = metrics(*found) if predicted or gold else [1.0] * 4
            if not (_WHOLE.fullmatch(row["response"]) or ids(row["response"], "utt") or ids(row["response"], "img")):
                of_row = {kind: [0.0] * 4 for kind in of_row}  # no answer is no right answer
            of_row["joint"] = joint(of_row["utt"], of_row["img"])
            for kind, values in of_row.items():
                macro[kind] = [total + value for total, value in zip(macro[kind], values, strict=True)]
            malformed += _WHOLE.fullmatch(row["response"]) is None
            rows += 1
    micro = {kind: metrics(*totals) for kind, totals in summed.items()}
    micro["joint"] = joint(micro["utt"], micro["img"])
    means = {kind: [total / rows for total in totals] for kind, totals in macro.items()}
    return {"micro": micro, "macro": means, "malformed": malformed, "outside": sum(outside.values())}


def check(path: Path) -> None:
    """Both give the same numbers."""
    ours, theirs = evaluate_file(path, bootstrap=BootstrapSettings(resamples=0)), straightforward(path)
    for average, found in (("micro", ours.micro), ("macro", ours.macro)):
        for name, short in (("utterance", "utt"), ("image", "img"), ("joint", "joint")):
            pairs = zip(found[name].values(), theirs[average][short], strict=True)
            if any(abs(one - other) > 1e-9 for one, other in pairs):
                raise SystemExit(f"the two disagree: {found[name]} {theirs[average][short]}")
    malformed = sum(ours.malformed[name] for name in ("empty", "missing_tag", "text_outside", "bad_id_list"))
    outside = ours.ids_outside["utterance"] + ours.ids_outside["image"]
    if (malformed, outside) != (theirs["malformed"], theirs["outside"]):
        raise SystemExit(f"the two disagree: {malformed} {outside} {theirs}")


def seconds(functions: list[Callable[[], Any]]) -> list[float]:
    """The shortest time of each, of the processor, for other work may keep it; they take turns, so that a slow minute
    of the machine meets them all."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS):
        for function, found in zip(functions, times, strict=True):
            started = time.process_time()
            function()
            found.append(time.process_time() - started)
    return [min(found) for found in times]


def _peak(path: Path, queue: Any) -> None:
    evaluate_file(path)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak_bytes(path: Path) -> int:
    """Of a process that does nothing but evaluate, imports included."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(path, queue))
    process.start()
    found = int(queue.get(timeout=300))
    process.join()
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as name:
        for queries in (QUERIES, 1):
            path = Path(name) / f"{queries}.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for row in make_rows(rows, queries=queries):
                    file.write(json.dumps(row) + "\n")
            check(path)
            bare, whole, plain = seconds(
                [
                    lambda path=path: evaluate_file(path, bootstrap=BootstrapSettings(resamples=0)),  # type: ignore[misc]
                    lambda path=path: evaluate_file(path),  # type: ignore[misc]
                    lambda path=path: straightforward(path),  # type: ignore[misc]
                ]
            )
            sys.stdout.write(
                f"{rows} rows, {path.stat().st_size / 1e6:.0f} MB, {queries} of each dialogue one after another\n"
            )
            for label, value, digits in (
                ("evaluate_file, no intervals (rows/s)", rows / bare, 0),
                ("evaluate_file, 1,000 resamples (rows/s)", rows / whole, 0),
                ("straightforward (rows/s)", rows / plain, 0),
                ("ratio, no intervals", plain / bare, 2),
                ("ratio, 1,000 resamples", plain / whole, 2),
                ("peak memory of a process that evaluates (MB)", peak_bytes(path) / 1e6, 0),
            ):
                sys.stdout.write(f"  {label:52} {value:>12,.{digits}f}\n")


if __name__ == "__main__":
    main()
