"""The settings of the rewards, each checked in one place."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from ffr_verl.embeddings.store import StoreManifest
from ffr_verl.errors import FFRError
from ffr_verl.fragments import AnswerStyle

CoherenceMode = Literal["published", "continuous", "gold_anchored"]
# Takes where a value stands and the value; gives the value or raises FFRError.
Check = Callable[[str, Any], Any]


def check_number(where: str, value: Any, *, upper: float = math.inf, above: bool = False) -> float:
    """A finite number from 0 (above 0 with `above`) to `upper`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0.0 <= value <= upper and not math.isinf(value) and not (above and value == 0):
        return float(value)
    bounded = f"from 0 to {upper:g}" if math.isfinite(upper) else "above 0" if above else "of at least 0"
    raise FFRError(f"{where}: found {value!r}, expected a number {bounded}")


def choice(choices: Any) -> Check:
    """The check of a value that is one of a `Literal`'s."""

    def check(where: str, value: Any) -> Any:
        if not isinstance(value, str) or value not in get_args(choices):
            raise FFRError(f"{where}: found {value!r}, expected one of {', '.join(get_args(choices))}")
        return value

    return check


def check_store(where: str, value: Any) -> Any:
    """An open store, a mapping, or the folder of a store."""
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        try:
            StoreManifest.read(Path(value).expanduser())
        except FFRError as error:
            raise FFRError(f"{where}: {error}") from None
        return os.fspath(value)
    if value is None or not callable(getattr(value, "get", None)):
        raise FFRError(
            f"{where}: found {value!r}, expected the folder of an embedding store (made by `ffr-verl embed`), or an "
            "open store"
        )
    return value


SETTINGS: Mapping[str, Check] = {
    "utterance_weight": check_number,
    "image_weight": check_number,
    "beta": lambda where, value: check_number(where, value, above=True),
    "length_penalty": lambda where, value: check_number(where, value, upper=1.0),
    "style": choice(AnswerStyle),
    "mode": choice(CoherenceMode),
    "store": check_store,
}


def check_settings(where: str, **given: Any) -> None:
    """Raise `FFRError` for the first value that its setting does not take."""
    for name, value in given.items():
        SETTINGS[name](f"{where}.{name}", value)
