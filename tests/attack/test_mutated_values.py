"""Foreign values at each door: a row, a column, a prediction, a manifest with something else in some place. Each door
takes it, or says what is wrong with it in a message; no other exception, and nothing that is not there to be read."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ATTACKS, HELD, outcome

from ffr_verl.data.checks.other_splits import OtherSplits
from ffr_verl.data.inspection import render_row
from ffr_verl.data.parquet_files import check_columns, check_images, check_pages, images_root, rows_of_files
from ffr_verl.embeddings import EmbeddingStore, write_store
from ffr_verl.embeddings.plan import make_plan
from ffr_verl.embeddings.store import StoreManifest
from ffr_verl.inference.rows import AskedRows
from ffr_verl.samplers.difficulty_file import DifficultyFile, difficulty_table, row_keys
from ffr_verl.settings import DataConfig

Command = Callable[..., int]
ODD: list[Any] = [None, True, -1, 2**63, 1e400, 1.5, "", "x", "\0", "\ud83d", "../../etc/passwd", "http://x.org/a.png"]
ODD += [[], {}, [None], [[1]], ["x"], {"a": 1}, {"path": 5}, "[" * 2000, "٣", "<image>", "<|utt_ids_start|>[1"]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*at, key)
        yield from places(one, (*at, key))


def mutated(row: Any, source: random.Random, *, at: tuple[Any, ...] | None = None, by: Any = ...) -> Any:
    """The row with something else in a place, or nothing."""
    row, path = copy.deepcopy(row), at or source.choice(list(places(row)))
    inner = row
    for key in path[:-1]:
        inner = inner[key]
    if by is ...:
        by = source.choice([*ODD, ...])
    if by is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = copy.deepcopy(by)
    return row


def told(kind: str, attempt: Callable[[], Any]) -> None:
    """An attempt that may be refused by an `FFRError`."""
    error, _ = outcome(attempt)
    assert error != ""
    HELD[f"{kind}: {'taken' if error is None else 'told'}"] += 1


RAW = {
    "dialogue_id": "w1",
    "dialogue": [
        {"speaker": "Ann", "utterance": "look at him"},
        {"speaker": "Bob", "utterance": [{"image_url": "images_heldout/x.png", "caption": "a cat"}]},
    ],
    "query_text": "the cat",
    "gt_turns": [1],
}


@pytest.mark.parametrize("kind", ["mldr", "dialogue"])
def test_rows_of_sources(demo_set: Path, tmp_path: Path, source: random.Random, command: Command, kind: str) -> None:
    image = next((demo_set / "images_heldout").iterdir())
    rows = json.loads((demo_set / "heldout.json").read_text())
    if kind == "dialogue":
        rows = [
            mutated(RAW, source, at=("dialogue", 1, "utterance", 0, "image_url"), by=f"images_heldout/{image.name}")
        ]
    for _ in range(ATTACKS):
        file = tmp_path / "s.jsonl"
        file.write_text(json.dumps(mutated(source.choice(rows), source)) + "\n")
        options = ("--images-root", demo_set, "--output", tmp_path / "out", "--split", "t", "--format", kind)
        refused = command("prepare", file, *options)
        HELD[f"mutated rows, {kind}: {'told' if refused else 'taken'}"] += 1
        assert not refused or not list((tmp_path / "out").glob("*"))
        for path in (tmp_path / "out").glob("*"):
            path.unlink()


def test_predictions(small: Path, tmp_path: Path, source: random.Random, command: Command) -> None:
    rows = [json.loads(line) for line in (small / "pred.jsonl").read_text().splitlines()]
    file = tmp_path / "p.jsonl"
    for number in range(ATTACKS):
        changed = [mutated(one, source) if place == number % 16 else one for place, one in enumerate(rows)]
        file.write_text("".join(json.dumps(one) + "\n" for one in changed))
        for arguments in (
            ("evaluate", file, "--bootstrap", 0),
            ("report", file, "--output", tmp_path / "r.html", "--force", "--images-root", small),
            ("score", "--predictions", file, "--data", small / "t.rl.parquet", "--output", tmp_path / "d", "--force"),
        )[: 3 if number % 8 == 0 else 1]:
            status = command(*arguments)
            HELD[f"mutated predictions, {arguments[0]}: {'told' if status else 'taken'}"] += 1


def changed_table(table: pa.Table, source: random.Random) -> pa.Table | None:
    """The table with a value changed in one row, or in all of them; `None` where parquet has no type for it."""
    rows = table.to_pylist()
    paths = list(places(rows[0]))
    path, by = source.choice(paths), source.choice(ODD)
    everywhere = source.random() < 0.7
    for number, row in enumerate(rows):
        if everywhere or number == 3:
            try:
                rows[number] = mutated(row, source, at=path, by=by)
            except (KeyError, IndexError, TypeError):
                continue
    try:
        changed = pa.Table.from_pylist(rows).replace_schema_metadata(table.schema.metadata)
        pq.write_table(changed, pa.BufferOutputStream())
        return changed
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
        return None


def read_everywhere(file: Path, kind: str) -> Iterator[Callable[[], Any]]:
    """What commands and training do with a data file before a model is asked."""
    name = str(file)
    yield lambda: render_row(file, 3)
    yield lambda: OtherSplits([file])
    yield lambda: (check_columns([name], kind), check_pages([name]))  # type: ignore[arg-type]
    yield lambda: (
        check_columns([name], kind),  # type: ignore[arg-type]
        check_images([name], images_root([name], DataConfig()), sample=False, max_pixels=10**6),
    )
    if kind == "rl":
        answers = [{"response": "", "logprobs": []}] * 16
        yield lambda: make_plan([file])
        yield lambda: (check_columns([name], "rl"), row_keys([file]))
        yield lambda: (check_columns([name], "rl"), AskedRows([file]).survey(max_images=8))
        yield lambda: (check_columns([name], "rl"), difficulty_table(rows_of_files([file]), answers, model="m"))


@pytest.mark.parametrize("name", ["t.rl", "t.sft", "held.rl"])
def test_columns_of_data_files(small: Path, tmp_path: Path, source: random.Random, name: str) -> None:
    table = pq.read_table(small / f"{name}.parquet")
    for _ in range(ATTACKS):
        changed = changed_table(table, source)
        if changed is None:
            continue
        pq.write_table(changed, tmp_path / "c.parquet")
        for read in read_everywhere(tmp_path / "c.parquet", name.split(".")[1]):
            told(f"mutated columns, {name}.parquet", read)


def test_columns_of_difficulty_files(small: Path, tmp_path: Path, source: random.Random) -> None:
    data, file = [small / "t.rl.parquet"], tmp_path / "d.parquet"
    answers, keys = [{"response": "", "logprobs": []}] * 16, row_keys(data)
    table = difficulty_table(rows_of_files(data), answers, model="m")
    for _ in range(ATTACKS):
        if (changed := changed_table(table, source)) is not None:
            pq.write_table(changed, file)
            told("mutated columns, difficulty file", lambda: DifficultyFile(file).of_rows(keys, name="data"))


def test_manifests_and_indexes(tmp_path: Path, source: random.Random) -> None:
    """With a checksum that fits, as who means it would write them."""
    folder = tmp_path / "store"
    write_store(folder, [(f"utt:d:{number}", np.eye(8)[number]) for number in range(8)], model="toy")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    good = EmbeddingStore.open(folder).manifest
    fields = [name for name in good.__dataclass_fields__ if name != "format_version"]

    def read() -> None:
        store = EmbeddingStore.open(folder)
        for key in store:
            store.get(key)

    for number in range(ATTACKS):
        values = {name: getattr(good, name) for name in fields}
        values["index_hash"] = None
        if number % 2:
            values[source.choice(fields)] = source.choice([*ODD, 0, 2, 8, 2**62])
        else:
            name = source.choice(["rows.bin", "offsets.bin", "keys.bin"])
            odd = np.frombuffer(files[name], dtype="u1").copy()
            odd[source.randrange(len(odd))] = source.choice([0, 1, 127, 128, 255])
            (folder / name).write_bytes(odd.tobytes())
        with contextlib.suppress(TypeError, UnicodeEncodeError):  # no JSON
            (folder / "manifest.json").write_text(StoreManifest(**values).to_json())
        told("crafted manifests and indexes", read)
        for name, data in files.items():
            (folder / name).write_bytes(data)
