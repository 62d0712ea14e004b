"""Matthews correlation of the predicted and the gold fragment, over all utterances and images of the dialogue."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle, Fragment
from ffr_verl.metrics import confusion, mcc
from ffr_verl.rewards.reading import read_answer, read_gold


def mcc_of_ids(predicted: Sequence[int], gold: Sequence[int], *, count: int | Collection[int]) -> float:
    """`ffr_verl.metrics.mcc` of two id sets in the universe 0 to `count - 1`, or of the ids `count`; 1 when both are
    empty."""
    return 1.0 if not predicted and not gold else float(mcc(confusion(predicted, gold, universe=count)))


def mcc_of_fragments(
    predicted: Fragment, gold: Fragment, *, utterances: int | Collection[int], images: int | Collection[int]
) -> float:
    """Mean of `mcc_of_ids` of utterances and images."""
    of_utterances = mcc_of_ids(predicted.utterance_ids, gold.utterance_ids, count=utterances)
    return (of_utterances + mcc_of_ids(predicted.image_ids, gold.image_ids, count=images)) / 2


def mcc_reward(
    completion: str,
    solution: str,
    *,
    n_utterances: int | Collection[int],
    n_images: int | Collection[int],
    style: AnswerStyle = "plain",
) -> float:
    """Mean of the Matthews correlations of utterances and images, in [-1, 1]; 0 when the answer or the gold is
    malformed.

    Of one modality it is 1 where both lists are empty, and 0 where one is or the denominator is 0. Ids that the
    dialogue does not have count as false positives.

    Args:
        completion: what the model wrote.
        solution: the gold answer.
        n_utterances: number of the dialogue's utterances, whose ids are then 0 to `n_utterances - 1`; or their ids,
            where they are others, as in a window.
        n_images: of its images, in the same way.
        style: of the completion, see `parse_fragment`.

    Raises:
        FFRError: for a gold that is no text and a number below 0.

    Source: the published evaluation's coefficient, as a reward.

    Example:
        >>> gold = "<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> mcc_reward(gold, gold, n_utterances=5, n_images=0)
        1.0
        >>> mcc_reward("no idea", gold, n_utterances=5, n_images=0)
        0.0
    """
    for name, value in (("n_utterances", n_utterances), ("n_images", n_images)):
        is_count = isinstance(value, (int, np.integer)) and value >= 0
        if not is_count and (isinstance(value, str) or not isinstance(value, Collection)):
            raise FFRError(f"mcc.{name}: found {value!r}, expected the number of ids in the dialogue, or the ids")
    predicted, gold = read_answer(completion, style), read_gold(solution)
    if predicted is None or gold is None:
        return 0.0
    return mcc_of_fragments(predicted, gold, utterances=n_utterances, images=n_images)
