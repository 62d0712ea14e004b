"""The keys of `data.ffr.curriculum`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from ffr_verl.errors import FFRError
from ffr_verl.samplers.difficulty import PUBLISHED_SHARES, Level
from ffr_verl.settings import refuse_unknown_keys

__all__ = ["CurriculumConfig", "CurriculumOrder", "OnlineConfig", "Pacing"]

CurriculumOrder = Literal["file", "published", "ascending", "competence", "shuffled", "online"]
Pacing = Literal["linear", "root", "steps"]
_WHERE = "data.ffr.curriculum"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OnlineConfig:
    """Settings of `order: online`, the node `data.ffr.curriculum.online`.

    Attributes:
        metric: of an answer, whose standard deviation in a group is the row's spread: `reward`, or a key that
            `compute_score` returns.
        decay: weight in [0, 1) of what was known of a row when its next group is observed.
        floor: weight in (0, 1] of rows without spread, beside 1 of those with the most, so that none is forgotten.
        scale: no longer read, as `target` and `width`: rows were drawn around a score before. Kept for older recipes.
        target: see `scale`.
        width: see `scale`.
    """

    metric: str = "reward"
    decay: float = 0.5
    floor: float = 0.1
    scale: float | None = None
    target: float | None = None
    width: float | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> OnlineConfig:
        """Check the node of a recipe.

        Raises:
            FFRError: for an unknown key or a value out of range; the message names the key.

        Example:
            >>> OnlineConfig.from_mapping({"floor": 0.2}).floor
            0.2
        """
        where = f"{_WHERE}.online"
        refuse_unknown_keys(values, allowed=[one.name for one in fields(cls)], where=where)
        config = cls(**values)
        if not isinstance(config.metric, str) or not config.metric:
            raise FFRError(f"{where}.metric: found {config.metric!r}, expected `reward` or a key of compute_score")
        for name, is_good, expected in (
            ("decay", lambda value: 0 <= value < 1, "a number from 0, below 1"),
            ("floor", lambda value: 0 < value <= 1, "a number above 0, at most 1"),
        ):
            value = getattr(config, name)
            if not _is_number(value) or not is_good(value):
                raise FFRError(f"{where}.{name}: found {value!r}, expected {expected}")
        if config.target is not None:
            logger.warning("%s.target is no longer read: rows are drawn by the spread of their groups", where)
        return config


@dataclass(frozen=True, slots=True)
class CurriculumConfig:
    """Settings of a curriculum, the node `data.ffr.curriculum` of a recipe.

    Attributes:
        difficulty: file that `ffr-verl score` made for the training rows.
        order: `file`: as they stand in the file; `published`: the levels one after another, parts of them kept
            (`select_rows`); `ascending`: all rows by falling f1, of equals by rising entropy; `competence`: all rows,
            at each time drawn from the easiest ones, whose share grows; `shuffled`: all rows by chance, the baseline;
            `online`: drawn again in every step, by the spread of the policy's own rewards.
        strata: what every step shall have in the data's shares, whatever the order (but for `file` and `published`):
            `gold`: rows without a gold id, with utterances only, with images; a list of columns of the data, whose
            values are the strata; `None` for none.
        shares: kept of each level, for `published`.
        pacing: how the share of `competence` grows with the share of the epoch that is over: `linear`, `root` (fast
            first) or in `steps`.
        start: share of `competence` at the beginning, above 0 and at most 1.
        steps: number of steps for `pacing: steps`.
        seed: of `competence`, `shuffled` and `online`.
        online: of `online`.

    Raises:
        FFRError: for a value out of range; the message names the key.
    """

    difficulty: str | None = None
    order: CurriculumOrder = "published"
    strata: Literal["gold"] | tuple[str, ...] | None = "gold"
    shares: Mapping[Level, float] = field(default_factory=lambda: dict(PUBLISHED_SHARES))
    pacing: Pacing = "root"
    start: float = 0.1
    steps: int = 5
    seed: int = 0
    online: OnlineConfig = field(default_factory=OnlineConfig)

    def __post_init__(self) -> None:
        refuse_unknown_keys(self.shares, allowed=list(PUBLISHED_SHARES), where=f"{_WHERE}.shares")
        for name, choices in (("order", get_args(CurriculumOrder)), ("pacing", get_args(Pacing))):
            if getattr(self, name) not in choices:
                raise FFRError(f"{_WHERE}.{name}: found {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        for name, value in self.shares.items():
            if not _is_number(value) or not 0 <= value <= 1:
                raise FFRError(f"{_WHERE}.shares.{name}: found {value!r}, expected a share from 0 to 1")
        if not _is_number(self.start) or not 0 < self.start <= 1:
            raise FFRError(f"{_WHERE}.start: found {self.start!r}, expected a share above 0 and at most 1")
        for name, least in (("steps", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise FFRError(f"{_WHERE}.{name}: found {value!r}, expected a whole number from {least}")
        strata = self.strata
        if not (
            strata in ("gold", None) or (isinstance(strata, tuple) and all(isinstance(one, str) for one in strata))
        ):
            raise FFRError(f"{_WHERE}.strata: found {strata!r}, expected gold, a list of column names, or null")
        if self.difficulty is not None and not isinstance(self.difficulty, str):
            raise FFRError(f"{_WHERE}.difficulty: found {self.difficulty!r}, expected a file of `ffr-verl score`")

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
        shares = {**PUBLISHED_SHARES, **(values.get("shares") or {})}
        online = OnlineConfig.from_mapping(values.get("online") or {})
        given = {**values, "shares": shares, "online": online}
        if isinstance(given.get("strata"), Sequence) and not isinstance(given["strata"], str):
            given["strata"] = tuple(given["strata"]) or None
        return cls(**given)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
