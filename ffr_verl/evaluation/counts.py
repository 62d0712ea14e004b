"""What an evaluation keeps of a row: a few whole numbers and a key, 88 bytes."""

from __future__ import annotations

import dataclasses
import functools
import struct
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ffr_verl.dialogues import QUERY_END, QUERY_START, UTTERANCE_START, DialogueIds, Ids, dialogue_ids
from ffr_verl.errors import one_line
from ffr_verl.fragments import (
    AnswerStyle,
    Fragment,
    MalformedReason,
    match_quickly,
    parse_fragment,
    parse_gold,
    parse_leniently,
)
from ffr_verl.metrics import confusion
from ffr_verl.predictions import Answered, malformed_gold
from ffr_verl.rewards.diagnosis import fault_of
from ffr_verl.rewards.ffr import RewardConfig

# The number of a fault is its place here plus one; 0 is none.
FAULTS = tuple(MalformedReason)
_REPEATED = FAULTS.index(MalformedReason.REPEATED_ID) + 1
_OUTSIDE = FAULTS.index(MalformedReason.ID_OUTSIDE_DIALOGUE) + 1
# No answer, or no whole one; no fault of an answer.
_UNANSWERED = len(FAULTS) + 1

# Of each modality, `hits`, `predicted`, `gold` and `rest` (in neither) count sets of leniently read ids, and `outside`
# those that the dialogue does not have; `strict_hits`, `listed` and `gold_listed` are what a reward sees: 0 in a
# malformed answer, repeats counted in the lengths.
_OF_MODALITY = ("hits", "predicted", "gold", "rest", "strict_hits", "listed", "gold_listed", "outside")
_COLUMNS = (
    *[f"utterance_{name}" for name in _OF_MODALITY],
    *[f"image_{name}" for name in _OF_MODALITY],
    "fault",
    "is_exact",
    "turns",
    "gold_span",
)
_pack = struct.Struct(f"{len(_COLUMNS)}i").pack
_PLACE = {name: place for place, name in enumerate(_COLUMNS)}
_DEFAULT_UNIVERSE = Ids(0, 0).universe
_MOST_ERRORS = 1000

# Sets of ids are whole numbers with one bit an id, which Python compares quickly.
_bit = {str(identifier): 1 << identifier for identifier in range(1024)}.__getitem__


@functools.lru_cache(maxsize=4096)  # lists repeat from row to row, those of images above all
def _mask(text: str) -> int:
    """The ids of a list; a `KeyError` where they are written in another way."""
    if not text:
        return 0
    bits = list(map(_bit, text.split(", ")))
    mask = sum(bits)
    if mask.bit_count() < len(bits):  # two equal bits were added
        raise KeyError(text)
    return mask


def plain_masks(text: str) -> tuple[int, int] | None:
    """The utterance and image ids of an answer that is written as `format_fragment` writes it, repeats nothing and has
    no id above 1023, as numbers whose bit `i` tells whether id `i` is in the answer; `None` for any other text, of
    which nothing is said. The strict and the lenient reading of such an answer are the same.

    Example:
        >>> plain_masks("<|utt_ids_start|>[0, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>")
        (5, 0)
    """
    match = match_quickly(text)
    if match is None:
        return None
    try:
        return _mask(match[1]), _mask(match[2])
    except KeyError:
        return None


@dataclass(frozen=True, slots=True)
class RowCounts:
    """The counts of rows."""

    values: np.ndarray  # shape `(rows, 20)`, int32; take columns by name with `column`
    keys: np.ndarray  # int64; equal for equal dialogue, query and gold answer in this process
    errors: Mapping[str, int]  # why rows have no answer, and how many; most frequent first
    reward: RewardConfig  # the settings of the rewards
    without_id: int | None  # line of the first row that does not say its dialogue's id
    own: np.ndarray  # of each component of one's own in `reward`; shape `(rows, components)`, float64

    def __len__(self) -> int:
        return len(self.values)

    def column(self, name: str) -> np.ndarray:
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

    @property
    def is_unanswered(self) -> np.ndarray:
        """Whether there is no answer, or no whole one."""
        return self.column("fault") == _UNANSWERED

    @property
    def has_fault(self) -> np.ndarray:
        """Whether there is an answer with a fault."""
        return (self.column("fault") > 0) & ~self.is_unanswered

    @property
    def repeated(self) -> int:
        """How many rows are of a dialogue, query and gold answer that an earlier row is of."""
        return len(self.keys) - len(np.unique(self.keys))

    def of(self, rows: slice | np.ndarray) -> RowCounts:
        """Some of the rows; `errors` and `without_id` stay those of all."""
        return dataclasses.replace(self, values=self.values[rows], keys=self.keys[rows], own=self.own[rows])


def count_rows(
    rows: Iterable[Answered],
    on_malformed_gold: Callable[[int, str], None],
    *,
    style: AnswerStyle,
    reward: RewardConfig,
    own: Callable[[], Sequence[float]] | None = None,
) -> RowCounts:
    """Count rows; `on_malformed_gold` is told the line of a row whose gold answer is malformed, which is not counted,
    and what is wrong with it. `own` is asked for the components of the row that was read last."""
    values, keys, is_plain, of_components = bytearray(), array("q"), style == "plain", array("d")
    errors: Counter[str] = Counter()
    without_id = None
    for line, response, labels, prompt, dialogue_id, error in rows:
        gold = plain_masks(labels)
        answer = gold if response == labels else plain_masks(response)
        ids = dialogue_ids(prompt)
        if gold is not None and answer is not None and is_plain and not error and ids.is_counting:
            values += _quick_row(answer, gold, ids, response == labels)
        else:
            fragment = parse_gold(labels)
            if fragment is None:
                on_malformed_gold(line, malformed_gold(labels))
                continue
            values += _row(response, fragment, ids, style, is_unanswered=bool(error))
            if error:  # not all of a file in which each row has another one are kept
                error = one_line(error)
                errors[error if error in errors or len(errors) < _MOST_ERRORS else "other reasons"] += 1
        query = prompt[prompt.find(QUERY_START) : prompt.find(QUERY_END)]
        if not dialogue_id:  # what is spoken stands for it
            without_id = line if without_id is None else without_id
            dialogue_id = prompt[prompt.find(UTTERANCE_START) :]
        keys.append(hash((dialogue_id, query, labels)))
        if own is not None:
            of_components.extend(own())
    table = np.frombuffer(values, dtype=np.int32).reshape(-1, len(_COLUMNS))
    scores = np.array(of_components).reshape(len(table), len(reward.components))
    found = np.frombuffer(keys, dtype=np.int64)
    return RowCounts(table, found, dict(errors.most_common()), reward, without_id, scores)


def _quick_row(answer: tuple[int, int], gold: tuple[int, int], ids: DialogueIds, is_exact: bool) -> bytes:
    """`_row` of masks, where ids count from 0; written out, because most rows are such."""
    (said, shown), (named, drawn) = answer, gold
    end, image_end = ids.utterances.end, ids.images.end
    universe, image_universe = end or _DEFAULT_UNIVERSE, image_end or _DEFAULT_UNIVERSE
    hits, listed, wanted, either = (said & named).bit_count(), said.bit_count(), named.bit_count(), said | named
    rest = universe - either.bit_count() + (either >> universe).bit_count()
    outside = (said >> end).bit_count()
    image_hits, images_listed, images_wanted = (shown & drawn).bit_count(), shown.bit_count(), drawn.bit_count()
    either = shown | drawn
    image_rest = image_universe - either.bit_count() + (either >> image_universe).bit_count()
    images_outside = (shown >> image_end).bit_count()
    fault = _OUTSIDE if outside or images_outside else 0
    span = named.bit_length() - (named & -named).bit_length() + 1 if named else 0
    # fmt: off
    return _pack(
        hits, listed, wanted, rest, hits, listed, wanted, outside,
        image_hits, images_listed, images_wanted, image_rest, image_hits, images_listed, images_wanted, images_outside,
        fault, is_exact, ids.turns, span,
    )
    # fmt: on


def _row(response: str, gold: Fragment, ids: DialogueIds, style: AnswerStyle, *, is_unanswered: bool = False) -> bytes:
    """The counts of any row, in the order of `_COLUMNS`."""
    lenient, strict = parse_leniently(response, style=style), parse_fragment(response, style=style)
    read = strict or Fragment((), ())
    is_dialogue = ids.turns > 0  # else there is nothing to be outside of
    utterances = _counts(
        lenient.utterance_ids, read.utterance_ids, gold.utterance_ids, ids.utterances, is_dialogue=is_dialogue
    )
    images = _counts(lenient.image_ids, read.image_ids, gold.image_ids, ids.images, is_dialogue=is_dialogue)
    reason = fault_of(response, strict, style=style, leaves_dialogue=bool(utterances[-1] or images[-1]))
    fault = _UNANSWERED if is_unanswered else 0 if reason is None else FAULTS.index(reason) + 1
    span = max(gold.utterance_ids) - min(gold.utterance_ids) + 1 if gold.utterance_ids else 0
    return _pack(*utterances, *images, fault, strict == gold and not is_unanswered, ids.turns, span)


def _counts(
    lenient: Sequence[int], strict: Sequence[int], gold: Sequence[int], ids: Ids, *, is_dialogue: bool
) -> tuple[int, ...]:
    """Of one modality, in the order of `_OF_MODALITY`."""
    guess, truth = set(lenient), set(gold)
    tp, fp, fn, tn = confusion(guess, truth, universe=ids.universe)
    outside = ids.outside(guess) if is_dialogue else 0
    return tp, tp + fp, tp + fn, tn, len(truth.intersection(strict)), len(strict), len(gold), outside
