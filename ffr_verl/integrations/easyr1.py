"""The reward of EasyR1: `worker.reward.reward_function=FILE:compute_score`, where FILE imports this module's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ffr_verl.errors import FFRError
from ffr_verl.integrations.labels import read_label
from ffr_verl.rewards.ffr import compute_score as score_of_answer

REWARD_NAME, REWARD_TYPE = "ffr", "batch"


def compute_score(reward_inputs: Sequence[Mapping[str, Any]], **reward_kwargs: Any) -> list[dict[str, float]]:
    """What `ffr_verl.rewards.compute_score` gives for each answer, with its `score` as `overall`.

    Args:
        reward_inputs: of EasyR1, with `response` and `ground_truth`, the row's label.
        **reward_kwargs: `worker.reward.reward_function_kwargs`, see `RewardConfig`.

    Example:
        >>> gold = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> compute_score([{"response": gold, "ground_truth": gold, "response_length": 9}])[0]["overall"]
        1.3
    """
    found = []
    for row, one in enumerate(reward_inputs):
        try:
            scores = score_of_answer("", one["response"], *read_label(one["ground_truth"]), **reward_kwargs)
        except FFRError as error:
            raise FFRError(f"row {row} of the batch: {error}") from None
        found.append({"overall": scores.pop("score"), **scores})
    return found
