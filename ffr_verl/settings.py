"""Every setting of ours in a recipe: key, range, default (the published numbers). docs/recipes.md has the
values of `ffr_grpo`.

A misspelled key or a value out of range is an error that names the key, never a setting that is silently ignored.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

import msgspec
from msgspec import Meta

from ffr_verl.doors import entry_points, parse_door, unknown_name
from ffr_verl.errors import FFRError, did_you_mean

logger = logging.getLogger(__name__)

# Published; the recipes say the same to verl.
DEFAULT_MAX_PIXELS = 602_112  # of an image
DEFAULT_MAX_IMAGES = 8  # of a prompt
DEFAULT_MAX_PROMPT_TOKENS, DEFAULT_MAX_NEW_TOKENS = 14_512, 1_024
DEFAULT_MAX_MODEL_LEN = DEFAULT_MAX_PROMPT_TOKENS + DEFAULT_MAX_NEW_TOKENS
Share = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[str, Meta(min_length=1)]
ORDER_NAMES = ("file", "published", "ascending", "competence", "shuffled", "online")
ORDER_ENTRY_POINTS = "ffr_verl.orders"
# How a run asks for our datasets (the second is of older copies of a recipe), and for our replay buffer.
DATASET_PATHS = ("pkg://ffr_verl.integrations.verl.datasets", "pkg://ffr_verl.data.datasets")
BUFFER_NODE, BUFFER_PATH = "trainer.v1.sampler.custom_sampler", "pkg://ffr_verl.samplers"
BUFFER_SETTING = f"{BUFFER_NODE}: {{path: {BUFFER_PATH}, name: FFRReplayBuffer}}"
# The class of `trainer.checkpoint_callback_class` in our recipes.
BEST_CHECKPOINT = "ffr_verl.integrations.verl.checkpoints.BestCheckpoint"
_Self = TypeVar("_Self", bound="Settings")


def refuse_unknown_keys(keys: Iterable[object], *, allowed: Iterable[str], where: str) -> None:
    """Raise an `FFRError` for the first of `keys` that is not `allowed`, with the nearest allowed one."""
    known = sorted(allowed)
    for key in keys:
        if key not in known:
            raise FFRError(f"{where}.{key}: unknown key; {did_you_mean(key, known)}Allowed: {', '.join(known)}")


class Settings(msgspec.Struct, frozen=True):
    """A node of a recipe; its fields are the keys. `from_mapping` checks, the constructor does not."""

    node: ClassVar[str] = ""

    @classmethod
    def from_mapping(cls: type[_Self], values: Mapping[str, Any]) -> _Self:
        """Check a node of a recipe; keys that are missing there, or null where that is no value, have their defaults.

        An unknown key or a value out of range is an `FFRError` that names the key.
        """
        fields = {field.name: field for field in msgspec.structs.fields(cls)}
        refuse_unknown_keys(values, allowed=fields, where=cls.node)
        given = {}
        for name, value in values.items():
            kind = fields[name].type
            if value is not None or type(None) in get_args(kind):
                given[name] = _checked(kind, value, f"{cls.node}.{name}")
        return cls(**given)


def _checked(kind: Any, value: Any, where: str) -> Any:
    kinds = (kind, *get_args(kind))
    inner = next((one for one in kinds if isinstance(one, type) and issubclass(one, Settings)), None)
    if inner is not None and isinstance(value, Mapping):
        return inner.from_mapping(value)
    found = plain(value, where)
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        choices = [str(one) for part in kinds for one in get_args(part) if isinstance(one, str)]
        choices += ["a list of names" for part in kinds if get_origin(part) is list]
        text = str(error).partition(" - at `$")[0].lower()
        expected = f"expected one of {', '.join(dict.fromkeys(choices))}" if choices else text
        raise FFRError(f"{where}: found {found!r}, {expected}") from None


def plain(value: Any, where: str) -> Any:
    """OmegaConf's containers as those of Python; an `FFRError`, with `where`, for a number that is not finite."""
    if isinstance(value, Mapping):
        return {key: plain(one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(one, where) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise FFRError(f"{where}: found {value}, expected a finite number")
    return value


class OnlineConfig(Settings, frozen=True):
    """Settings of `order: online`."""

    node: ClassVar[str] = "data.ffr.curriculum.online"
    # Of an answer, whose standard deviation in a group is the row's spread: `reward`, or a key of `compute_score`.
    metric: Name = "reward"
    # Weight of what was known of a row when its next group is observed.
    decay: Annotated[float, Meta(ge=0, lt=1)] = 0.5
    # Weight of rows without spread, beside 1 of a typical row, so that none is forgotten.
    floor: Annotated[float, Meta(gt=0, le=1)] = 0.1
    # No longer read: rows were drawn around a score before. Kept for older recipes.
    scale: float | None = None
    target: float | None = None
    width: float | None = None

    def __post_init__(self) -> None:
        if self.target is not None:
            logger.warning("%s.target is no longer read: rows are drawn by the spread of their groups", self.node)


class LevelShares(Settings, frozen=True):
    """Kept of each level by the published selection, best f1 first."""

    node: ClassVar[str] = "data.ffr.curriculum.shares"
    easy: Share = 1.0
    middle: Share = 0.1
    confusing: Share = 0.5
    hard: Share = 1.0


class CurriculumConfig(Settings, frozen=True):
    """Settings of a curriculum.

    `order`: `file`: as they stand in the file; `published`: the levels one after another, parts of them kept
    (`select_rows`); `ascending`: all rows by falling f1, of equals by rising entropy; `competence`: all rows, at each
    time drawn from the easiest ones, whose share grows; `shuffled`: all rows by chance, the baseline; `online`: drawn
    again in every step, by the spread of the policy's own rewards.
    `strata`: what every step shall have in the data's shares, whatever the order (but for `file` and `published`):
    `gold`: rows without a gold id, with utterances only, with images; a list of columns of the data, whose values are
    the strata; `None` for none.
    """

    node: ClassVar[str] = "data.ffr.curriculum"
    difficulty: str | None = None  # file that `ffr-verl score` made for the training rows
    order: str = "published"  # a name above; or `pkg://module:Class`, `path/to/file.py:Class` or an entry point
    settings: dict[str, Any] = {}  # of an order of one's own
    strata: Literal["gold"] | list[str] | None = "gold"
    shares: LevelShares = LevelShares()  # kept of each level, for `published`
    # How the share of `competence` grows with the share of the epoch that is over, from `start`, or in `steps`.
    pacing: Literal["linear", "root", "steps"] = "root"
    start: Annotated[float, Meta(gt=0, le=1)] = 0.1
    steps: Annotated[int, Meta(ge=1)] = 5
    seed: Annotated[int, Meta(ge=0)] = 0
    online: OnlineConfig = OnlineConfig()

    def __post_init__(self) -> None:
        where = f"{self.node}.order"
        if self.order in ORDER_NAMES:
            if self.settings:
                raise FFRError(f"{self.node}.settings: is of orders of one's own, {self.order} reads none")
        elif parse_door(self.order, where=where).is_entry_point and self.order not in entry_points(ORDER_ENTRY_POINTS):
            raise unknown_name(self.order, where=where, group=ORDER_ENTRY_POINTS, known=ORDER_NAMES)


class DataConfig(Settings, frozen=True):
    """Settings of `FFRDataset` and `FFRSFTDataset`."""

    node: ClassVar[str] = "data.ffr"
    images_root: str | None = None  # that image paths are relative to; `None`: what `ffr-verl prepare` recorded
    max_pixels: Annotated[int, Meta(ge=1)] = DEFAULT_MAX_PIXELS  # larger images are shrunk, smaller ones enlarged
    min_pixels: Annotated[int, Meta(ge=1)] | None = None  # `None` leaves qwen_vl_utils' own bound
    curriculum: CurriculumConfig = CurriculumConfig()  # RL only

    def __post_init__(self) -> None:
        if self.min_pixels is not None and self.min_pixels > self.max_pixels:
            raise FFRError(
                f"{self.node}.min_pixels: found {self.min_pixels}, more than max_pixels ({self.max_pixels})"
            )


class AdvantageConfig(Settings, frozen=True):
    """Settings of `algorithm.adv_estimator=ffr`.

    `credit`: `answer`: every token has the reward less its group's mean; `id`: every id is credited to the tokens that
    decide it (needs `f1_mode: micro` or `micro_f1_mcc`); `components`: GDPO of `components`, keys of the reward
    function and their weights.
    """

    node: ClassVar[str] = "trainer.v1.sampler.sampler_kwargs.advantage"
    credit: Literal["answer", "id", "components"] = "answer"
    components: dict[str, Annotated[float, Meta(ge=0)]] = {}

    def __post_init__(self) -> None:
        if self.credit == "components" and not any(self.components.values()):
            raise FFRError(
                f"{self.node}.components: credit=components sums components of the reward; name some with their "
                "weights, such as {f1_utterances: 0.5, f1_images: 0.5, format: 0.3}"
            )


class SamplerConfig(Settings, frozen=True):
    """Settings of `FFRReplayBuffer`."""

    node: ClassVar[str] = "trainer.v1.sampler.sampler_kwargs"
    poll_interval: Annotated[float, Meta(gt=0)] = 2.0  # seconds between two looks at the rollouts
    # So many seconds without another answer, or from a step's answers to its end, end the run; `None` for no limit.
    stall_timeout: Annotated[float, Meta(gt=0)] | None = 3600.0
    # Groups whose metric (`reward`, or a key of `compute_score`) hardly differs are evicted, and others generated: its
    # standard deviation is at most `min_std`. verl's own filter knows 0 only, which a continuous reward never hits.
    filter_groups: bool = False
    filter_groups_metric: Name = "reward"
    min_std: Annotated[float, Meta(ge=0)] = 0.0
    # After so many batches of evicted groups the filter rests until the next step, so that a policy that always agrees
    # with itself cannot regenerate without end; 0 for no limit.
    max_filtered_batches: Annotated[int, Meta(ge=0)] = 10
    train_batch_size: Annotated[int, Meta(ge=1)] | None = None  # prompts a step; needed with `filter_groups`
    max_inflight_gen_batches: Annotated[int, Meta(ge=1)] = 1  # batches of replacement prompts generated at once
    advantage: AdvantageConfig | None = None  # of `algorithm.adv_estimator=ffr`; `None` leaves advantages to verl
    # Of the validation, by whose largest value `BestCheckpoint` keeps a checkpoint: `micro_joint_f1`,
    # `micro_joint_mcc`, the same of `utterance` and `image`, or a key of the reward function; `None` keeps none.
    best_checkpoint: Name | None = None
    # Folder for STEP.jsonl of what verl's own dumps lack: components and advantage of each answer, its dialogue's id.
    dump_dir: Name | None = None

    def __post_init__(self) -> None:
        if self.filter_groups and self.train_batch_size is None:
            raise FFRError(
                f"{self.node}.train_batch_size is missing; filter_groups needs it: ${{data.train_batch_size}}"
            )
