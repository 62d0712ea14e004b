"""A map of 64-bit numbers that takes 16 bytes an entry, for what has to be remembered of millions of rows."""

from __future__ import annotations

import numpy as np

__all__ = ["CompactMap"]

_RECENT = 8_192


class CompactMap:
    """Signed 64-bit keys and values: new entries in a `dict`, the others in two sorted arrays; a `dict` takes some 200
    bytes for the same.

    Example:
        >>> seen = CompactMap()
        >>> seen.setdefault(7, 1), seen.setdefault(7, 2), len(seen)
        (1, 1, 1)
    """

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._keys = np.empty(0, dtype=np.int64)
        self._values = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._recent) + len(self._keys)

    def get(self, key: int) -> int | None:
        """The value of a key, or `None`."""
        found = self._recent.get(key)
        if found is not None or not len(self._keys):
            return found
        place = int(self._keys.searchsorted(key))
        return int(self._values[place]) if place < len(self._keys) and self._keys[place] == key else None

    def setdefault(self, key: int, value: int) -> int:
        """The value of a key, which is set to `value` where it is new."""
        found = self.get(key)
        if found is not None:
            return found
        self._recent[key] = value
        if len(self._recent) > _RECENT:
            self._settle()
        return value

    def _settle(self) -> None:
        keys = np.fromiter(self._recent, dtype=np.int64, count=len(self._recent))
        order = keys.argsort()
        values = np.fromiter(self._recent.values(), dtype=np.int64, count=len(keys))
        places = self._keys.searchsorted(keys[order])
        self._keys = np.insert(self._keys, places, keys[order])
        self._values = np.insert(self._values, places, values[order])
        self._recent.clear()
