"""F1 of the predicted against the gold fragment, for utterances and images."""

from __future__ import annotations

from collections.abc import Sequence

from ffr_verl.fragments import AnswerStyle, Fragment
from ffr_verl.metrics import list_f_score
from ffr_verl.rewards.reading import read_answer, read_gold
from ffr_verl.rewards.settings import check_settings


def f1_of_ids(
    predicted: Sequence[int], gold: Sequence[int], *, beta: float = 1.0, length_penalty: float = 0.95
) -> float:
    """`list_f_score` of two id lists, in [0, 1]: a repeated id lowers it, as does a list of another length."""
    hits = len(set(predicted).intersection(gold))
    return float(list_f_score(hits, len(predicted), len(gold), beta=beta, length_penalty=length_penalty))


def f1_of_fragments(
    predicted: Fragment, gold: Fragment, *, beta: float = 1.0, length_penalty: float = 0.95
) -> tuple[float, float]:
    """`f1_of_ids` of the utterances and of the images."""
    utterances = f1_of_ids(predicted.utterance_ids, gold.utterance_ids, beta=beta, length_penalty=length_penalty)
    return utterances, f1_of_ids(predicted.image_ids, gold.image_ids, beta=beta, length_penalty=length_penalty)


def pooled_f1_of_fragments(predicted: Fragment, gold: Fragment, *, length_penalty: float = 0.95) -> float:
    """`f1_of_ids` of utterances and images as one list, so that an empty image list earns nothing by itself.

    Source: ours.
    """
    # Images as negative numbers, which no id is.
    lists = [[*one.utterance_ids, *(-1 - image for image in one.image_ids)] for one in (predicted, gold)]
    return f1_of_ids(*lists, length_penalty=length_penalty)


def f1_reward(
    completion: str,
    solution: str,
    *,
    utterance_weight: float = 0.5,
    image_weight: float = 0.5,
    beta: float = 1.0,
    length_penalty: float = 0.95,
    style: AnswerStyle = "plain",
) -> float:
    """Weighted F-beta of utterances and images, in [0, utterance_weight + image_weight]; 0 when the answer or the gold
    is malformed.

    Precision is `|set of both| / len(predicted)` and recall `|set of both| / len(gold)`; both lists empty: 1. The
    value of a list is multiplied by `length_penalty ** |len(predicted) - len(gold)|`.

    Args:
        completion: what the model wrote.
        solution: the gold answer.
        utterance_weight: of the utterances' value.
        image_weight: of the images' value.
        beta: above 1 recall counts more, below 1 precision.
        length_penalty: in [0, 1].
        style: of the completion, see `parse_fragment`.

    Raises:
        FFRError: for a gold that is no text and settings out of range.

    Source: published.

    Example:
        >>> gold = "<|utt_ids_start|>[1, 2]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> f1_reward(gold, gold)
        1.0
        >>> f1_reward("no idea", gold)
        0.0
    """
    check_settings(
        "f1",
        utterance_weight=utterance_weight,
        image_weight=image_weight,
        beta=beta,
        length_penalty=length_penalty,
        style=style,
    )
    predicted, gold = read_answer(completion, style), read_gold(solution)
    if predicted is None or gold is None:
        return 0.0
    utterances, images = f1_of_fragments(predicted, gold, beta=beta, length_penalty=length_penalty)
    return utterance_weight * utterances + image_weight * images
