"""Reading rows in the MLDR format, from a JSON list or JSONL, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ffr_verl.errors import FFRError

__all__ = ["read_rows"]


def _starts_a_list(path: Path) -> bool:
    with path.open("rb") as file:
        while byte := file.read(1):
            if not byte.isspace() and byte not in b"\xef\xbb\xbf":
                return byte == b"["
    return False


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    with path.open(encoding="utf-8-sig") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise FFRError(f"{path}: line {line_number}: not JSON ({error.msg} at column {error.colno})") from None
            number += 1


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(row number from 0, row)` of a file of MLDR rows; whether it is a list or JSONL is seen from its first
    byte.

    Raises:
        FFRError: for a missing file, another encoding than UTF-8, broken JSON (with line and column) or a row that is
            no object.
    """
    if not path.is_file():
        raise FFRError(f"{path}: no such file; give a JSON list or JSONL of MLDR rows")
    try:
        if _starts_a_list(path):
            try:
                rows: Iterator[tuple[int, Any]] = enumerate(json.loads(path.read_text(encoding="utf-8-sig")))
            except json.JSONDecodeError as error:
                raise FFRError(
                    f"{path}: line {error.lineno}: not JSON ({error.msg} at column {error.colno})"
                ) from None
        else:
            rows = _lines(path)
        for number, row in rows:
            if not isinstance(row, dict):
                raise FFRError(
                    f"{path}: row {number}: found {type(row).__name__}, expected an object with the MLDR fields"
                )
            yield number, row
    except UnicodeDecodeError as error:
        raise FFRError(f"{path}: not UTF-8 at byte {error.start}; convert it, for example with iconv") from None
