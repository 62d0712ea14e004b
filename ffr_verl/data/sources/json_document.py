"""One JSON object a file, over as many lines as it likes: such as exports of chats. It is held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ffr_verl.data.sources.json_rows import read_rows, read_value
from ffr_verl.data.sources.source import Probe, ReadSettings
from ffr_verl.errors import FFRError


def read_object(path: Path, *, expected: str) -> dict[str, Any]:
    """The object of a file.

    Args:
        path: the file.
        expected: what it should be, for messages.

    Raises:
        FFRError: for a file that holds anything else, or is cut off.
    """
    found = read_value(path, mend=expected)
    if not isinstance(found, dict):
        raise FFRError(f"{path}: found a {type(found).__name__}, expected an object; give {expected}")
    return found


def records_of_rows(
    path: Path, settings: ReadSettings, on_position: Callable[[int], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON list or JSONL."""
    return read_rows(path, on_position=on_position)


def rows_or_object(
    path: Path, settings: ReadSettings, on_position: Callable[[int], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON list or JSONL, or one object that is a row."""
    text = Probe.of(path).text.lstrip()
    if text.startswith("{") and not text.split("\n", 1)[0].rstrip().endswith("}"):
        yield 0, read_object(path, expected="a JSON list, JSONL, or one object")
    else:
        yield from read_rows(path, on_position=on_position)
