"""The rewards with the call signature of TRL's GRPOTrainer and of ms-swift's ORM.

Each takes a batch: `f(completions, solution, **columns) -> list[float]`. A completion is a text, or a conversation (a
list of messages) whose last message is the answer. Columns that a reward does not use are ignored.

`coherence`, `mcc` and rewards of one's own (`component("pkg://module:function")`) that take `extra_info` need to know
the dialogue of each row: from a column `extra_info` as `ffr-verl prepare` writes it, or from the columns
`dialogue_id`, `images` and `messages` (or `prompts`) of MLDR rows.

Settings are given once, by `configure(ffr, weights={...}, embeddings="data/embeddings")`; the result still has a name,
which trainers put on their curves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ffr_verl.dialogues import extra_info, parse_dialogue
from ffr_verl.doors import parse_door
from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle
from ffr_verl.rewards.components import Component, components_of, name_of, resolved
from ffr_verl.rewards.config import RewardConfig
from ffr_verl.rewards.ffr import compute_score
from ffr_verl.rewards.reading import Completion, read_gold, row_ids
from ffr_verl.rewards.settings import SETTINGS, check_settings
from ffr_verl.rewards.table import REWARDS
from ffr_verl.settings import refuse_unknown_keys

__all__ = ["BatchReward", "coherence", "component", "configure", "exact_match", "f1", "ffr", "format", "mcc"]


_ROW_COLUMNS = ("extra_info", "messages", "prompts", "dialogue_id", "images", "split")


def _extra_infos(columns: Mapping[str, Any], count: int) -> list[Any]:
    """What is known of each row's dialogue: of the column `extra_info`, else of the columns of MLDR rows."""
    for name in _ROW_COLUMNS:
        if columns.get(name) is not None and len(columns[name]) != count:
            raise FFRError(f"column {name}: {len(columns[name])} values for {count} completions")
    if all(columns.get(name) is None for name in ("extra_info", "messages", "prompts")):
        raise FFRError(
            "this reward needs the dialogue of each row: a column extra_info (of `ffr-verl prepare`), or the columns "
            f"dialogue_id, messages and images; found {', '.join(sorted(columns)) or 'none'}"
        )
    infos = []
    for row in range(count):
        cells = {name: columns[name][row] for name in _ROW_COLUMNS if columns.get(name) is not None}
        if cells.get("extra_info") is not None:
            infos.append(cells["extra_info"])
            continue
        prompt = cells.get("prompts") if cells.get("messages") is None else cells["messages"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        where = f"row {row} of the batch: column "
        if cells.get("dialogue_id") is None:
            raise FFRError(f"{where}dialogue_id: missing")
        try:
            dialogue = parse_dialogue(() if prompt is None else prompt, str(cells["dialogue_id"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FFRError(f"{where}messages: {error}") from None
        pictures = cells.get("images")
        infos.append(extra_info(dialogue, () if pictures is None else pictures, split=cells.get("split") or ""))
    return infos


class BatchReward:
    """A reward of the table over a batch, called as trainers do: `reward(completions, solution, **columns)`.

    Example:
        >>> gold = "<|utt_ids_start|>[0]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> f1([gold, [{"role": "assistant", "content": "no idea"}]], [gold, gold])
        [1.0, 0.0]
        >>> format(["no idea"])
        [0.0]
        >>> info = {"dialogue_id": "d", "utterance_ids": [0, 1], "image_utterances": [], "images": []}
        >>> mcc([gold], [gold], extra_info=[info])
        [1.0]
        >>> coherence([gold], [gold], store={"utt:d:0": [1.0, 0.0]}, extra_info=[info])
        [0.5]
    """

    def __init__(self, name: str, settings: Mapping[str, Any] | None = None) -> None:
        self.__name__ = name
        self._settings = dict(settings or {})

    def allowed(self) -> tuple[str, ...]:
        """Names of its settings, which a call takes too."""
        return tuple(SETTINGS.keys() & inspect.signature(REWARDS[self.__name__].function).parameters)

    def configured(self, settings: Mapping[str, Any]) -> BatchReward:
        """The same with settings, see `configure`."""
        refuse_unknown_keys(settings, allowed=self.allowed(), where=self.__name__)
        check_settings(self.__name__, **settings)
        return BatchReward(self.__name__, {**self._settings, **settings})

    def __call__(
        self, completions: Sequence[Completion], solution: Sequence[str] | None = None, **columns: Any
    ) -> list[float]:
        """The reward of each completion. Raises `FFRError`, which names column and row, for columns that the reward
        needs and that are missing, of another length or of another kind."""
        given = {name: columns.pop(name) for name in self.allowed() if name in columns}
        reward = self.configured(given) if given else self
        infos = _extra_infos(columns, len(completions)) if reward._needs_dialogue() else [None] * len(completions)
        golds = [None] * len(completions) if solution is None else solution
        if len(golds) != len(completions):
            raise FFRError(f"column solution: {len(golds)} values for {len(completions)} completions")
        found = []
        for row, (completion, gold, info) in enumerate(zip(completions, golds, infos, strict=True)):
            try:
                found.append(reward._score(completion, gold, info))
            except FFRError as error:
                raise FFRError(f"row {row} of the batch: {error}") from None
        return found

    def _needs_dialogue(self) -> bool:
        needs = REWARDS[self.__name__].needs
        if needs == "vectors" and self._settings.get("store") is None:
            raise FFRError("coherence needs an embedding store: configure(coherence, store='data/embeddings')")
        return needs in ("dialogue", "vectors")

    def _score(self, completion: Completion, gold: Any, info: Any) -> float:
        reward = REWARDS[self.__name__]
        golds = () if reward.needs == "answer" else (gold,)
        of_dialogue: dict[str, Any] = {}
        if reward.needs == "vectors":
            of_dialogue["extra_info"] = info
        elif reward.needs == "dialogue":
            of_dialogue["n_utterances"], of_dialogue["n_images"] = row_ids(info)
        return reward.function(completion, *golds, **of_dialogue, **self._settings)


class _Own(BatchReward):
    """A component of one's own, see `component`."""

    def __init__(self, loaded: Component, embeddings: str | None, style: AnswerStyle) -> None:
        super().__init__(loaded.name)
        self._component, self._embeddings, self._style = loaded, embeddings, style

    def allowed(self) -> tuple[str, ...]:
        return ()

    def _needs_dialogue(self) -> bool:
        return self._component.needs_dialogue

    def _score(self, completion: Completion, gold: Any, info: Any) -> float:
        read_gold(gold)
        return self._component.value(completion, gold, info, style=self._style, embeddings=self._embeddings)


class _Composed(BatchReward):
    """The `score` of `compute_score`; its settings are those of `RewardConfig`."""

    def allowed(self) -> tuple[str, ...]:
        return ("reward_kwargs",)

    def configured(self, settings: Mapping[str, Any]) -> BatchReward:
        flat = {**settings}
        nested = flat.pop("reward_kwargs", None) or {}
        if not isinstance(nested, Mapping):
            raise FFRError(f"ffr.reward_kwargs: found {nested!r}, expected a mapping such as {{weights: {{f1: 1.0}}}}")
        kwargs = {**self._settings, **nested, **flat}
        if isinstance(kwargs.get("components"), Mapping):
            kwargs["components"] = resolved(kwargs["components"])
        config = RewardConfig.from_kwargs(kwargs, where="reward_kwargs" if "reward_kwargs" in settings else "ffr")
        if config.embeddings is not None:
            SETTINGS["store"]("ffr.embeddings", config.embeddings)
        return _Composed(self.__name__, kwargs)

    def _needs_dialogue(self) -> bool:
        config = RewardConfig.from_kwargs(self._settings)
        is_ours = config.embeddings is not None or config.is_micro or "mcc" in dict(config.weights)
        return is_ours or any(one.needs_dialogue for one in config.components)

    def _score(self, completion: Completion, gold: Any, info: Any) -> float:
        return compute_score("", completion, gold, info, **self._settings)["score"]  # type: ignore[arg-type]


f1, coherence, format, mcc, exact_match = map(BatchReward, ("f1", "coherence", "format", "mcc", "exact_match"))
ffr: BatchReward = _Composed("ffr")


def component(
    function: str | Callable[..., float],
    *,
    name: str | None = None,
    embeddings: str | None = None,
    answer_style: AnswerStyle = "plain",
    **settings: Any,
) -> BatchReward:
    """A reward of one's own (docs/rewards.md) over a batch, with its name on the trainer's curves.

    Args:
        function: `pkg://module:function`, `path/to/file.py:function`, an entry point of the group `ffr_verl.rewards`
            such as relevance, or the function itself.
        name: on the curves; by default that of the function.
        embeddings: folder of the embedding store, for a function that takes `store`.
        answer_style: for a function that takes `style`.
        **settings: of the function.

    Raises:
        FFRError: for what cannot be loaded, takes other arguments, or a store that is needed and not there.

    Example:
        >>> def brevity(completion, solution, *, most=40):
        ...     return 1.0 / (1.0 + len(completion) / most)
        >>> component(brevity, most=10)(["no idea..."], ["..."])
        [0.5]
    """
    if name is None:
        name = parse_door(function, where="component").name if isinstance(function, str) else name_of(function)
    given = {name: {"function": function, **settings}}
    if embeddings is not None:
        SETTINGS["store"](f"{name}.embeddings", embeddings)
    found = components_of(resolved(given), (), embeddings=embeddings, where="component")
    SETTINGS["style"](f"{name}.answer_style", answer_style)
    return _Own(found[0], embeddings, answer_style)


def configure(reward: BatchReward, **settings: Any) -> BatchReward:
    """A reward of this module with its settings given; it keeps the reward's name, for the trainer's curves.

    Args:
        reward: one of this module.
        **settings: of its function (`f1_reward`, `coherence_reward`, …); of `ffr` those of `RewardConfig`, one by one
            or as `reward_kwargs={...}`.

    Raises:
        FFRError: for a setting that the reward does not have or a value that it does not take.

    Example:
        >>> gold = "<|utt_ids_start|>[1]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"
        >>> configure(ffr, weights={"f1": 2.0})([gold], [gold])
        [2.0]
        >>> configure(f1, length_penalty=0.5).__name__
        'f1'
        >>> configure(f1, lenght_penalty=0.5)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ffr_verl.errors.FFRError: f1.lenght_penalty: unknown key; did you mean 'length_penalty'? ...
    """
    if not isinstance(reward, BatchReward):
        raise FFRError(f"configure: found {reward!r}, expected a reward of ffr_verl.rewards.batch; see component, too")
    return reward.configured(settings)
