"""All rewards: the table that `compute_score`, the batch functions, the evaluation, the report and the docs follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment
from ffr_verl.rewards.coherence import coherence_reward, open_scorer
from ffr_verl.rewards.exact_match import exact_match_reward
from ffr_verl.rewards.f1 import f1_of_fragments, f1_reward
from ffr_verl.rewards.format import format_reward, has_no_repeats
from ffr_verl.rewards.mcc import mcc_of_fragments, mcc_reward
from ffr_verl.rewards.reading import row_ids

if TYPE_CHECKING:
    from ffr_verl.rewards.config import RewardConfig

Needs = Literal["answer", "gold", "dialogue", "vectors"]
Values = Callable[[Fragment | None, Fragment | None, Any, "RewardConfig"], tuple[float, ...]]


class Reward(NamedTuple):
    """A reward."""

    name: str  # of the component, its weight and its batch function
    function: Callable[..., float]  # of one completion
    values: Values  # of a parsed answer and gold, the row's `extra_info` and the settings; one for each of `keys`
    keys: tuple[str, ...]  # in the result of `compute_score`, which tells `dialogue` ones with a weight only
    weight: float  # by default
    needs: Needs  # the answer alone, its gold, the dialogue's ids too, its vectors too
    range: str
    summary: str
    source: str


def _f1(predicted: Fragment | None, gold: Fragment | None, info: Any, config: RewardConfig) -> tuple[float, ...]:
    if predicted is None or gold is None:
        return 0.0, 0.0, 0.0
    utterances, images = f1_of_fragments(predicted, gold, length_penalty=config.length_penalty)
    return config.utterance_weight * utterances + config.image_weight * images, utterances, images


def _coherence(predicted: Fragment | None, gold: Fragment | None, info: Any, config: RewardConfig) -> tuple[float]:
    if config.embeddings is None:
        return (0.0,)
    try:
        scorer = open_scorer(config.embeddings)
    except FFRError as error:
        raise FFRError(f"reward_kwargs.embeddings: {error}") from None
    return (scorer.score(predicted, gold, info, config.coherence_mode),)


def _format(predicted: Fragment | None, gold: Fragment | None, info: Any, config: RewardConfig) -> tuple[float]:
    return (float(predicted is not None and has_no_repeats(predicted)),)


def _exact_match(predicted: Fragment | None, gold: Fragment | None, info: Any, config: RewardConfig) -> tuple[float]:
    return (float(predicted is not None and predicted == gold),)


def _mcc(predicted: Fragment | None, gold: Fragment | None, info: Any, config: RewardConfig) -> tuple[float]:
    if predicted is None or gold is None:
        return (0.0,)
    utterances, images = row_ids(info)
    return (mcc_of_fragments(predicted, gold, utterances=utterances, images=images),)


# fmt: off
_REWARDS = (
    Reward("f1", f1_reward, _f1, ("f1", "f1_utterances", "f1_images"), 1.0, "gold", "0 to 1",
           "F1 of the ids, utterances and images in equal parts, less for another length", "published"),
    Reward("coherence", coherence_reward, _coherence, ("coherence",), 1.0, "vectors", "-1 to 1",
           "mean cosine of neighbouring elements of the predicted fragment",
           "`published` mode published, others ours"),
    Reward("format", format_reward, _format, ("format",), 0.3, "answer", "0 or 1",
           "well-formed, no id twice in a list", "published; one `style` for every reward is ours"),
    Reward("exact_match", exact_match_reward, _exact_match, ("exact_match",), 0.0, "gold", "0 or 1",
           "both lists equal in order", "ours"),
    Reward("mcc", mcc_reward, _mcc, ("mcc",), 0.0, "dialogue", "-1 to 1",
           "Matthews correlation over all ids of the dialogue", "published evaluation"),
)
# fmt: on
# What `compute_score` returns beside these with each `f1_mode`; the weight of f1 counts the first, where there is one.
MODE_KEYS: Mapping[str, tuple[str, ...]] = {
    "published": (),
    "pooled": ("f1_pooled",),
    **dict.fromkeys(("micro", "micro_f1_mcc"), ("f1_micro", "f1_micro_utterances", "f1_micro_images")),
}
REWARDS: Mapping[str, Reward] = {reward.name: reward for reward in _REWARDS}
COMPONENTS = tuple(REWARDS)
DEFAULT_WEIGHTS = {name: reward.weight for name, reward in REWARDS.items() if reward.weight}


def keys_of(*needs: Needs) -> tuple[str, ...]:
    """Keys of `compute_score` that can be told from these alone."""
    return tuple([key for reward in REWARDS.values() if reward.needs in needs for key in reward.keys])
