"""Names of speakers as a prompt can hold them: a name there ends at the first `": "`."""

from __future__ import annotations

import re

_END_OF_NAME = re.compile(r":\s+|：\s*")


class SpeakerNames:
    """The speakers of one dialogue, each with a name of its own.

    Example:
        >>> names = SpeakerNames()
        >>> names.written("Ann: work"), names.written("Ann:work"), names.written("Ben")
        ('Ann:work', 'Ann:work (2)', 'Ben')
        >>> names.changed
        {'Ann: work': 'Ann:work', 'Ann:work': 'Ann:work (2)'}
    """

    def __init__(self) -> None:
        self._written: dict[str, str] = {}
        self._taken: set[str] = set()

    def written(self, name: str) -> str:
        """The name as it stands in a prompt."""
        if name not in self._written:
            plain = made = " ".join(_END_OF_NAME.sub(":", name).split()) if _is_odd(name) else name
            number = 1
            while made in self._taken:
                number += 1
                made = f"{plain} ({number})"
            self._written[name] = made
            self._taken.add(made)
        return self._written[name]

    @property
    def changed(self) -> dict[str, str]:
        """The names that are written in another way."""
        return {name: made for name, made in self._written.items() if name != made}


def _is_odd(name: str) -> bool:
    return ": " in name or "：" in name or "\n" in name or "\r" in name
