"""One bit of a file of ours is another: the reader names the file, or what it reads is equal. Never another result."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ATTACKS, judged

from ffr_verl.data.parquet_files import (
    Kind,
    check_columns,
    check_pages,
    read_schema,
    recorded_family,
    recorded_root,
    rows_of_files,
)
from ffr_verl.embeddings import EmbeddingStore, write_store
from ffr_verl.inference.journal import AnswerJournal
from ffr_verl.samplers.difficulty_file import DifficultyFile, difficulty_table, row_keys, write_difficulty


def flips(file: Path, source: random.Random, count: int) -> Any:
    """The file with one bit changed, so often; as it was at the end."""
    good = file.read_bytes()
    for _ in range(count):
        changed = bytearray(good)
        changed[source.randrange(len(good))] ^= 1 << source.randrange(8)
        file.write_bytes(changed)
        yield
    file.write_bytes(good)


@pytest.mark.parametrize("name", ["t.rl", "t.sft", "held.rl", "held.sft"])
def test_data_files(small: Path, tmp_path: Path, source: random.Random, name: str) -> None:
    file = tmp_path / f"{name}.parquet"
    shutil.copy(small / file.name, file)
    kind: Kind = "rl" if name.endswith("rl") else "sft"

    def read() -> Any:
        check_columns([str(file)], kind)
        check_pages([file])
        return read_schema(file), recorded_root(file), recorded_family(file), list(rows_of_files([file]))

    good = read()
    for _ in flips(file, source, ATTACKS):
        judged(f"bit flips, {name}.parquet", read, good, file)


def test_difficulty_files(small: Path, tmp_path: Path, source: random.Random) -> None:
    file, data = tmp_path / "d.parquet", [small / "t.rl.parquet"]
    answers = [{"response": "", "logprobs": [-0.5]}] * 16
    write_difficulty(difficulty_table(rows_of_files(data), answers, model="m"), file)
    keys = row_keys(data)

    def read() -> Any:
        found = DifficultyFile(file)
        rows = found.of_rows(keys, name="data")
        return [values.tolist() for values in (rows.f1, rows.entropy, rows.levels, found.mean_hits)]

    good = read()
    for _ in flips(file, source, ATTACKS):
        judged("bit flips, difficulty file", read, good, file)


INDEX = ["manifest.json", "keys.bin", "offsets.bin", "rows.bin"]


@pytest.mark.parametrize(
    ("name", "verify"), [("vectors.bin", True), *[(name, verify) for name in INDEX for verify in (True, False)]]
)
def test_stores(tmp_path: Path, source: random.Random, name: str, verify: bool) -> None:
    """Without the check before a run the vectors are not compared, everything else is."""
    folder = tmp_path / "store"
    write_store(folder, [(f"utt:d:{number}", np.eye(8)[number]) for number in range(8)], model="toy")

    def read() -> Any:
        store = EmbeddingStore.open(folder, verify=verify)
        return store.manifest, {key: store[key].tolist() for key in store}

    good = read()
    for _ in flips(folder / name, source, ATTACKS):
        judged(f"bit flips, store{'' if verify else ' not verified'}, {name}", read, good, folder)


@pytest.mark.parametrize("name", ["answers.jsonl", "work.json"])
def test_answers_of_an_interrupted_run(tmp_path: Path, source: random.Random, name: str) -> None:
    """The last line may be taken for one that was not finished, and is asked again."""
    folder, answers = tmp_path / "a", [(row, {"response": f"[{row}]", "logprobs": [-0.5]}) for row in range(4)]

    def read() -> Any:
        with AnswerJournal(folder, {"model": "m"}, rows=4) as journal:
            journal.append([answers[row] for row in range(4) if row not in journal])
            return list(journal.records())

    good = read()
    for _ in flips(folder / name, source, ATTACKS):
        judged(f"bit flips, {name}", read, good, folder)
