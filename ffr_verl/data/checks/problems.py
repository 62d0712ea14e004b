"""What can be wrong with a row, and the account of it: a table by kind, a report in JSON, the rejected rows."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ffr_verl.errors import printable
from ffr_verl.fragments import Fragment, format_fragment

_ROWS, _OF_A_ROW = 3, 2  # of how many rows, and of each row how many problems of one kind are kept
_HEAD, _TAIL = 120, 240  # of a long message; its reason stands at the end


class ProblemKind(str, enum.Enum):
    """Kinds of problems; the values are names for reports."""

    mend: str  # what to do about it
    is_error: bool  # a row is refused for it; otherwise it is a warning

    def __new__(cls, value: str, mend: str, is_error: bool = True) -> ProblemKind:
        """A member of its value, mend and whether it is an error."""
        kind = str.__new__(cls, value)
        kind._value_, kind.mend, kind.is_error = value, mend, is_error
        return kind

    MISSING_FIELD = "missing_field", "add the field"
    WRONG_TYPE = "wrong_type", "give the field the type that docs/data.md says"
    UNREAD_FIELD = "unread_field", "move the content to a field that is read (docs/data.md), or take the field out"
    LEFT_OUT = (
        "left_out",
        "see docs/data.md for what each format leaves, and what may bring it in",
        False,
    )
    BAD_TEXT = "bad_text", "take the named piece out of the text"
    BAD_ROLES = "bad_roles", "give messages of system (optional), user and assistant, in this order"
    NO_DIALOGUE = "no_dialogue", "write the query and the utterances in their tags"
    SEVERAL_QUERIES = "several_queries", "put the query tags around the query only", False
    ODD_LINE = "odd_line", "write each utterance on a line of its own: id in its tags, blank, speaker: text", False
    UTTERANCE_IDS = "utterance_ids", "number the utterances 0, 1, 2, ... in order of appearance"
    IMAGE_COUNT = "image_count", "give one path for each <image>, a path may repeat"
    IMAGE_IDS = "image_ids", "number the images 0, 1, 2, ... in order of appearance, the tag before each <image>"
    IMAGE_PATH = "image_path", "give a path below --images-root"
    IMAGE_MISSING = "image_missing", "bring the file there, or give another --images-root"
    IMAGE_BROKEN = "image_broken", "copy or export the image again"
    IMAGE_SIZE = "image_size", "scale or crop the image"
    IMAGE_ODD = "image_odd", "save it as a plain RGB picture, if what the model will see is not what is meant", False
    TOO_MANY_IMAGES = "too_many_images", "cut it with --window, or raise --max-images and rollout.limit_images"
    GOLD_MALFORMED = "gold_malformed", f"write {format_fragment(Fragment((1, 2), ()))}"
    GOLD_OUTSIDE = "gold_outside", "name ids of the dialogue only"
    GOLD_REPEATED = "gold_repeated", "name each id once"
    GOLD_DIFFERS = "gold_differs", "make the assistant's message equal to solution"
    GOLD_IMAGES = "gold_images", "check the annotation: usually images of gold utterances are gold, others not", False
    REPEATED_ROW = "repeated_row", "drop the repetition, unless the row is meant to count twice", False
    CONTRADICTION = "contradiction", "keep one gold answer for a query of a dialogue"
    SAME_ID = "same_id", "give different dialogues different ids", False
    OTHER_SPLIT = "other_split", "keep a dialogue in one split"
    TOO_LONG = "too_long", "cut it with --window, or raise --max-prompt-tokens and data.max_prompt_length"


def clipped(text: str) -> str:
    """A text whose middle is left out when it is long."""
    left_out = len(text) - _HEAD - _TAIL
    return text if left_out <= _TAIL else f"{text[:_HEAD]}…({left_out:,} characters)…{text[-_TAIL:]}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a row."""

    row: int  # number in the source, from 0
    kind: ProblemKind
    field: str  # of the row, such as `images[0]`
    message: str  # what was found and what was expected, on one line

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(clipped(self.message)))

    def to_dict(self) -> dict[str, Any]:
        """As it stands beside a rejected row."""
        return {"kind": self.kind.value, "error": self.kind.is_error, "field": self.field, "message": self.message}

    def __str__(self) -> str:
        return f"row {self.row}: field {self.field!r}: {self.message}"


@dataclass(slots=True)
class ProblemLog:
    """Counts all problems and keeps the first of each kind."""

    rows: Counter[ProblemKind] = field(default_factory=Counter)  # that have a problem of a kind
    first: dict[ProblemKind, list[Problem]] = field(default_factory=dict)  # problems of the first rows
    rejected: int = 0  # rows with at least one error

    def add(self, problems: Iterable[Problem]) -> bool:
        """Take the problems of one row; whether one of them is an error."""
        found = list(problems)
        if not found:  # as in nearly all rows
            return False
        self.rows.update({problem.kind for problem in found})
        for problem in found:
            first = self.first.setdefault(problem.kind, [])
            of_row = sum(earlier.row == problem.row for earlier in first)
            if of_row < _OF_A_ROW if of_row else len({earlier.row for earlier in first}) < _ROWS:
                first.append(problem)
        is_rejected = any(problem.kind.is_error for problem in found)
        self.rejected += is_rejected
        return is_rejected

    def _kinds(self) -> list[ProblemKind]:
        """Those that occurred: errors before warnings, most frequent first."""
        return sorted(self.rows, key=lambda kind: (not kind.is_error, -self.rows[kind], kind))

    def table(self, *, errors: bool) -> str:
        """A paragraph for each kind of error or warning: how many rows, the first of them, how to mend it."""
        lines = []
        for kind in [kind for kind in self._kinds() if kind.is_error == errors]:
            count = self.rows[kind]
            lines.append(f"{kind.value} ({count} {'row' if count == 1 else 'rows'}): {kind.mend}")
            lines += [f"  {problem}" for problem in self.first[kind]]
            more = count - len({problem.row for problem in self.first[kind]})
            lines += [f"  ... and {more} more rows"] if more > 0 else []
        return "\n".join(lines)

    def report(self) -> dict[str, Any]:
        """The same for a machine."""
        return {
            kind.value: {
                "error": kind.is_error,
                "rows": self.rows[kind],
                "mend": kind.mend,
                "first": [{"row": one.row, "field": one.field, "message": one.message} for one in self.first[kind]],
            }
            for kind in self._kinds()
        }
