"""Matthews correlation of the predicted and the gold fragment, over all utterances and images of the dialogue."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ffr_verl.fragments import AnswerStyle, parse_fragment, parse_gold

__all__ = ["mcc_of_ids", "mcc_reward"]


def mcc_of_ids(predicted: Sequence[int], gold: Sequence[int], *, count: int) -> float:
    """Matthews correlation coefficient of two id sets in the universe 0 to `count - 1`.

    Both empty: 1. One of them empty, or a zero denominator: 0. Ids outside the universe count as false positives.

    Returns:
        A value in [-1, 1].

    Example:
        >>> mcc_of_ids([0, 1], [0, 1], count=4)
        1.0
        >>> mcc_of_ids([2, 3], [0, 1], count=4)
        -1.0
    """
    guess, truth = set(predicted), set(gold)
    if not guess and not truth:
        return 1.0
    if not guess or not truth:
        return 0.0
    hits = len(guess & truth)
    false_positives, false_negatives = len(guess) - hits, len(truth) - hits
    rest = count - sum([0 <= one < count for one in guess | truth])
    denominator = len(guess) * len(truth) * (rest + false_positives) * (rest + false_negatives)
    if denominator == 0:
        return 0.0
    return (hits * rest - false_positives * false_negatives) / math.sqrt(denominator)


def mcc_reward(
    completion: str, solution: str, *, n_utterances: int, n_images: int, style: AnswerStyle = "plain"
) -> float:
    """Mean of the Matthews correlations of utterances and images; 0 when the answer or the gold is malformed.

    Args:
        completion: what the model wrote.
        solution: the gold answer.
        n_utterances: utterances of the dialogue, their ids are 0 to `n_utterances - 1`.
        n_images: images of the dialogue.
        style: of the completion, see `parse_fragment`.

    Returns:
        A value in [-1, 1].

    Source: the published evaluation's coefficient, as a reward.

    Example:
        >>> gold = "<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> mcc_reward(gold, gold, n_utterances=5, n_images=0)
        1.0
        >>> mcc_reward("no idea", gold, n_utterances=5, n_images=0)
        0.0
    """
    predicted, gold = parse_fragment(completion, style=style), parse_gold(solution)
    if predicted is None or gold is None:
        return 0.0
    utterances = mcc_of_ids(predicted.utterance_ids, gold.utterance_ids, count=n_utterances)
    images = mcc_of_ids(predicted.image_ids, gold.image_ids, count=n_images)
    return (utterances + images) / 2
