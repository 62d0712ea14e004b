"""Rows come out of lists and lines, plain and gzipped, whatever the blocks cut through."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ffr_verl.data.sources import json_rows
from ffr_verl.data.sources.json_rows import read_rows

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROWS = st.lists(st.dictionaries(TEXTS, st.one_of(TEXTS, st.integers(), st.lists(TEXTS, max_size=3)), max_size=3))


def rows_of(path: Path) -> list[Any]:
    numbers, rows = list(zip(*read_rows(path), strict=True)) or [(), ()]
    assert list(numbers) == list(range(len(rows)))
    return list(rows)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=ROWS,
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    mark=st.sampled_from(["", "\ufeff"]),
    block=st.sampled_from([1, 7, 2**20]),
    packed=st.booleans(),
)
def test_what_is_written_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any],
    indent: int | None,
    ascii_only: bool,
    mark: str,
    block: int,
    packed: bool,
) -> None:
    monkeypatch.setattr(json_rows, "_BLOCK", block)
    as_list = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    as_lines = "\n\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows) + "\n"
    for text in (as_list, as_lines):
        data = (mark + text).encode()
        (tmp_path / "rows").write_bytes(gzip.compress(data) if packed else data)
        assert (rows_of(tmp_path / "rows") if rows else []) == rows


def test_positions_grow_to_the_size_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 1000}) + "\n" for _ in range(100)))
    positions: list[int] = []
    assert len(list(read_rows(path, on_position=positions.append))) == len(positions) == 100
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, lines: bool, packed: bool) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / "rows"
        texts = [json.dumps({"text": "x" * 2000, "number": number}) for number in range(rows)]
        text = "\n".join(texts) if lines else "[" + ",\n".join(texts) + "]"
        path.write_bytes(gzip.compress(text.encode(), 1) if packed else text.encode())
        del texts, text
        tracemalloc.start()
        for _ in read_rows(path):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(8_000) < 1.2 * peak(2_000) < 20e6


def test_a_row_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_LARGEST_ROW", 10_000)
    monkeypatch.setattr(json_rows, "_BLOCK", 1000)
    path = tmp_path / "rows"
    for text, message in (
        ('[\n{"a": "' + "x" * 50_000, "the row at line 2: longer than 0 MiB; a file is a JSON list, or JSONL with"),
        ('{"a": "' + "x" * 50_000 + '"}', "line 1: longer than 0 MiB; a file is a JSON list, or JSONL with one row a"),
    ):
        path.write_text(text)
        with pytest.raises(Exception, match=message):
            list(read_rows(path))
