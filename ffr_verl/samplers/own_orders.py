"""Orders of one's own: found by their door, and asked so that what goes wrong in them names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ffr_verl.doors import blamed, load_door, parse_door
from ffr_verl.errors import FFRError
from ffr_verl.samplers.curriculum import Order, RowDifficulty
from ffr_verl.settings import ORDER_ENTRY_POINTS, ORDER_NAMES, CurriculumConfig

_KEY = f"{CurriculumConfig.node}.order"
_METHODS = ("__len__", "row_at", "observe", "state_dict", "load_state_dict")
_T = TypeVar("_T")


def own_order_class(name: str) -> type[Any]:
    """The class that a door names.

    Raises:
        FFRError: when it cannot be loaded, is no class, or lacks a method of `Order`.
    """
    found = load_door(parse_door(name, where=_KEY), where=_KEY, group=ORDER_ENTRY_POINTS, known=ORDER_NAMES)
    if not isinstance(found, type):
        raise FFRError(
            f"{_KEY}: {name} is of type {type(found).__name__}, expected a class, see ffr_verl.samplers.Order"
        )
    if lacking := [method for method in _METHODS if not callable(getattr(found, method, None))]:
        raise FFRError(f"{_KEY}: {name} has no {', '.join(lacking)}; a subclass of ffr_verl.samplers.Order has them")
    return found


class OwnOrder(Order):
    """An order of one's own. `FFRError`, which names it, for whatever it raises and for a row that is not there."""

    def __init__(self, rows: RowDifficulty, config: CurriculumConfig) -> None:
        super().__init__(rows, config)
        self._name = config.order
        self._order: Any = self._ask("its constructor", own_order_class(config.order), rows, config)
        settings = repr(sorted(config.settings.items()))
        own = self._ask("its fingerprint", lambda: bytes(getattr(self._order, "fingerprint", b"")))
        self.fingerprint = f"{len(rows)} {settings}".encode() + own

    def _ask(self, what: str, function: Callable[..., _T], *arguments: Any) -> _T:
        try:
            return function(*arguments)
        except FFRError as error:
            raise self._error(str(error)) from error
        except (Exception, SystemExit) as error:  # a class of others may raise anything
            raise self._error(f"{what} raised {blamed(error)}") from error

    def _error(self, text: str) -> FFRError:
        return FFRError(f"{_KEY}={self._name}: {text}")

    def __len__(self) -> int:
        return self._ask("__len__", len, self._order)

    def row_at(self, epoch: int, position: int) -> int:
        row = self._ask("row_at", self._order.row_at, epoch, position)
        is_number = isinstance(row, (int, np.integer)) and not isinstance(row, bool)
        if not is_number or not 0 <= row < self._count:
            raise self._error(
                f"row_at({epoch}, {position}) gave {row!r:.60}; expected the number of a row, 0 to {self._count - 1}"
            )
        return int(row)

    def observe(self, rows: Sequence[int], deviations: Mapping[int, float]) -> dict[str, float]:
        found = self._ask("observe", self._order.observe, rows, deviations)
        try:
            return {str(name): float(value) for name, value in (found or {}).items()}
        except (AttributeError, TypeError, ValueError):
            raise self._error(f"observe gave {found!r:.60}; expected metrics, such as {{name: number}}") from None

    def state_dict(self) -> Any:
        return self._ask("state_dict", self._order.state_dict)

    def load_state_dict(self, state: Any) -> None:
        self._ask("load_state_dict", self._order.load_state_dict, state)
