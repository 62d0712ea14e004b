"""The reward of OpenRLHF 0.11: `--reward.remote_url FILE.py`, where FILE has `reward_func = reward_function(...)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ffr_verl.errors import FFRError
from ffr_verl.integrations.labels import read_label
from ffr_verl.model_families import CONTROL_TOKENS
from ffr_verl.rewards.config import RewardConfig
from ffr_verl.rewards.ffr import compute_score


def reward_function(**reward_kwargs: Any) -> Callable[[Sequence[str], Sequence[str], Sequence[str]], dict[str, Any]]:
    """OpenRLHF's `reward_func(queries, prompts, labels)`, which it calls with one answer at a time.

    Args:
        **reward_kwargs: see `RewardConfig`; checked at once, since OpenRLHF logs what a reward raises and trains on.

    Example:
        >>> gold = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> prompt = "<|im_start|>user\\nwhere?<|im_end|>\\n<|im_start|>assistant\\n"
        >>> reward_function()([prompt + gold + "<|im_end|>"], [prompt], [gold])["rewards"]
        1.3
    """
    RewardConfig.from_kwargs(reward_kwargs)

    def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
        if not len(queries) == len(prompts) == len(labels) == 1:
            raise FFRError(
                f"{len(queries)} queries, {len(prompts)} prompts, {len(labels)} labels; expected one of each"
            )
        scores = compute_score("", _answer(queries[0], prompts[0]), *read_label(labels[0]), **reward_kwargs)
        score = scores.pop("score")
        return {"rewards": score, "scores": score, "extra_logs": scores}

    return reward_func


def _answer(query: str, prompt: str) -> str:
    """What follows the prompt in a query, without the tokens that end it. An image is one token in the prompt and many
    in the query, so the prompt's last line is looked for, as often as the prompt has it."""
    line = prompt[prompt.rstrip().rfind("\n") + 1 :]
    _, *rest = query.split(line, prompt.count(line)) if line else [query]
    if not rest:
        raise FFRError(f"query: does not hold the prompt's last line, {line!r:.80}")
    answer = rest[-1]
    while ending := next((token for token in CONTROL_TOKENS if answer.endswith(token)), None):
        answer = answer.removesuffix(ending)
    return answer
