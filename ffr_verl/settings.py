"""A misspelled key is an error, not a setting that is silently ignored."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ffr_verl.errors import FFRError

__all__ = ["refuse_unknown_keys"]


def refuse_unknown_keys(keys: Iterable[object], *, allowed: Iterable[str], where: str) -> None:
    """Raise `FFRError` for the first of `keys` that is not `allowed`, with the nearest allowed one.

    Example:
        >>> refuse_unknown_keys(["max_pixel"], allowed=["max_pixels"], where="data")
        Traceback (most recent call last):
            ...
        ffr_verl.errors.FFRError: data.max_pixel: unknown key; did you mean 'max_pixels'? Allowed: max_pixels
    """
    known = sorted(allowed)
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise FFRError(f"{where}.{key}: unknown key; {hint}Allowed: {', '.join(known)}")
