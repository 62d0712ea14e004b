"""Where rows come from: the formats that `ffr-verl prepare` and `inspect` read. Another format is one more entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ffr_verl.data.sources.raw_dialogues import rows_of_raw_dialogue


@dataclass(frozen=True, slots=True)
class Source:
    """A format of rows."""

    about: str  # what its rows are, for the help text
    field: str  # that its rows have and those of no other format
    # Makes rows of the MLDR format of one of its rows, given as keywords a `template` (or `None`) and whether to write
    # `captions`; raises `RawDialogueError` for what is wrong with the row.
    rows: Callable[..., Iterable[Mapping[str, Any]]]
    has_prompts: bool = False  # its rows bring their prompts; a template and captions are then refused


def _as_it_is(row: Mapping[str, Any], **_: Any) -> Iterable[Mapping[str, Any]]:
    return (row,)


SOURCES: Mapping[str, Source] = {
    "mldr": Source("rows with prompts", "messages", _as_it_is, has_prompts=True),
    "dialogue": Source("raw dialogues with queries and gold turns", "dialogue", rows_of_raw_dialogue),
}

if TYPE_CHECKING:
    SourceFormat = str
else:
    SourceFormat = Literal[tuple(SOURCES)]  # the choices of --format


def source_of(row: Mapping[str, Any]) -> Source:
    """The format of a row, told by its fields; that of MLDR rows where they do not tell."""
    return next((source for source in SOURCES.values() if source.field in row), SOURCES["mldr"])
