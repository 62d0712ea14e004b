"""The sampler of a curriculum: which row comes next, and how far training has come.

`FFRDataset` asks it for the row at each position and `FFRReplayBuffer` tells it the rewards; both find it through
`activate` and `active_sampler`, since verl builds them apart from each other in one process.
"""

from __future__ import annotations

import itertools
import pickle
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ffr_verl.doors import parse_door
from ffr_verl.errors import FFRError
from ffr_verl.samplers.curriculum import STATIC_ORDERS, Order, RowDifficulty, ascending_order
from ffr_verl.samplers.difficulty import LEVELS
from ffr_verl.samplers.micro_estimate import MicroEstimate
from ffr_verl.samplers.online import OnlineOrder
from ffr_verl.samplers.own_orders import OwnOrder, own_order_class
from ffr_verl.settings import CurriculumConfig

ORDERS: Mapping[str, type[Order]] = {**STATIC_ORDERS, "online": OnlineOrder}


def order_class(name: str) -> type[Order]:
    """The class of an order, by its name or its door."""
    return ORDERS.get(name, OwnOrder)


def needs_difficulty(name: str) -> bool:
    """Whether an order is nothing without a difficulty file."""
    found = ORDERS[name] if name in ORDERS else own_order_class(name)
    return bool(getattr(found, "needs_difficulty", False))


class CurriculumSampler:
    """Gives the rows of a curriculum one after another, and can be stopped and resumed at any row.

    A torch `Sampler` as far as data loaders look (`__iter__`, `__len__`, `state_dict`, `load_state_dict`), without
    torch. `micro`, where the policy stands, is kept with the curriculum's state; `None` where nothing asks for it.

    Example:
        >>> rows = RowDifficulty(np.array([0.2, 1.0]), np.ones(2), np.array(["hard"] * 2), np.zeros(2, bool))
        >>> sampler = CurriculumSampler(rows, CurriculumConfig(order="ascending"))
        >>> next(iter(sampler)), sampler.state_dict()["position"], list(sampler)
        (1, 1, [0])
    """

    def __init__(self, rows: RowDifficulty, config: CurriculumConfig, *, micro: MicroEstimate | None = None) -> None:
        self.config = config
        self.micro = micro
        self.strata_names = rows.strata_names
        self._strata = None if rows.strata is None else np.asarray(rows.strata, dtype=np.int32)
        self._f1 = np.asarray(rows.f1, dtype=np.float32)
        self._levels = np.zeros(len(rows), dtype=np.uint8)
        for number, level in enumerate(LEVELS):
            self._levels[np.asarray(rows.levels) == level] = number
        self._ranks = np.empty(len(rows), dtype=np.int32)
        self._ranks[ascending_order(rows)] = np.arange(len(rows), dtype=np.int32)
        self._draws = np.zeros(len(rows), dtype=np.uint16)
        self._coverage = 0
        self._position = 0
        self._epoch = 0
        self._step_rows: list[int] = []
        self._order = order_class(config.order)(rows, config)
        label = parse_door(config.order, where=config.node).label  # a file may have moved
        self._fingerprint = zlib.crc32(f"{label} {config.seed}".encode(), zlib.crc32(self._order.fingerprint))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return len(self._order)

    def __iter__(self) -> Iterator[int]:
        """What is left of this epoch; a further call begins the next one."""
        if self._position >= len(self):
            self._epoch, self._position = self._epoch + 1, 0
        while self._position < len(self):
            yield self.row_at(self._position)

    def row_at(self, position: int) -> int:
        """The row at a position of the epoch; asked for in rising order, as a data loader does. Position 0 after
        another one begins the next epoch. With `online` every call draws again."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        if position == 0 and self._position:
            self._epoch += 1
        self._position = position + 1
        row = self._order.row_at(self._epoch, position)
        self._coverage += not self._draws[row]
        self._draws[row] = min(int(self._draws[row]) + 1, 65_535)
        self._step_rows.append(row)
        return row

    def stratum(self, row: int) -> str:
        return self.strata_names[0 if self._strata is None else int(self._strata[row])]

    def update(self, deviations: Mapping[int, float]) -> dict[str, float]:
        """End a training step: learn how far the answers to each row differed, and tell what was drawn for it.

        Args:
            deviations: standard deviation in the group of each row, of the metric `config.online.metric`; not read by
                static orders.

        Returns:
            `ffr/curriculum/…` of the rows drawn since the last call: `difficulty` (1 minus the f1 of the difficulty
            file, mean), `share/LEVEL`, `stratum/NAME` (shares), `coverage` (share of all rows drawn so far),
            `distance` (mean distance of the rows' ranks in the ascending order from the share of the epoch that is
            over; 0 for the ascending order, 1/3 by chance) and with `online` `spread`, the mean of what was expected
            of the rows (0.5 is typical).
        """
        rows = np.array(self._step_rows, dtype=np.int64)
        self._step_rows = []
        metrics: dict[str, float] = {}
        if len(rows):
            places = (self._position - len(rows) + np.arange(len(rows))) % max(1, len(self)) / max(1, len(self))
            metrics["ffr/curriculum/difficulty"] = float(1.0 - self._f1[rows].mean())
            metrics["ffr/curriculum/distance"] = float(np.abs(self._ranks[rows] / len(self._f1) - places).mean())
            for number, level in enumerate(LEVELS):
                metrics[f"ffr/curriculum/share/{level}"] = float((self._levels[rows] == number).mean())
            if self._strata is not None:
                for number, name in enumerate(self.strata_names):
                    metrics[f"ffr/curriculum/stratum/{name}"] = float((self._strata[rows] == number).mean())
        metrics["ffr/curriculum/coverage"] = self._coverage / max(1, len(self._f1))
        return metrics | self._order.observe(rows.tolist(), deviations)

    def state_dict(self) -> dict[str, Any]:
        """Where it is: epoch, position in it, how often each row came, a fingerprint; with `online` its state too."""
        return {
            "order": self._fingerprint,
            "epoch": self._epoch,
            "position": self._position,
            "draws": self._draws.copy(),
            "step_rows": list(self._step_rows),
            "online": self._order.state_dict(),
            "micro": None if self.micro is None else self.micro.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where a `state_dict` was taken; `FFRError` when it was taken of another order."""
        if not state and self.config.order == "file":
            return  # of a version that kept no state of this order
        if state.get("order") != self._fingerprint:
            raise FFRError(
                "the state of the curriculum belongs to another order: the difficulty file or data.ffr.curriculum "
                "has changed since the checkpoint; start from the beginning, or give what it was"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._draws = np.array(state["draws"], dtype=np.uint16)
        self._coverage = int((self._draws > 0).sum())
        self._step_rows = list(state["step_rows"])
        self._order.load_state_dict(state["online"])
        if self.micro is not None and state.get("micro") is not None:
            self.micro.load_state_dict(state["micro"])


def rehearse(rows: RowDifficulty, config: CurriculumConfig, *, step: int) -> int:
    """Draw the rows of two steps, stopping and resuming between them; how many rows an epoch has.

    Raises:
        FFRError: for what an order of one's own does wrong, a state that cannot be saved, and rows that differ from
            those of an order that was not stopped.
    """
    where = f"{config.node}.order={config.order}"
    sampler, resumed = CurriculumSampler(rows, config), CurriculumSampler(rows, config)
    length = len(sampler)
    if not length:
        raise FFRError(f"{where}: has no rows")
    step -= step > 1 and step % length == 0  # inside an epoch, where an order stands at no natural beginning
    first = list(itertools.islice(sampler, step))
    if len(sampler) != length:
        raise FFRError(f"{where}: __len__ gave {length}, then {len(sampler)}; an epoch has always as many rows")
    sampler.update({row: 0.1 * (place % 5) for place, row in enumerate(first)})
    try:
        state = pickle.loads(pickle.dumps(sampler.state_dict()))
    except Exception as error:  # pickle raises what the objects raise
        raise FFRError(f"{where}: its state_dict cannot be saved: {type(error).__name__}: {error}") from error
    resumed.load_state_dict(state)
    ours, theirs = (list(itertools.islice(one, step)) for one in (sampler, resumed))
    if ours != theirs:
        place = next(number for number, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])
        raise FFRError(
            f"{where}: does not resume: after {len(first)} rows it gives row {ours[place]} at place {place}, and "
            f"{theirs[place]} when its state was saved and loaded; state_dict must hold all that the next rows depend "
            "on, as a copy"
        )
    return length


_active: CurriculumSampler | None = None


def activate(sampler: CurriculumSampler | None) -> None:
    """Make a sampler the one of this process's training run; the newest counts."""
    global _active
    _active = sampler


def active_sampler() -> CurriculumSampler | None:
    """The sampler of this process's training run; `None` where the rows come in the order of the file."""
    return _active
