"""What readers of public data sets share: fields of a row, with errors that name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ffr_verl.data.checks.problems import ProblemKind
from ffr_verl.data.sources.raw_dialogues import RawDialogueError


def wrong(field: str, found: Any, expected: str) -> RawDialogueError:
    """The error of a field that is missing or of another type."""
    kind = ProblemKind.MISSING_FIELD if found is None else ProblemKind.WRONG_TYPE
    what = "missing" if found is None else f"found {str(found)[:80]!r}"
    return RawDialogueError([(kind, field, f"{what}; expected {expected}")])


def list_of(row: Mapping[str, Any], name: str, place: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and value of each object of a list in a row; an empty list is an error.

    Raises:
        RawDialogueError: when there is no such list, or something else in it.
    """
    field = f"{place}.{name}" if place else name
    values = row.get(name)
    if not isinstance(values, list) or not values:
        raise wrong(field, None if values == [] else values, "a list of objects, at least one")
    for number, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise wrong(f"{field}[{number}]", value, "an object")
        yield f"{field}[{number}]", value


def text_of(row: Mapping[str, Any], name: str, place: str = "") -> str:
    """A text of a row; empty where it is missing.

    Raises:
        RawDialogueError: when it is no text.
    """
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise wrong(f"{place}.{name}" if place else name, value, "a text")
    return value.strip()
