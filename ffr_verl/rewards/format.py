"""Whether an answer keeps the wire format."""

from __future__ import annotations

from ffr_verl.fragments import AnswerStyle, Fragment
from ffr_verl.rewards.reading import read_answer


def has_no_repeats(fragment: Fragment) -> bool:
    """Whether no id stands twice in a list."""
    utterances, images = fragment.utterance_ids, fragment.image_ids
    return len(set(utterances)) == len(utterances) and len(set(images)) == len(images)


def format_reward(completion: str, *, style: AnswerStyle = "plain") -> float:
    """1 for a well-formed answer without a repeated id in a list, else 0.

    Source: published; there a second definition of the class asks for the reasoning wrapper, so that a plain answer
    never earned it. Here one `style` serves every reward.

    Example:
        >>> format_reward("<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>")
        1.0
        >>> format_reward("<|utt_ids_start|>[1, 1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>")
        0.0
    """
    fragment = read_answer(completion, style)
    return float(fragment is not None and has_no_repeats(fragment))
