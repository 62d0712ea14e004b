"""Whether an answer is the gold answer."""

from __future__ import annotations

from ffr_verl.fragments import AnswerStyle
from ffr_verl.rewards.reading import read_answer, read_gold


def exact_match_reward(completion: str, solution: str, *, style: AnswerStyle = "plain") -> float:
    """1 when both id lists equal the gold's, in order, else 0; 0 when either text is malformed.

    Example:
        >>> gold = "<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> exact_match_reward("<|utt_ids_start|>[1,2]<|utt_ids_end|>;<|img_ids_start|>[ ]<|img_ids_end|>", gold)
        1.0
        >>> exact_match_reward("<|utt_ids_start|>[2, 1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>", gold)
        0.0
    """
    predicted, gold = read_answer(completion, style), read_gold(solution)
    return float(predicted is not None and predicted == gold)
