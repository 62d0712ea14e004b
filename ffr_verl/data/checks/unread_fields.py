"""Fields that nothing reads and that look like a part of the dialogue: pictures, words, queries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ffr_verl.data.checks.problems import clipped
from ffr_verl.errors import printable

__all__ = ["unread_fields"]

_WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+")
_CONTENT = re.compile(
    "image|img|picture|pic|photo|sticker|emoji|screenshot|video|audio|voice|speech|media|attachment|file|url|path|text|"
    "content|caption|word|message|msg|utterance|turn|dialogue|dialog|conversation|history|query|querie|question"
)
# Words of a name that speaks of something beside the dialogue.
_BESIDE = re.compile("id|idx|index|hash|md5|sha|avatar|icon|type|kind|format|lang|language|source|license")
_PICTURE = re.compile(r"data:image/|.*\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|avif)", re.IGNORECASE | re.DOTALL)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, (list, Mapping)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)


def unread_fields(value: Mapping[str, Any], read: frozenset[str], said: str) -> Iterator[tuple[str, str]]:
    """Name and message of each field that looks like content and is dropped.

    A name such as `shared_image` or `imageUrls` is enough, or a path of a picture in a field of another name. A field
    is not told when it is empty, or when all that it says is said elsewhere.

    Args:
        value: a row, a turn or another object of the source.
        read: the fields of it that are read.
        said: all texts and paths that are read.

    Example:
        >>> list(unread_fields({"utterance": "hi", "photo": "cat.jpg", "lang": "en"}, frozenset({"utterance"}), "hi"))
        [('photo', "is not read: 'cat.jpg'")]
    """
    for name in value.keys() - read:
        words = {word.lower().removesuffix("s") for word in _WORD.findall(name)}
        lost = [text for text in _texts(value[name]) if text and text not in said]
        is_content = any(map(_CONTENT.fullmatch, words)) or any(map(_PICTURE.fullmatch, lost))
        if lost and is_content and not any(map(_BESIDE.fullmatch, words)):
            yield printable(clipped(name)), f"is not read: {clipped(lost[0])!r}"
