"""The store: what goes in comes out, what is broken is named, what was interrupted leaves nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffr_verl import Fragment, format_fragment
from ffr_verl.embeddings import EmbeddingStore, write_store
from ffr_verl.embeddings.store import write_arrays
from ffr_verl.errors import FFRError
from ffr_verl.rewards import compute_score


def some(count: int = 5, dimension: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {f"utt:d:{number}": random.normal(size=dimension).astype(np.float32) for number in range(count)}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", some().items(), model="toy", revision="1")
    return tmp_path / "store"


@given(st.sets(st.text(max_size=12), min_size=1, max_size=40), st.sampled_from(["float16", "float32"]))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, keys: set[str], dtype: Any) -> None:
    """Any keys: empty, of other scripts, with line ends and NUL, one the beginning of another."""
    folder = tmp_path_factory.mktemp("store") / "s"
    values = {key: np.array([index, -index, 0.5], dtype=dtype) for index, key in enumerate(keys)}
    write_store(folder, values.items(), model="toy", dtype=dtype)
    opened = EmbeddingStore.open(folder, verify=True)
    assert set(opened) == keys
    assert len(opened) == len(keys)
    for key, value in values.items():
        assert np.array_equal(opened[key], value)
        assert opened[key].dtype == dtype
        assert (key + "x" in opened) == (key + "x" in keys)
    assert opened.get("\x00no such key") is None
    with pytest.raises(KeyError, match="no such key"):
        opened["\x00no such key"]


def test_manifest(store: Path) -> None:
    manifest = EmbeddingStore.open(store).manifest
    assert (manifest.model, manifest.revision, manifest.dimension, manifest.dtype) == ("toy", "1", 4, "float32")
    assert (manifest.vectors, manifest.keys, manifest.normalized, manifest.modalities) == (5, 5, False, ("text",))
    assert len(manifest.content_hash) == 64


def test_same_vectors_same_bytes(tmp_path: Path) -> None:
    for name, items in (("a", list(some().items())), ("b", list(some().items()))):
        write_store(tmp_path / name, items, model="toy")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_vectors_are_mapped_and_read_only(store: Path) -> None:
    """The kernel shares the pages of a mapped file between processes."""
    vectors = EmbeddingStore.open(store).vectors
    base = vectors
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert type(getattr(base, "obj", base)).__name__ == "mmap"
    with pytest.raises(ValueError, match="read-only"):
        vectors[0, 0] = 1.0


def test_opening_reads_no_vectors(tmp_path: Path) -> None:
    """A sparse file of 40 GB opens at once."""
    folder = tmp_path / "store"
    write_store(folder, some(1, 1024).items(), model="toy")
    manifest = EmbeddingStore.open(folder).manifest
    large = dataclasses.replace(manifest, vectors=10_000_000)
    (folder / "manifest.json").write_text(large.to_json())
    os.truncate(folder / "vectors.bin", 10_000_000 * 1024 * 4)
    opened = EmbeddingStore.open(folder)
    assert opened.vectors.shape == (10_000_000, 1024)
    assert opened.vectors[9_999_999, 7] == 0.0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: (s / "manifest.json").unlink(), "no embedding store: manifest.json is missing"),
        (lambda s: (s / "manifest.json").write_text("{"), r"manifest\.json: cannot be read"),
        (lambda s: (s / "manifest.json").write_bytes(b"\xff\xfe"), r"manifest\.json: cannot be read"),
        (lambda s: (s / "manifest.json").write_text("[]"), "not the manifest of an embedding store"),
        (lambda s: edit(s, dimension=8), r"manifest\.json: was edited"),
        (lambda s: edit(s, model="other"), r"manifest\.json: was edited"),
        (lambda s: edit(s, checksum="0"), r"manifest\.json: was edited"),
        (lambda s: edit(s, format_version=9), r"format version 9, this ffr-verl reads 1"),
        (lambda s: os.truncate(s / "vectors.bin", 79), r"vectors\.bin: truncated: 79 bytes, the manifest says 80"),
        (lambda s: os.truncate(s / "vectors.bin", 81), r"vectors\.bin: too long: 81 bytes"),
        (lambda s: os.truncate(s / "keys.bin", 3), r"keys\.bin: truncated"),
        (lambda s: os.truncate(s / "rows.bin", 0), r"rows\.bin: truncated"),
        (lambda s: (s / "offsets.bin").unlink(), r"offsets\.bin: is missing"),
    ],
)
def test_a_broken_store_is_named(store: Path, spoil: Any, message: str) -> None:
    spoil(store)
    with pytest.raises(FFRError, match=message) as caught:
        EmbeddingStore.open(store)
    assert "ffr-verl embed" in str(caught.value) or "edited" in message


def edit(store: Path, **values: Any) -> None:
    file = store / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_missing_folder_and_file_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(FFRError, match="no such folder"):
        EmbeddingStore.open(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FFRError, match="a file, but an embedding store is a folder"):
        EmbeddingStore.open(tmp_path / "file")


def test_changed_vectors_are_found_by_verify(store: Path) -> None:
    data = bytearray((store / "vectors.bin").read_bytes())
    data[5] ^= 1
    (store / "vectors.bin").write_bytes(data)
    EmbeddingStore.open(store)
    with pytest.raises(FFRError, match="its content hash differs"):
        EmbeddingStore.open(store, verify=True)


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        ([("a", np.ones(3)), ("b", np.ones(4))], {}, "key b: dimension 4, the first vector has 3"),
        ([("a", np.array([1.0, np.nan]))], {}, "key a: .* expected a 1-d array of finite numbers"),
        ([("a", np.ones((2, 2)))], {}, "key a: .*shape \\(2, 2\\)"),
        ([("a", np.array(["x"]))], {}, "key a: "),
        ([("a", np.array([]))], {}, "key a: dimension 0"),
        ([("a", np.array([1e6]))], {"dtype": "float16"}, "vector 0 holds a number that is not finite in float16"),
        ([("a", np.ones(2)), ("a", np.ones(2))], {}, "key a is given twice"),
        ([], {}, "no vectors were given"),
        ([("a", np.ones(2))], {"dtype": "int8"}, "dtype 'int8', expected one of float16, float32"),
    ],
)
def test_bad_vectors_are_refused_and_nothing_is_left(tmp_path: Path, vectors: Any, options: Any, message: str) -> None:
    with pytest.raises(FFRError, match=message):
        write_store(tmp_path / "store", vectors, model="toy", **options)
    assert not list(tmp_path.iterdir())


def test_a_key_must_name_a_row_that_exists(tmp_path: Path) -> None:
    with pytest.raises(FFRError, match="key a names row 1 of 1"):
        write_arrays(tmp_path / "s", rows=[np.ones((1, 2))], index=[("a", 1)], dimension=2, model="toy")


@pytest.mark.parametrize("rows", [[np.ones((1, 3))], [np.ones((2, 2)), np.ones((1, 3))], [np.ones(2)]])
def test_rows_of_another_dimension_are_refused(tmp_path: Path, rows: Any) -> None:
    """They would make a file of another size, which nothing could open."""
    with pytest.raises(FFRError, match=r"s: found vectors of shape .* from row \d+ on, expected \(any, 2\)"):
        write_arrays(tmp_path / "s", rows=rows, index=[("a", 0)], dimension=2, model="toy")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_kept(store: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    with pytest.raises(FFRError, match="is there already"):
        write_store(store, some(2).items(), model="other")
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before
    write_store(store, some(2).items(), model="other", overwrite=True)
    assert EmbeddingStore.open(store, verify=True).manifest.model == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    with pytest.raises(FFRError, match="holds something that is no embedding store"):
        write_store(tmp_path / "thesis", some(2).items(), model="other", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_its_place_is_kept(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "store").write_text("x")
    with pytest.raises(FFRError, match="store: is a file, but an embedding store is a folder"):
        write_store(tmp_path / "store", some(2).items(), model="toy", overwrite=overwrite)
    assert (tmp_path / "store").read_text() == "x"


def test_an_error_while_replacing_keeps_the_old_store(store: Path, tmp_path: Path) -> None:
    def failing() -> Any:
        yield "a", np.ones(3)
        raise RuntimeError("the encoder died")

    with pytest.raises(RuntimeError, match="the encoder died"):
        write_store(store, failing(), model="other", overwrite=True)
    assert EmbeddingStore.open(store, verify=True).manifest.model == "toy"
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_killed_writer_leaves_nothing_that_opens(tmp_path: Path) -> None:
    program = (
        "import sys, time, numpy as np\n"
        "from ffr_verl.embeddings import write_store\n"
        "def vectors():\n"
        "    for number in range(10**9):\n"
        "        if number == 5000: print('writing', flush=True)\n"
        "        if number > 5000: time.sleep(1)\n"
        "        yield str(number), np.ones(8)\n"
        "write_store(sys.argv[1], vectors(), model='toy')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "store")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "store").exists()
    left = list(tmp_path.iterdir())
    assert left, "killed while writing"
    for folder in left:
        with pytest.raises(FFRError):
            EmbeddingStore.open(folder)
    write_store(tmp_path / "store", some().items(), model="toy")
    assert len(EmbeddingStore.open(tmp_path / "store")) == 5


def test_a_store_travels_to_another_process_by_its_path(store: Path) -> None:
    copy = pickle.loads(pickle.dumps(EmbeddingStore.open(store)))
    assert np.array_equal(copy["utt:d:3"], some()["utt:d:3"])


def _scores(path: str, seed: int) -> list[float]:
    """Scores of 400 answers, by eight threads over one store."""

    def one(number: int) -> float:
        random = np.random.default_rng(seed * 1000 + number)
        dialogue = number % 37
        fragment = Fragment(tuple(random.integers(0, 20, 6).tolist()), ())
        info = {
            "dialogue_id": str(dialogue),
            "utterance_ids": list(range(20)),
            "image_utterances": [],
            "images": [],
        }
        answer = format_fragment(fragment)
        return compute_score("", answer, answer, info, embeddings=path)["coherence"]

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(one, range(400)))


def test_eight_threads_in_two_processes_give_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache so small that dialogues are thrown out while others read them."""
    random = np.random.default_rng(0)
    keys = [f"utt:{dialogue}:{number}" for dialogue in range(37) for number in range(20)]
    write_store(tmp_path / "store", ((key, random.normal(size=32)) for key in keys), model="toy", normalize=True)
    monkeypatch.setattr("ffr_verl.rewards.coherence._MOST_COSINES", 300)
    path = str(tmp_path / "store")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply_async(_scores, (path, 1))
        here = _scores(path, 1)
        assert there.get(timeout=60) == here
    opened = EmbeddingStore.open(path)
    expected = []
    for number in range(400):
        generator = np.random.default_rng(1000 + number)
        ids = sorted(set(generator.integers(0, 20, 6).tolist()))
        rows = [opened[f"utt:{number % 37}:{identifier}"].astype(float) for identifier in ids]
        pairs = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.pairwise(rows)]
        expected.append(float(np.mean(pairs)) if pairs else 0.5)
    assert here == pytest.approx(expected, abs=1e-6)
