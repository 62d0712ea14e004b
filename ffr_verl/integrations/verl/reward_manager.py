"""verl's reward manager `ffr` (`reward.reward_manager.name=ffr`).

It differs from verl's `naive` in two things. It keeps special tokens when it decodes, so that a model whose answer
tags are special tokens is scored right: `naive` drops them, and every answer of such a model is malformed. And it adds
to each answer what is wrong with it and how large it is (`ffr_verl.rewards.diagnose`), which `FFRReplayBuffer` turns
into training curves.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.reward_loop.reward_manager import register
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from ffr_verl.errors import FFRError
from ffr_verl.fragments import ALL_TAGS, AnswerStyle, Fragment, parse_fragment, parse_gold, parse_leniently
from ffr_verl.metrics import confusion
from ffr_verl.rewards.coherence import open_scorer
from ffr_verl.rewards.config import RewardConfig, reward_node
from ffr_verl.rewards.diagnosis import diagnose
from ffr_verl.rewards.ffr import compute_score, id_credits
from ffr_verl.rewards.reading import row_universes
from ffr_verl.samplers.reward_metrics import REWARD_ERROR
from ffr_verl.settings import BUFFER_NODE, BUFFER_PATH


def closing_tokens(tokenizer: Any) -> frozenset[int]:
    """Special tokens that may end a completion without being part of the answer: `<|im_end|>`, padding and so on."""
    vocabulary = tokenizer.get_vocab()
    return frozenset(tokenizer.all_special_ids) - {vocabulary[tag] for tag in ALL_TAGS if tag in vocabulary}


def decode_answer(tokenizer: Any, token_ids: Sequence[int], closing: frozenset[int]) -> str:
    """The text of a completion with its special tokens, but without the `closing` ones that end it.

    A special token in the middle stays: it makes the answer malformed, as it is.
    """
    end = len(token_ids)
    while end and token_ids[end - 1] in closing:
        end -= 1
    return str(tokenizer.decode(token_ids[:end], skip_special_tokens=False))


@register("ffr")
class FFRRewardManager(RewardManagerBase):
    """Scores one completion with the custom reward function of the recipe, or with `compute_score` when it names none.

    The settings of `compute_score` are `reward.custom_reward_function.reward_kwargs`, or, without a custom reward
    function, `reward.reward_kwargs`.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any, **router: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        node = reward_node(config.reward)
        given = OmegaConf.select(config.reward, node) if node else None
        # Plain mappings: nodes of the config would take longer to read, on every call, than the rewards to compute.
        plain = OmegaConf.to_container(given, resolve=True) if given else {}
        self._reward_kwargs = cast(dict[str, Any], plain)
        # An exception here only fails a group, and verl trains on with what is left: our replay buffer, where it is
        # used, is told of what the user must mend, and ends the run with it.
        self._tells_buffer = OmegaConf.select(config, f"{BUFFER_NODE}.path") == BUFFER_PATH
        self._problem: str | None = None
        try:
            self._settings = RewardConfig.from_kwargs(self._reward_kwargs)
        except FFRError as error:
            if not self._tells_buffer:
                raise
            self._settings, self._problem = RewardConfig(), str(error)
        if node is not None or compute_score is None:
            compute_score = functools.partial(_compute_score, **self._reward_kwargs)
        self._score: Callable[..., Any] = compute_score
        self._router = router if router.get("reward_router_address") is not None else {}
        self._closing = closing_tokens(tokenizer)
        self._texts_of_tokens: dict[int, str] = {}

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Score the last sequence of `data`, as verl's managers do; see `_scored` for what it returns.

        What the user must mend (`FFRError`) is raised, or, where `FFRReplayBuffer` is used, handed to it as
        `reward_error` in place of all else.
        """
        try:
            if self._problem is not None:
                raise FFRError(self._problem)
            return await self._scored(data)
        except FFRError as error:
            if not self._tells_buffer:
                raise
            return {"reward_score": 0.0, "reward_extra_info": {REWARD_ERROR: str(error)}}

    async def _scored(self, data: DataProto) -> dict[str, Any]:
        """Score the last sequence of `data`.

        Returns:
            `reward_score`, and in `reward_extra_info` what the reward function returned together with `malformed` (a
            `MalformedReason`, or empty), `predicted_utterances`, `predicted_images`, `gold_utterances`, `gold_images`,
            `missing_embeddings` (the number of predicted ids without a vector in the store), `confusion` (as JSON, so
            that verl averages none of it: true and false positives, false and true negatives of the utterances and of
            the images, read leniently as `ffr-verl evaluate` does), `cut_off` (1 where the answer does not end with a
            closing token), and with `f1_mode: micro` or `micro_f1_mcc` the `id_credits` (as JSON: place, token and
            value of each id).
        """
        item = data[-1:][0]
        fields = item.non_tensor_batch
        response = item.batch["responses"]
        length = int(item.batch["attention_mask"][-response.shape[-1] :].sum())
        token_ids = response[:length].tolist()
        solution = fields["reward_model"]["ground_truth"]
        extra_info = {
            **(fields.get("extra_info") or {}),
            **(fields.get("tool_extra_fields") or {}),
            "num_turns": fields.get("__num_turns__"),
            "rollout_reward_scores": fields.get("reward_scores", {}),
        }

        def decode() -> str:
            return decode_answer(self.tokenizer, token_ids, self._closing)

        completion = await self.loop.run_in_executor(None, decode)
        score = functools.partial(
            self._score,
            data_source=fields["data_source"],
            solution_str=completion,
            ground_truth=solution,
            extra_info=extra_info,
            **self._router,
        )
        if inspect.iscoroutinefunction(self._score):
            result = await score()
        else:
            result = await self.loop.run_in_executor(None, score)
        scores = dict(result) if isinstance(result, dict) else {"score": result, "acc": result}
        return {
            "reward_score": scores["score"],
            "reward_extra_info": {
                **scores,
                **self._diagnosis(completion, solution, extra_info),
                **self._credits(completion, solution, extra_info, token_ids),
                "cut_off": float(not token_ids or token_ids[-1] not in self._closing),
            },
        }

    def _credits(
        self, completion: str, solution: str, extra_info: dict[str, Any], token_ids: Sequence[int]
    ) -> dict[str, str]:
        """`id_credits` with tokens instead of characters."""
        if not self._settings.is_micro:
            return {}
        credits = id_credits(completion, solution, extra_info, **self._reward_kwargs)
        if credits is None:
            return {"id_credits": ""}
        ends = self._token_ends(token_ids, completion)
        return {"id_credits": json.dumps([(place, bisect_left(ends, end), value) for place, end, value in credits])}

    def _token_ends(self, token_ids: Sequence[int], completion: str) -> list[int]:
        """The offset in the completion behind each of its tokens."""
        texts, tokenizer = self._texts_of_tokens, cast(Any, self.tokenizer)
        for token in token_ids:
            if token not in texts:
                texts[token] = str(tokenizer.decode([token], skip_special_tokens=False))
        ends = list(itertools.accumulate([len(texts[token]) for token in token_ids]))
        if "".join([texts[token] for token in token_ids]).startswith(completion):
            return ends
        # A tokenizer whose tokens read differently by themselves: slower.
        return [
            len(str(tokenizer.decode(token_ids[: end + 1], skip_special_tokens=False)))
            for end in range(len(token_ids))
        ]

    def _diagnosis(self, completion: str, solution: str, extra_info: dict[str, Any]) -> dict[str, Any]:
        style = self._settings.answer_style
        found = diagnose(completion, solution, extra_info=extra_info, style=style)
        missing = 0
        if self._settings.embeddings is not None:
            scorer = open_scorer(self._settings.embeddings)
            missing = scorer.missing_in(parse_fragment(completion, style=style), extra_info)
        return {
            **dataclasses.asdict(found),
            "malformed": found.malformed.value if found.malformed else "",
            "missing_embeddings": missing,
            "confusion": json.dumps(_confusion(completion, solution, extra_info, style)),
        }


def _confusion(completion: str, solution: str, extra_info: Mapping[str, Any], style: AnswerStyle) -> list[list[int]]:
    """Of utterances and of images, as `ffr-verl evaluate` counts them."""
    answer, gold = parse_leniently(completion, style=style), parse_gold(solution) or Fragment((), ())
    utterances, images = row_universes(extra_info)
    return [
        list(confusion(answer.utterance_ids, gold.utterance_ids, universe=utterances)),
        list(confusion(answer.image_ids, gold.image_ids, universe=images)),
    ]


_compute_score = compute_score  # the constructor's argument has verl's name for it
