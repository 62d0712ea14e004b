"""What a format of rows is: `Source`, and what is told beside its rows."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ffr_verl.data.checks.unread_fields import unread_fields
from ffr_verl.errors import FFRError
from ffr_verl.files import GZIP, disk_errors, read_text

DEFAULT_GAP_HOURS = 8.0
_PROBED = 2**18  # bytes
_KEY = re.compile(r'(?<!\\)"(\w+)"\s*:')
_JSON = re.compile(r"\s*(?:\{|\[\s*(?:\{|\]|\Z))")


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """How files are read.

    Attributes:
        image_files: local file of a picture, below the images root, by the address, id or name that rows have for it.
        gap_hours: a chat export is cut where nobody wrote for so long; 0 leaves it whole.
    """

    image_files: Mapping[str, str] = field(default_factory=dict)
    gap_hours: float = DEFAULT_GAP_HOURS

    def __post_init__(self) -> None:
        if not self.gap_hours >= 0:
            raise FFRError(f"--gap-hours: found {self.gap_hours}; give hours from 0 (a chat stays whole)")


class Notes:
    """What of a dialogue its rows do not hold, and how often: `left_out`."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()

    def leave(self, what: str, count: Any = 1) -> None:
        """Something is not in the rows; `count` is how often, or the things themselves in a list."""
        number = (
            len(count) if isinstance(count, (list, tuple)) else int(bool(count)) if type(count) is not int else count
        )
        if number > 0:
            self.left_out[what] += number

    def unread(self, value: Mapping[str, Any], read: frozenset[str], said: Sequence[str]) -> None:
        """Tell the fields that look like content and are not read, see `unread_fields`."""
        if not value.keys() <= read:
            for name, _ in unread_fields(value, read, said):
                self.leave(f"field not read, {name}")

    def picture(self, names: Sequence[Any], caption: Any, settings: ReadSettings) -> Any:
        """A picture as a piece of a turn: its file, where `settings` name one for any of its `names`, and else a mark
        with its caption; nothing is fetched."""
        known = [str(name) for name in names if name is not None and name != ""]
        caption = caption.strip() if isinstance(caption, str) else ""
        found = next((settings.image_files[name] for name in known if name in settings.image_files), None)
        if found is not None:
            return {"image_url": found, "caption": caption or None}
        self.leave("pictures without a file, a mark stands for each (--image-map)")
        return f"[picture: {caption}]" if caption else "[picture]"


class Probe(NamedTuple):
    """What tells the format of a file.

    Attributes:
        path: the file or folder.
        text: its start, decoded as far as that goes; empty for a folder or what cannot be read.
        keys: of the JSON objects in the start.
    """

    path: Path
    text: str
    keys: frozenset[str]

    @classmethod
    def of(cls, path: Path) -> Probe:
        """Look at the start of a file."""
        start = b""
        if path.is_file():
            with disk_errors(path, "give a file that can be read"), path.open("rb") as file:
                start = file.read(_PROBED)
            if start.startswith(GZIP):
                try:
                    with gzip.open(path) as packed:
                        start = packed.read(_PROBED)
                except (OSError, EOFError, zlib.error):  # the reader says what is wrong
                    start = b""
        text = start.decode("utf-8-sig", "replace")
        return cls(path, text, frozenset(_KEY.findall(text)) if _JSON.match(text) else frozenset())

    @property
    def is_json(self) -> bool:
        """Whether it starts as objects in JSON do."""
        return _JSON.match(self.text) is not None


# Number of each row of a file, from 0, and the row; told how many bytes have been read.
Records = Callable[[Path, ReadSettings, Callable[[int], None]], Iterator[tuple[int, dict[str, Any]]]]


def _never(probe: Probe) -> bool:
    return False


def _as_it_is(number: int, row: Mapping[str, Any], settings: ReadSettings, notes: Notes) -> Mapping[str, Any]:
    return row


@dataclass(frozen=True, slots=True)
class Source:
    """A format of rows.

    Attributes:
        about: what its rows are, in some words.
        example: a row, as it stands in a file.
        records: reads the rows of a file, see `Records`; an `FFRError` for a file that cannot be read.
        dialogue: makes a raw dialogue (`ffr_verl.data.sources.raw_dialogues`) of a row, given its number, and tells
            the notes what it leaves out; raises `RawDialogueError` for what is wrong with the row.
        fits: whether a file is of this format, as far as its start tells.
        leaves: what of its rows is never read.
        has_gold: whether its dialogues bring queries and gold turns; without them they are for `--unlabelled`.
        has_prompts: whether its rows bring their prompts (MLDR); a template and captions are then refused.
    """

    about: str
    example: str
    records: Records
    dialogue: Callable[[int, Mapping[str, Any], ReadSettings, Notes], Mapping[str, Any]] = _as_it_is
    fits: Callable[[Probe], bool] = _never
    leaves: str = ""
    has_gold: bool = False
    has_prompts: bool = False

    @classmethod
    def of_function(cls, function: Callable[[Path], Iterable[Mapping[str, Any]]]) -> Source:
        """A format whose reader is one function: from a path to raw dialogues, each with what it leaves out as
        `left_out`, a mapping to numbers, if there is anything."""

        def records(
            path: Path, settings: ReadSettings, on_position: Callable[[int], None]
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            for number, row in enumerate(function(path)):
                if not isinstance(row, Mapping):
                    raise FFRError(
                        f"{path}: row {number}: found {type(row).__name__}, expected a raw dialogue (docs/data.md)"
                    )
                left_out = row.get("left_out") or {}
                if not isinstance(left_out, Mapping) or not all(type(one) is int for one in left_out.values()):
                    raise FFRError(
                        f"{path}: row {number}: left_out: found {left_out!r:.60}, expected {{what: number}}"
                    )
                yield number, dict(row)

        about = (function.__doc__ or "").strip().split("\n")[0] or "raw dialogues"
        return cls(about, "", records, take_left_out, has_gold=True)


def take_left_out(number: int, row: Mapping[str, Any], settings: ReadSettings, notes: Notes) -> Mapping[str, Any]:
    """A raw dialogue without its `left_out`, which the notes are told."""
    left_out = row.get("left_out")
    for what, count in (left_out or {}).items():
        notes.leave(what, count)
    return {name: value for name, value in row.items() if name != "left_out"}


def read_image_map(path: Path) -> dict[str, str]:
    """The files of pictures by address, id or name: a JSON object, or lines of address, tab, file.

    Raises:
        FFRError: for a file that is neither.
    """
    mend = "give a JSON object {address: file}, or lines of address, tab, file"
    text = read_text(path, mend=mend, option="--image-map")
    try:
        if text.lstrip().startswith("{"):
            found = json.loads(text)
        else:
            lines = [line.split("\t") for line in text.splitlines() if line.strip()]
            found = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
            wrong = next((number for number, line in enumerate(lines, start=1) if len(line) != 2), None)
            if wrong is not None:
                raise FFRError(f"--image-map {path}: line {wrong}: no tab in it; {mend}")
    except (ValueError, RecursionError) as error:
        if isinstance(error, FFRError):
            raise
        raise FFRError(f"--image-map {path}: {error}; {mend}") from None
    if not isinstance(found, dict) or not all(isinstance(file, str) and file for file in found.values()):
        raise FFRError(f"--image-map {path}: a value is no text; {mend}")
    return found
