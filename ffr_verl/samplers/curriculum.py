"""Static curricula: the order in which the rows of a file are trained, computed once from their difficulty."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np

from ffr_verl.errors import FFRError
from ffr_verl.samplers.difficulty import PUBLISHED_SHARES, Level, select_rows
from ffr_verl.unknown_keys import refuse_unknown_keys

__all__ = ["CurriculumConfig", "CurriculumOrder", "CurriculumSampler", "Pacing", "RowDifficulty", "order_rows"]

CurriculumOrder = Literal["published", "ascending", "competence", "shuffled"]
Pacing = Literal["linear", "root", "steps"]
_WHERE = "data.ffr.curriculum"


@dataclass(frozen=True, slots=True)
class RowDifficulty:
    """The difficulty of every row of a file, in its order.

    Attributes:
        f1: shape `(rows,)`, in [0, 1].
        entropy: the same shape, at least 0.
        levels: the same shape, strings, see `assign_levels`.
        is_negative: the same shape, whether the gold is empty.
    """

    f1: np.ndarray
    entropy: np.ndarray
    levels: np.ndarray
    is_negative: np.ndarray

    def __len__(self) -> int:
        return len(self.f1)


@dataclass(frozen=True, slots=True)
class CurriculumConfig:
    """Settings of a curriculum, the node `data.ffr.curriculum` of a recipe.

    Attributes:
        difficulty: file that `ffr-verl score` made for the training rows.
        order: `published`: the levels one after another, parts of them kept (`select_rows`); `ascending`: all rows by
            falling f1, of equals by rising entropy; `competence`: all rows, at each time drawn from the easiest ones,
            whose share grows; `shuffled`: all rows by chance, the baseline.
        shares: kept of each level, for `published`.
        pacing: how the share of `competence` grows with the share of the epoch that is over: `linear`, `root` (fast
            first) or in `steps`.
        start: share of `competence` at the beginning, above 0 and at most 1.
        steps: number of steps for `pacing: steps`.
        seed: of `competence` and `shuffled`.
    """

    difficulty: str | None = None
    order: CurriculumOrder = "published"
    shares: Mapping[Level, float] = field(default_factory=lambda: dict(PUBLISHED_SHARES))
    pacing: Pacing = "root"
    start: float = 0.1
    steps: int = 5
    seed: int = 0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> CurriculumConfig:
        """Check the node of a recipe.

        Raises:
            FFRError: for an unknown key or a value out of range; the message names the key.

        Example:
            >>> CurriculumConfig.from_mapping({"order": "ascending"}).order
            'ascending'
        """
        refuse_unknown_keys(values, allowed=[one.name for one in fields(cls)], where=_WHERE)
        config = cls(**{**values, "shares": {**PUBLISHED_SHARES, **(values.get("shares") or {})}})
        refuse_unknown_keys(config.shares, allowed=list(PUBLISHED_SHARES), where=f"{_WHERE}.shares")
        for name, choices in (("order", get_args(CurriculumOrder)), ("pacing", get_args(Pacing))):
            if getattr(config, name) not in choices:
                raise FFRError(
                    f"{_WHERE}.{name}: found {getattr(config, name)!r}, expected one of {', '.join(choices)}"
                )
        for name, value in config.shares.items():
            if not _is_number(value) or not 0 <= value <= 1:
                raise FFRError(f"{_WHERE}.shares.{name}: found {value!r}, expected a share from 0 to 1")
        if not _is_number(config.start) or not 0 < config.start <= 1:
            raise FFRError(f"{_WHERE}.start: found {config.start!r}, expected a share above 0 and at most 1")
        for name, least in (("steps", 1), ("seed", 0)):
            value = getattr(config, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise FFRError(f"{_WHERE}.{name}: found {value!r}, expected a whole number from {least}")
        if config.difficulty is not None and not isinstance(config.difficulty, str):
            raise FFRError(f"{_WHERE}.difficulty: found {config.difficulty!r}, expected a file of `ffr-verl score`")
        return config


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def competence(time: float, config: CurriculumConfig) -> float:
    """Share of the rows, easiest first, that may be drawn at a time in [0, 1].

    Source: competence-based curricula (Platanios et al., 2019) for `linear` and `root`; `steps` is ours.

    Example:
        >>> config = CurriculumConfig(order="competence", pacing="linear", start=0.2)
        >>> [round(competence(time, config), 6) for time in (0.0, 0.5, 1.0)]
        [0.2, 0.6, 1.0]
    """
    if config.pacing == "root":
        return math.sqrt(config.start**2 + (1 - config.start**2) * time)
    if config.pacing == "steps":
        time = min(1.0, (math.floor(time * config.steps) + 1) / config.steps)
    return config.start + (1 - config.start) * time


def order_rows(rows: RowDifficulty, config: CurriculumConfig) -> np.ndarray:
    """Row numbers in the order of training, for one epoch.

    Args:
        rows: the difficulty of every row.
        config: which order.

    Returns:
        int64; every row once, but for `published`, which leaves rows out.

    Example:
        >>> rows = RowDifficulty(np.array([0.2, 1.0, 0.5]), np.ones(3), np.array(["hard"] * 3), np.zeros(3, bool))
        >>> order_rows(rows, CurriculumConfig(order="ascending")).tolist()
        [1, 2, 0]
    """
    if config.order == "published":
        return select_rows(rows.levels, rows.f1, rows.is_negative, shares=config.shares)
    if config.order == "shuffled":
        return np.random.default_rng(config.seed).permutation(len(rows))
    ascending = np.lexsort((rows.entropy, -rows.f1))
    return ascending if config.order == "ascending" else _by_competence(ascending, config)


def _by_competence(ascending: np.ndarray, config: CurriculumConfig) -> np.ndarray:
    """Each row once: at every place one of the easiest that may be drawn then and was not drawn before."""
    count = len(ascending)
    chances = np.random.default_rng(config.seed).random(count).tolist()
    waiting: list[int] = []
    order: list[int] = []
    rows, opened = ascending.tolist(), 0
    for place, chance in enumerate(chances):
        limit = min(count, max(place + 1, math.ceil(competence(place / count, config) * count)))
        if limit > opened:
            waiting += rows[opened:limit]
            opened = limit
        drawn = int(chance * len(waiting))
        waiting[drawn], waiting[-1] = waiting[-1], waiting[drawn]
        order.append(waiting.pop())
    return np.array(order, dtype=np.int64)


class CurriculumSampler:
    """Gives the rows of a curriculum one after another, and can be stopped and gone on with at any row.

    A torch `Sampler` as far as data loaders look (`__iter__`, `__len__`, `state_dict`, `load_state_dict`), without
    torch.

    Args:
        rows: the difficulty of every row.
        config: which order.

    Example:
        >>> rows = RowDifficulty(np.array([0.2, 1.0]), np.ones(2), np.array(["hard"] * 2), np.zeros(2, bool))
        >>> sampler = CurriculumSampler(rows, CurriculumConfig(order="ascending"))
        >>> next(iter(sampler)), sampler.state_dict()["position"], list(sampler)
        (1, 1, [0])
    """

    def __init__(self, rows: RowDifficulty, config: CurriculumConfig) -> None:
        self.order = order_rows(rows, config)
        self._position = 0
        self._epoch = 0

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        """What is left of this epoch; a further call begins the next one."""
        while self._position < len(self.order):
            self._position += 1
            yield int(self.order[self._position - 1])
        self._position = 0
        self._epoch += 1

    def state_dict(self) -> dict[str, int]:
        """Where it is: `epoch`, `position` in it, and a fingerprint of the order."""
        return {"epoch": self._epoch, "position": self._position, "order": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where a `state_dict` was taken.

        Raises:
            FFRError: when it was taken of another order.
        """
        if state["order"] != self._fingerprint():
            raise FFRError(
                "the state of the curriculum belongs to another order: the difficulty file or data.ffr.curriculum "
                "has changed since the checkpoint; start anew, or give what it was"
            )
        self._epoch, self._position = state["epoch"], state["position"]

    def _fingerprint(self) -> int:
        return zlib.crc32(np.ascontiguousarray(self.order, dtype="<i8").tobytes())
