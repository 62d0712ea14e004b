"""Fields that nothing reads and that look like a part of the dialogue: pictures, words, queries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ffr_verl.data.checks.problems import clipped
from ffr_verl.errors import printable
from ffr_verl.images import PICTURE_ENDINGS

_WORD = re.compile("[A-Z]?[a-z]+|[A-Z]+")
_PICTURES = re.compile("image|img|picture|pic|photo|sticker|emoji|screenshot|video|media|attachment|file|url|path")
_WORDS = re.compile(
    "audio|voice|speech|text|content|caption|word|message|msg|utterance|turn|dialogue|dialog|conversation|history|query|"
    "querie|question"
)
# Words of a name that speaks of something beside the dialogue.
_BESIDE = re.compile("id|idx|index|hash|md5|sha|avatar|icon|type|kind|format|lang|language|source|license")
_PICTURE_FILE = re.compile(rf"data:image/.*|.*{PICTURE_ENDINGS}", re.IGNORECASE | re.DOTALL)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, Mapping):
        yield from _texts([one for name, one in value.items() if not _BESIDE.fullmatch(name)])
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def unread_fields(value: Mapping[str, Any], read: frozenset[str], said: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and message of each field that looks like content and is dropped.

    A name such as `shared_image` or `imageUrls` is enough, or a path of a picture in a field of another name. A field
    is not told when it is empty, or when all that it says is `said`, from word to word, in fields that are `read`.

    Example:
        >>> list(unread_fields({"speaker": "Ann", "photo": "cat.jpg", "lang": "en"}, frozenset({"speaker"}), ["Ann"]))
        [('photo', "is not read: 'cat.jpg'")]
    """
    for name in [name for name in value if name not in read]:
        words = {word.lower().removesuffix("s") for word in _WORD.findall(name)}
        if any(map(_BESIDE.fullmatch, words)):
            continue
        has_pictures, has_words = any(map(_PICTURES.fullmatch, words)), any(map(_WORDS.fullmatch, words))
        for text in filter(None, _texts(value[name])):
            is_picture = has_pictures or _PICTURE_FILE.fullmatch(text) is not None
            piece = "" if is_picture else rf"(?<!\w){re.escape(text)}(?!\w)"
            is_said = text in said or (piece and any(text in one and re.search(piece, one) for one in said))
            if (is_picture or has_words) and not is_said:
                yield printable(clipped(name)), f"is not read: {clipped(text)!r}"
                break
