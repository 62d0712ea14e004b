"""What can be wrong with a row, and the account of it: a table by kind, a report in JSON, the rejected rows."""

from __future__ import annotations

import enum
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MENDS", "Problem", "ProblemKind", "ProblemLog", "printable"]

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """A text that fits on a line of a terminal or a report: what would move the cursor, or cannot be encoded, is
    written as a code.

    Example:
        >>> printable("a\\nb")
        'a\\\\nb'
    """
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape", "surrogatepass").decode(), text)


class ProblemKind(str, enum.Enum):
    """Kinds of problems; the values are names for reports."""

    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    BAD_TEXT = "bad_text"
    BAD_ROLES = "bad_roles"
    NO_DIALOGUE = "no_dialogue"
    SEVERAL_QUERIES = "several_queries"
    UTTERANCE_IDS = "utterance_ids"
    IMAGE_COUNT = "image_count"
    IMAGE_IDS = "image_ids"
    IMAGE_PATH = "image_path"
    IMAGE_MISSING = "image_missing"
    IMAGE_BROKEN = "image_broken"
    IMAGE_SIZE = "image_size"
    IMAGE_ODD = "image_odd"
    TOO_MANY_IMAGES = "too_many_images"
    GOLD_MALFORMED = "gold_malformed"
    GOLD_OUTSIDE = "gold_outside"
    GOLD_REPEATED = "gold_repeated"
    GOLD_DIFFERS = "gold_differs"
    GOLD_IMAGES = "gold_images"
    GOLD_SELF_CHECK = "gold_self_check"
    REPEATED_ROW = "repeated_row"
    CONTRADICTION = "contradiction"
    SAME_ID = "same_id"
    OTHER_SPLIT = "other_split"
    TOO_LONG = "too_long"


_OF_A_ROW = 2  # problems of one kind that are kept

_WARNINGS = frozenset(
    {
        ProblemKind.SEVERAL_QUERIES,
        ProblemKind.IMAGE_ODD,
        ProblemKind.GOLD_IMAGES,
        ProblemKind.REPEATED_ROW,
        ProblemKind.SAME_ID,
    }
)

MENDS: Mapping[ProblemKind, str] = {
    ProblemKind.MISSING_FIELD: "add the field",
    ProblemKind.WRONG_TYPE: "give the field the type that docs/data.md says",
    ProblemKind.BAD_TEXT: "take the named piece out of the text",
    ProblemKind.BAD_ROLES: "give messages of system (optional), user and assistant, in this order",
    ProblemKind.NO_DIALOGUE: "write the query and the utterances in their tags",
    ProblemKind.SEVERAL_QUERIES: "put the query tags around the query only",
    ProblemKind.UTTERANCE_IDS: "number the utterances 0, 1, 2, ... in order of appearance",
    ProblemKind.IMAGE_COUNT: "give one path for each <image>, a path may repeat",
    ProblemKind.IMAGE_IDS: "number the images 0, 1, 2, ... in order of appearance, the tag before each <image>",
    ProblemKind.IMAGE_PATH: "give a path below --images-root",
    ProblemKind.IMAGE_MISSING: "bring the file there, or give another --images-root",
    ProblemKind.IMAGE_BROKEN: "copy or export the image again",
    ProblemKind.IMAGE_SIZE: "scale or crop the image",
    ProblemKind.IMAGE_ODD: "save it as a plain RGB picture, if what the model will see is not what is meant",
    ProblemKind.TOO_MANY_IMAGES: "cut the dialogue with --window, or raise --max-images and rollout.limit_images",
    ProblemKind.GOLD_MALFORMED: "write <|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>",
    ProblemKind.GOLD_OUTSIDE: "name ids of the dialogue only",
    ProblemKind.GOLD_REPEATED: "name each id once",
    ProblemKind.GOLD_DIFFERS: "make the assistant's message equal to solution",
    ProblemKind.GOLD_IMAGES: "check the annotation: images of gold utterances are usually gold, others are not",
    ProblemKind.GOLD_SELF_CHECK: "report it: a gold answer must earn the full reward",
    ProblemKind.REPEATED_ROW: "drop the repetition, unless the row is meant to count twice",
    ProblemKind.CONTRADICTION: "keep one gold answer for a query of a dialogue",
    ProblemKind.SAME_ID: "give different dialogues different ids",
    ProblemKind.OTHER_SPLIT: "keep a dialogue in one split",
    ProblemKind.TOO_LONG: "cut it with --window, or raise --max-prompt-tokens and data.max_prompt_length",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a row.

    Attributes:
        row: number in the source, from 0.
        kind: see `ProblemKind`.
        field: of the row, such as `images[0]`.
        message: what was found and what was expected, on one line.
    """

    row: int
    kind: ProblemKind
    field: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", printable(self.message))

    @property
    def is_error(self) -> bool:
        """Whether the row is refused for it; otherwise it is a warning."""
        return self.kind not in _WARNINGS

    def __str__(self) -> str:
        return f"row {self.row}: field {self.field!r}: {self.message}"


@dataclass(slots=True)
class ProblemLog:
    """Counts all problems and keeps the first of each kind.

    Attributes:
        kept: of how many rows of each kind problems are kept.
        rows: rows that have a problem of a kind.
        first: of each kind the first problems of the first rows.
        rejected: rows with at least one error.
    """

    kept: int = 3
    rows: Counter[ProblemKind] = field(default_factory=Counter)
    first: dict[ProblemKind, list[Problem]] = field(default_factory=dict)
    rejected: int = 0

    def add(self, problems: Iterable[Problem]) -> bool:
        """Take the problems of one row; whether one of them is an error."""
        is_rejected, found = False, list(problems)
        for kind in {problem.kind for problem in found}:
            self.rows[kind] += 1
        for problem in found:
            first = self.first.setdefault(problem.kind, [])
            of_row = sum(earlier.row == problem.row for earlier in first)
            if of_row < _OF_A_ROW if of_row else len({earlier.row for earlier in first}) < self.kept:
                first.append(problem)
            is_rejected = is_rejected or problem.is_error
        self.rejected += is_rejected
        return is_rejected

    def kinds(self, *, errors: bool) -> list[ProblemKind]:
        """The kinds of errors or of warnings that occurred, most frequent first."""
        found = [(-count, kind.value, kind) for kind, count in self.rows.items() if (kind not in _WARNINGS) == errors]
        return [kind for _, _, kind in sorted(found)]

    def table(self, *, errors: bool) -> str:
        """A paragraph for each kind: how many rows, the first of them, how to mend it."""
        lines = []
        for kind in self.kinds(errors=errors):
            count = self.rows[kind]
            lines.append(f"{kind.value} ({count} {'row' if count == 1 else 'rows'}): {MENDS[kind]}")
            lines += [f"  {problem}" for problem in self.first[kind]]
            more = count - len({problem.row for problem in self.first[kind]})
            lines += [f"  ... and {more} more rows"] if more > 0 else []
        return "\n".join(lines)

    def report(self) -> dict[str, Any]:
        """The same for a machine."""
        return {
            kind.value: {
                "error": errors,
                "rows": self.rows[kind],
                "mend": MENDS[kind],
                "first": [
                    {"row": problem.row, "field": problem.field, "message": problem.message}
                    for problem in self.first[kind]
                ],
            }
            for errors in (True, False)
            for kind in self.kinds(errors=errors)
        }
