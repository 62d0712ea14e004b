"""The rewards with the call signature of TRL's GRPOTrainer and of ms-swift's ORM.

Each takes a batch: `f(completions, solution, **columns) -> list[float]`. A completion is a text, or a conversation (a
list of messages) whose last message is the answer. Columns that a reward does not use are ignored.

`coherence` and `mcc` need to know the dialogue of each row: from a column `extra_info` as `ffr-verl prepare` writes
it, or from the columns `dialogue_id`, `images` and `messages` (or `prompts`) of MLDR rows.

Settings are given once, by `configure(ffr, weights={...}, embeddings="data/embeddings")`; the result still has a name,
which trainers put on their curves.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ffr_verl.dialogues import extra_info, parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle
from ffr_verl.rewards.coherence import CoherenceMode, VectorSource, coherence_reward
from ffr_verl.rewards.exact_match import exact_match_reward
from ffr_verl.rewards.f1 import f1_reward
from ffr_verl.rewards.ffr import RewardConfig, compute_score, open_store
from ffr_verl.rewards.format import format_reward
from ffr_verl.rewards.mcc import mcc_reward
from ffr_verl.settings import refuse_unknown_keys

__all__ = ["BatchReward", "coherence", "configure", "exact_match", "f1", "ffr", "format", "mcc"]

Completion = str | list[dict[str, Any]]
_ROW_COLUMNS = ("extra_info", "messages", "prompts", "dialogue_id", "images", "split")
BatchReward = Callable[..., list[float]]


def _text(completion: Completion) -> str:
    """What the model said last; a tool's or the user's message at the end of a conversation is no answer."""
    if isinstance(completion, str):
        return completion
    message = completion[-1] if completion else {}
    return _content(message) if message.get("role", "assistant") == "assistant" else ""


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join([item.get("text") or "" for item in content or ()])


def _golds(solution: Sequence[str], completions: Sequence[Completion]) -> Sequence[str]:
    if len(solution) != len(completions):
        raise FFRError(f"column solution: {len(solution)} values for {len(completions)} completions")
    return solution


def _extra_infos(columns: Mapping[str, Any], count: int, *, with_paths: bool = True) -> list[Mapping[str, Any]]:
    """What is known of each row's dialogue: of the column `extra_info`, else of the columns of MLDR rows."""
    for name in _ROW_COLUMNS:
        if columns.get(name) is not None and len(columns[name]) != count:
            raise FFRError(f"column {name}: {len(columns[name])} values for {count} completions")
    given = columns.get("extra_info")
    if given is None and (columns.get("messages") or columns.get("prompts")) is None:
        raise FFRError(
            "this reward needs the dialogue of each row: a column extra_info (of `ffr-verl prepare`), or the columns "
            f"dialogue_id, messages and images; found {', '.join(sorted(columns)) or 'none'}"
        )
    infos: list[Mapping[str, Any]] = []
    for row in range(count):
        cells = {name: columns[name][row] for name in _ROW_COLUMNS if columns.get(name) is not None}
        if cells.get("extra_info") is not None:
            infos.append(cells["extra_info"])
            continue
        prompt = cells.get("messages") or cells.get("prompts") or ()
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        paths = cells.get("images") or ()
        try:
            if cells.get("dialogue_id") is None:
                raise FFRError("column dialogue_id: missing")
            messages = [{"role": message.get("role"), "content": _content(message)} for message in prompt]
            dialogue = parse_dialogue(messages, str(cells["dialogue_id"]))
            names = [_image_path(path) for path in paths] if with_paths else [""] * len(paths)
        except (ValueError, AttributeError, TypeError) as error:
            where = "" if isinstance(error, FFRError) else "column messages: "
            raise FFRError(f"row {row} of the batch: {where}{error}") from None
        infos.append(extra_info(dialogue, names, split=str(cells.get("split") or "")))
    return infos


def _image_path(image: Any) -> str:
    path = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(path, str):
        raise FFRError(
            f"column images: found {type(image).__name__}, expected the image's path as it stood in the row; with "
            "decoded pictures give a column extra_info (of `ffr-verl prepare`) instead"
        )
    return path


def f1(
    completions: Sequence[Completion],
    solution: Sequence[str],
    *,
    utterance_weight: float = 0.5,
    image_weight: float = 0.5,
    beta: float = 1.0,
    length_penalty: float = 0.95,
    style: AnswerStyle = "plain",
    **columns: Any,
) -> list[float]:
    """`f1_reward` of each completion.

    Example:
        >>> gold = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> f1([gold, [{"role": "assistant", "content": "no idea"}]], [gold, gold])
        [1.0, 0.0]
    """
    return [
        f1_reward(
            _text(one),
            gold,
            utterance_weight=utterance_weight,
            image_weight=image_weight,
            beta=beta,
            length_penalty=length_penalty,
            style=style,
        )
        for one, gold in zip(completions, _golds(solution, completions), strict=True)
    ]


def coherence(
    completions: Sequence[Completion],
    solution: Sequence[str],
    *,
    store: VectorSource | str | os.PathLike[str] | None = None,
    mode: CoherenceMode = "continuous",
    style: AnswerStyle = "plain",
    **columns: Any,
) -> list[float]:
    """`coherence_reward` of each completion; `configure` it with a `store`, an open one or its path.

    Example:
        >>> gold = "<|utt_ids_start|>[0]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> info = {"dialogue_id": "d", "utterance_ids": [0], "image_utterances": [], "images": []}
        >>> coherence([gold], [gold], store={"utt:d:0": [1.0, 0.0]}, extra_info=[info])
        [0.5]
    """
    if store is None:
        raise FFRError("coherence needs an embedding store: configure(coherence, store='data/embeddings')")
    source = open_store(store) if isinstance(store, (str, os.PathLike)) else store
    infos = _extra_infos(columns, len(completions))
    return [
        coherence_reward(_text(one), gold, extra_info=info, store=source, mode=mode, style=style)
        for one, gold, info in zip(completions, _golds(solution, completions), infos, strict=True)
    ]


def format(
    completions: Sequence[Completion],
    solution: Sequence[str] | None = None,
    *,
    style: AnswerStyle = "plain",
    **columns: Any,
) -> list[float]:
    """`format_reward` of each completion; `solution` is taken as the others take it, and not used.

    Example:
        >>> format(["no idea"])
        [0.0]
    """
    return [format_reward(_text(one), style=style) for one in completions]


def mcc(
    completions: Sequence[Completion], solution: Sequence[str], *, style: AnswerStyle = "plain", **columns: Any
) -> list[float]:
    """`mcc_reward` of each completion.

    Example:
        >>> gold = "<|utt_ids_start|>[0]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> mcc([gold], [gold], extra_info=[{"utterance_ids": [0, 1, 2], "images": []}])
        [1.0]
    """
    infos = _extra_infos(columns, len(completions), with_paths=False)
    return [
        mcc_reward(
            _text(one), gold, n_utterances=len(info["utterance_ids"]), n_images=len(info["images"]), style=style
        )
        for one, gold, info in zip(completions, _golds(solution, completions), infos, strict=True)
    ]


def exact_match(
    completions: Sequence[Completion], solution: Sequence[str], *, style: AnswerStyle = "plain", **columns: Any
) -> list[float]:
    """`exact_match_reward` of each completion.

    Example:
        >>> exact_match(["no idea"], ["<|utt_ids_start|>[]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"])
        [0.0]
    """
    return [
        exact_match_reward(_text(one), gold, style=style)
        for one, gold in zip(completions, _golds(solution, completions), strict=True)
    ]


def ffr(
    completions: Sequence[Completion],
    solution: Sequence[str],
    *,
    reward_kwargs: Mapping[str, Any] | None = None,
    **columns: Any,
) -> list[float]:
    """The `score` of `compute_score` of each completion; `configure(ffr, reward_kwargs={...})` sets it up.

    Example:
        >>> gold = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> ffr([gold], [gold])
        [1.3]
        >>> configure(ffr, reward_kwargs={"weights": {"f1": 2.0}})([gold], [gold])
        [2.0]
    """
    kwargs = dict(reward_kwargs or {})
    config = RewardConfig.from_kwargs(kwargs)
    infos: Sequence[Mapping[str, Any] | None] = [None] * len(completions)
    if config.embeddings is not None or "mcc" in dict(config.weights) or config.is_micro:
        infos = _extra_infos(columns, len(completions), with_paths=config.embeddings is not None)
    return [
        compute_score("", _text(one), gold, info, **kwargs)["score"]
        for one, gold, info in zip(completions, _golds(solution, completions), infos, strict=True)
    ]


def configure(reward: BatchReward, **settings: Any) -> BatchReward:
    """A reward of this module with its settings given; it keeps the reward's name, for the trainer's curves.

    Raises:
        FFRError: for a setting that the reward does not have.

    Example:
        >>> strict_f1 = configure(f1, length_penalty=0.5)
        >>> strict_f1.__name__
        'f1'
        >>> configure(f1, lenght_penalty=0.5)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ffr_verl.errors.FFRError: f1.lenght_penalty: unknown key; did you mean 'length_penalty'? ...
    """
    parameters = inspect.signature(reward).parameters.values()
    allowed = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    name = getattr(reward, "__name__", "reward")
    refuse_unknown_keys(settings, allowed=allowed, where=name)
    configured = functools.partial(reward, **settings)
    configured.__name__ = name  # type: ignore[attr-defined]
    return configured
