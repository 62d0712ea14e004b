"""What is wrong with an answer, and how large it is beside the gold: for curves and dumps, not for the score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ffr_verl.fragments import AnswerStyle, Fragment, MalformedReason, parse_fragment, reason_of_malformed
from ffr_verl.rewards.format import has_no_repeats
from ffr_verl.rewards.reading import completion_text, is_outside, read_gold, row_ids

__all__ = ["Diagnosis", "diagnose"]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Of one answer.

    Attributes:
        malformed: the first fault found, `None` for a sound answer.
        predicted_utterances: ids in the answer's utterance list; 0 when it cannot be parsed.
        predicted_images: ids in its image list.
        gold_utterances: ids in the gold's utterance list.
        gold_images: ids in the gold's image list.
    """

    malformed: MalformedReason | None
    predicted_utterances: int
    predicted_images: int
    gold_utterances: int
    gold_images: int


def diagnose(
    completion: str, solution: str, *, extra_info: Mapping[str, Any] | None = None, style: AnswerStyle = "plain"
) -> Diagnosis:
    """Find the first fault of an answer: not the format, then a repeated id, then an id that the dialogue lacks.

    Args:
        completion: what the model wrote.
        solution: the gold answer.
        extra_info: of the row, `utterance_ids` and `images`; without them no id is outside the dialogue.
        style: of the completion, see `parse_fragment`.

    Example:
        >>> gold = "<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> diagnose(gold, gold)
        Diagnosis(malformed=None, predicted_utterances=2, predicted_images=0, gold_utterances=2, gold_images=0)
        >>> diagnose(gold, gold, extra_info={"utterance_ids": [0, 1], "images": []}).malformed.value
        'id_outside_dialogue'
        >>> diagnose("no idea", gold).malformed.value
        'missing_tag'
    """
    completion = completion_text(completion)
    predicted, gold = parse_fragment(completion, style=style), read_gold(solution)
    reason: MalformedReason | None
    if predicted is None:
        reason = reason_of_malformed(completion, style=style)
    elif not has_no_repeats(predicted):
        reason = MalformedReason.REPEATED_ID
    elif _is_outside(predicted, extra_info):
        reason = MalformedReason.ID_OUTSIDE_DIALOGUE
    else:
        reason = None
    empty = Fragment((), ())
    predicted, gold = predicted or empty, gold or empty
    return Diagnosis(
        reason, len(predicted.utterance_ids), len(predicted.image_ids), len(gold.utterance_ids), len(gold.image_ids)
    )


def _is_outside(predicted: Fragment, info: Mapping[str, Any] | None) -> bool:
    is_known = info is not None and info.get("utterance_ids") is not None and info.get("images") is not None
    return is_known and is_outside(predicted, *row_ids(info))
