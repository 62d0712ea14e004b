"""Exports of chats: one long conversation each, which is cut into raw dialogues where nobody wrote for long."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ffr_verl.data.sources.source import ReadSettings
from ffr_verl.dialogues import reserved_token

_QUOTED = 60  # characters of a message that another one quotes
_SURROGATES = dict.fromkeys(range(0xD800, 0xE000), "\ufffd") | {0: ""}


@dataclass(slots=True)
class Message:
    """A message of a chat.

    Attributes:
        speaker: who wrote it.
        content: texts and pictures, as a raw dialogue has them.
        time: seconds since 1970, to find the gaps, and the time for a person to read; `None` where it is not known.
        left_out: what of it, and of messages before it that are left out as a whole, no row holds.
    """

    speaker: str
    content: list[Any]
    time: tuple[float, str] | None
    left_out: Counter[str]


def writable(text: str) -> str:
    """A text that a prompt can hold: pieces with a meaning there get a blank, what no file can hold is taken out.

    Example:
        >>> writable("put <image> there\\0")
        'put < image> there'
    """
    text = text.translate(_SURROGATES)
    while (found := reserved_token(text)) is not None:
        text = text.replace(found, f"{found[0]} {found[1:]}")
    return text


def quoted(text: str) -> str:
    """The start of a message, on one line, for one that answers it.

    Example:
        >>> quoted("shall we\\ngo?")
        '"shall we go?"'
    """
    line = " ".join(text.split())
    return f'"{line}"' if len(line) <= _QUOTED else f'"{line[:_QUOTED]}…"'


def seconds(text: str) -> float | None:
    """Seconds since 1970 of a time as ISO 8601 has it; one without a time zone is taken for UTC: only gaps matter.

    Example:
        >>> seconds("2024-05-01 10:30:00"), seconds("soon")
        (1714559400.0, None)
    """
    try:
        time = datetime.fromisoformat(text.strip().replace("Z", "+00:00").replace("/", "-"))
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()


def cut_chat(name: str, messages: Sequence[Message], settings: ReadSettings) -> Iterator[dict[str, Any]]:
    """The raw dialogues of a chat, in order: `NAME` when it is not cut, else `NAME` and the time of the first message.

    Example:
        >>> messages = [Message("Ann", ["hi"], (0.0, "1 May"), Counter()), Message("Ben", ["yes?"], None, Counter())]
        >>> [(row["dialogue_id"], len(row["dialogue"])) for row in cut_chat("us", messages, ReadSettings())]
        [('us', 2)]
    """
    pieces: list[list[Message]] = []
    last: float | None = None
    for message in messages:
        time = None if message.time is None else message.time[0]
        is_late = time is not None and last is not None and time - last >= settings.gap_hours * 3600
        if not pieces or (settings.gap_hours and is_late):
            pieces.append([])
        pieces[-1].append(message)
        last = last if time is None else time
    used: Counter[str] = Counter()
    for piece in pieces:
        first = piece[0].time
        made = name if len(pieces) == 1 else f"{name} {first[1] if first else len(used)}"
        used[made] += 1
        left_out: Counter[str] = Counter()
        turns = []
        for number, message in enumerate(piece):
            content = [writable(one) if isinstance(one, str) else one for one in message.content]
            if any(isinstance(one, str) and one not in message.content for one in content):
                left_out["texts with a piece that has a meaning in a prompt, which got a blank"] += 1
            left_out.update(message.left_out)
            words = content[0] if len(content) == 1 and isinstance(content[0], str) else content
            turns.append({"utterance_idx": number, "speaker": writable(message.speaker), "utterance": words})
        identifier = made if used[made] == 1 else f"{made} ({used[made]})"
        yield {"dialogue_id": identifier, "dialogue": turns, "left_out": dict(left_out)}
