"""What an evaluation keeps of a row: a few whole numbers, 80 bytes."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from ffr_verl.evaluation.dialogue_ids import DialogueIdsReader, Ids
from ffr_verl.evaluation.predictions import malformed_gold
from ffr_verl.fragments import (
    PLAIN_ANSWER,
    AnswerStyle,
    MalformedReason,
    malformed_reason,
    parse_fragment,
    parse_leniently,
)
from ffr_verl.rewards.f1 import parse_gold

__all__ = ["FAULTS", "RowCounter", "RowCounts"]

# The number of a fault is its place here plus one; 0 is none.
FAULTS = tuple(MalformedReason)
_REPEATED = FAULTS.index(MalformedReason.REPEATED_ID) + 1
_OUTSIDE = FAULTS.index(MalformedReason.ID_OUTSIDE_DIALOGUE) + 1

# Of each modality, `hits`, `predicted`, `gold` and `rest` (in neither) count sets of leniently read ids; `strict_hits`,
# `listed` and `gold_listed` the ids as a reward sees them: 0 in a malformed answer, repeats counted in the lengths.
_OF_MODALITY = ("hits", "predicted", "gold", "rest", "strict_hits", "listed", "gold_listed", "outside")
_COLUMNS = (
    *[f"utterance_{name}" for name in _OF_MODALITY],
    *[f"image_{name}" for name in _OF_MODALITY],
    "fault",
    "is_exact",
    "turns",
    "gold_span",
)
_PLACE = {name: place for place, name in enumerate(_COLUMNS)}
_QUERY = re.compile(r"<\|query_start\|>(.*?)<\|query_end\|>", re.DOTALL)

_decode_lists = msgspec.json.Decoder(list[list[int]]).decode


@dataclass(frozen=True, slots=True)
class RowCounts:
    """The counts of rows.

    Attributes:
        values: shape `(rows, 20)`, int32; take columns by name with `column`.
        keys: of the rows, to find them again in another file, see `row_key`; `None` when not asked for.
    """

    values: np.ndarray
    keys: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def column(self, name: str) -> np.ndarray:
        """A column, shape `(rows,)`."""
        return self.values[:, _PLACE[name]]

    @property
    def is_readable(self) -> np.ndarray:
        """Whether the answer can be parsed strictly."""
        fault = self.column("fault")
        return (fault == 0) | (fault == _REPEATED) | (fault == _OUTSIDE)

    @property
    def is_well_formed(self) -> np.ndarray:
        """Whether it can, and repeats no id: the format reward."""
        return self.is_readable & (self.column("fault") != _REPEATED)

    def of(self, rows: slice | np.ndarray) -> RowCounts:
        """Some of the rows."""
        return RowCounts(self.values[rows], None if self.keys is None else self.keys[rows])


class RowCounter:
    """Counts row after row.

    Args:
        style: of the answers, see `parse_fragment`.
        with_keys: also make the keys of the rows.
    """

    def __init__(self, *, style: AnswerStyle = "plain", with_keys: bool = False) -> None:
        self.rows = 0
        self._values, self._keys = array("i"), array("q")
        self._style = style
        self._row_key = _row_key() if with_keys else None
        self._dialogues = DialogueIdsReader()

    def add(self, response: str, labels: str, prompt: str, dialogue_id: str) -> None:
        """Count a row.

        Raises:
            ValueError: for a malformed gold answer.
        """
        gold = _quick_lists(labels)
        is_quick = gold is not None and self._style == "plain"
        if gold is None:
            fragment = parse_gold(labels)
            if fragment is None:
                raise ValueError(malformed_gold(labels))
            gold = (fragment.utterance_ids, fragment.image_ids)
        predicted: Sequence[Sequence[int]] | None
        if is_quick and response == labels:
            predicted = lenient = gold
        else:
            predicted = _quick_lists(response) if self._style == "plain" else None
            if predicted is not None:
                lenient = predicted
            else:
                read, answer = parse_leniently(response), parse_fragment(response, style=self._style)
                lenient = (read.utterance_ids, read.image_ids)
                predicted = None if answer is None else (answer.utterance_ids, answer.image_ids)
        ids = self._dialogues.read(prompt)
        utterances = _counts(lenient[0], gold[0], predicted and predicted[0], ids.utterances)
        images = _counts(lenient[1], gold[1], predicted and predicted[1], ids.images)
        span = max(gold[0]) - min(gold[0]) + 1 if gold[0] else 0
        fault = 0
        if predicted is None:
            reason = malformed_reason(response, style=self._style)
            fault = 0 if reason is None else FAULTS.index(reason) + 1
        elif len(set(predicted[0])) < len(predicted[0]) or len(set(predicted[1])) < len(predicted[1]):
            fault = _REPEATED
        elif utterances[-1] or images[-1]:
            fault = _OUTSIDE
        exact = predicted is not None and list(predicted[0]) == list(gold[0]) and list(predicted[1]) == list(gold[1])
        self._values.extend((*utterances, *images, fault, exact, ids.turns, span))
        if self._row_key is not None:
            query = _QUERY.search(prompt)
            self._keys.append(self._row_key(dialogue_id, query.group(1) if query else "", labels))
        self.rows += 1

    def counts(self) -> RowCounts:
        """Of the rows so far; no row can be added while it is in use."""
        values = np.frombuffer(self._values, dtype=np.int32).reshape(-1, len(_COLUMNS))
        return RowCounts(values, None if self._row_key is None else np.frombuffer(self._keys, dtype=np.int64))


def _row_key() -> Callable[[str, str, str], int]:
    from ffr_verl.samplers.difficulty_file import row_key  # late: it loads pyarrow

    return row_key


def _quick_lists(text: str) -> Sequence[Sequence[int]] | None:
    """The two id lists of a plain answer on which the strict and the lenient reading agree; `None` for any other."""
    match = PLAIN_ANSWER.fullmatch(text)
    if match is None:
        return None
    try:
        return _decode_lists("[[%s],[%s]]" % match.groups())
    except msgspec.DecodeError:  # a leading zero, or white space that JSON does not know
        return None


def _counts(
    lenient: Sequence[int], gold: Sequence[int], strict: Sequence[int] | None, ids: Ids
) -> tuple[int, int, int, int, int, int, int, int]:
    """Of one modality, in the order of `_OF_MODALITY`."""
    guess, truth = set(lenient), set(gold)
    hits, universe = len(guess & truth), ids.universe
    rest = universe - len(guess) - len(truth) + hits
    outside = 0
    if lenient and (ids.first or ids.others is not None or max(guess) >= ids.end):
        outside = ids.outside(guess)
    if (lenient and max(guess) >= universe) or (gold and max(truth) >= universe):
        rest += sum([one >= universe for one in guess | truth])
    strict_hits = hits if strict is lenient else len(truth.intersection(strict or ()))
    return hits, len(guess), len(truth), rest, strict_hits, len(strict or ()), len(gold), outside
