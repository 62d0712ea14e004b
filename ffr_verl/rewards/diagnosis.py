"""What is wrong with an answer, and how large it is beside the gold: for curves and dumps, not for the score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ffr_verl.fragments import AnswerStyle, Fragment, MalformedReason, parse_fragment, reason_of_malformed
from ffr_verl.rewards.format import has_no_repeats
from ffr_verl.rewards.reading import completion_text, is_outside, read_gold, row_ids


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The first fault of an answer, `None` for a sound one, and how many ids it and its gold name, 0 where they cannot
    be parsed."""

    malformed: MalformedReason | None
    predicted_utterances: int
    predicted_images: int
    gold_utterances: int
    gold_images: int


def fault_of(
    text: str, fragment: Fragment | None, *, style: AnswerStyle, leaves_dialogue: bool
) -> MalformedReason | None:
    """The first fault of an answer: not the format, then a repeated id, then an id that the dialogue lacks.

    Args:
        text: the answer.
        fragment: what `parse_fragment` of the same style has made of it.
        style: of the answer.
        leaves_dialogue: whether it names an id that the dialogue lacks.

    Example:
        >>> text = "<|utt_ids_start|>[1, 1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> fault_of(text, parse_fragment(text), style="plain", leaves_dialogue=True).value
        'repeated_id'
    """
    if fragment is None:
        return reason_of_malformed(text, style=style)
    if not has_no_repeats(fragment):
        return MalformedReason.REPEATED_ID
    return MalformedReason.ID_OUTSIDE_DIALOGUE if leaves_dialogue else None


def diagnose(
    completion: str, solution: str, *, extra_info: Mapping[str, Any] | None = None, style: AnswerStyle = "plain"
) -> Diagnosis:
    """Find the first fault of an answer (`fault_of`), and sizes of answer and gold.

    Without `utterance_ids` and `images` in `extra_info` no id is outside the dialogue.

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
    leaves_dialogue = (
        predicted is not None
        and extra_info is not None
        and extra_info.get("utterance_ids") is not None
        and extra_info.get("images") is not None
        and is_outside(predicted, *row_ids(extra_info))
    )
    reason = fault_of(completion, predicted, style=style, leaves_dialogue=leaves_dialogue)
    empty = Fragment((), ())
    predicted, gold = predicted or empty, gold or empty
    return Diagnosis(
        reason, len(predicted.utterance_ids), len(predicted.image_ids), len(gold.utterance_ids), len(gold.image_ids)
    )
