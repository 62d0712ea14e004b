"""Slack's export as JSON: a folder with `users.json` and a folder for each channel, a file `YYYY-MM-DD.json` a day.

Of a message `user` or `username`, `text`, `files` and `attachments` are read. Files are named by addresses, which are
not fetched: `--image-map` names local ones by `url_private`, `id` or `name`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ffr_verl.data.sources.chats import Message, cut_chat, quoted
from ffr_verl.data.sources.json_rows import read_value
from ffr_verl.data.sources.source import Notes, Probe, ReadSettings, Source, take_left_out
from ffr_verl.errors import FFRError

_EXPECTED = "the unpacked folder of a Slack export (users.json, a folder for each channel)"
_LINK = re.compile(r"<([^<>|]+)(?:\|([^<>]*))?>")
_LAST_SECOND = 1e11
_DAY = re.compile(r"\d{4}-\d\d-\d\d\.json")
_KEPT = ("None", "bot_message", "me_message", "file_share", "file_comment", "thread_broadcast")
# Of the fields whose names or values look like content, those that are read, or say again what is.
_READ = frozenset({"text", "files", "attachments", "blocks", "file", "user_profile", "bot_profile", "icons"})
_ATTACHED = ("pretext", "author_name", "title", "text", "fallback", "from_url", "title_link")


def _users(folder: Path) -> dict[str, str]:
    file = folder / "users.json"
    if not file.is_file():
        return {}
    names = {}
    for user in _list(file):
        profile = _object(user.get("profile"))
        known = (profile.get("display_name"), profile.get("real_name"), user.get("real_name"), user.get("name"))
        names[str(user.get("id"))] = next((str(name) for name in known if name), str(user.get("id")))
    return names


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _second(value: Any) -> float:
    time = float(value)
    if not 0 <= time < _LAST_SECOND:
        raise ValueError
    return time


def _objects(value: Any) -> list[Mapping[str, Any]]:
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def _list(file: Path) -> list[Mapping[str, Any]]:
    found = read_value(file, mend=_EXPECTED)
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise FFRError(f"{file}: expected a list of objects; give {_EXPECTED}")
    return found


def _text(text: str, users: Mapping[str, str]) -> str:
    """A text without Slack's marks."""

    def plain(found: re.Match[str]) -> str:
        target, label = found.groups()
        if target.startswith("@"):
            return f"@{users.get(target[1:], label or target[1:])}"
        if target.startswith(("#", "!")):
            return ("#" if target.startswith("#") else "@") + (label or target[1:])
        return target if not label or label == target else f"{label} ({target})"

    return html.unescape(_LINK.sub(plain, text))


def _of_blocks(value: Any) -> Iterator[str]:
    """The words of a message of an app, which may stand in its blocks alone."""
    if isinstance(value, list):
        for one in value:
            yield from _of_blocks(one)
    elif isinstance(value, Mapping):
        words = [value.get(name) for name in ("text", "url", "alt_text")]
        text = next((one for one in words if isinstance(one, str) and one.strip()), None)
        if text is not None:
            yield text.strip()
        else:
            yield from _of_blocks([one for one in value.values() if isinstance(one, (list, Mapping))])


def _files(message: Mapping[str, Any], settings: ReadSettings, notes: Notes) -> Iterator[Any]:
    for file in _objects(message.get("files")):
        named = file.get("title") or file.get("name") or ""
        if str(file.get("mimetype", "")).startswith("image/"):
            names = [file.get(one) for one in ("url_private", "url_private_download", "id", "name")]
            yield notes.picture(names, named, settings)
        else:
            notes.leave("files, a mark stands for each")
            yield f"[file: {named}]" if named else "[file]"
    for attached in _objects(message.get("attachments")):
        parts = dict.fromkeys([str(attached[one]) for one in _ATTACHED if attached.get(one)])
        if attached.get("image_url"):
            yield notes.picture((attached["image_url"],), attached.get("title") or "", settings)
        if parts:
            yield f"[attached: {' | '.join(parts)}]"


def _messages(folder: Path, users: Mapping[str, str], settings: ReadSettings) -> list[Message]:
    made: list[Message] = []
    first: dict[str, tuple[str, str]] = {}  # speaker and words that start a thread
    notes = Notes()
    found = [one for file in sorted(folder.iterdir()) if _DAY.fullmatch(file.name) for one in _list(file)]
    try:
        timed = sorted([(_second(one["ts"]), number, one) for number, one in enumerate(found)])
    except (KeyError, TypeError, ValueError):
        raise FFRError(f"{folder}: a message without its time ts; give {_EXPECTED}") from None
    for time, _, message in timed:
        if str(message.get("subtype")) not in _KEPT:
            notes.leave("service messages")
            continue
        profile = _object(message.get("user_profile"))
        user = message.get("user")
        known = (users.get(str(user)), message.get("username"), profile.get("display_name"), profile.get("real_name"))
        speaker = next((str(name) for name in known if name), str(user or message.get("bot_id") or "unknown"))
        words = _text(str(message.get("text") or ""), users)
        words = words or _text(" ".join(_of_blocks(message.get("blocks"))), users)
        content: list[Any] = []
        thread, own = str(message.get("thread_ts")), str(message["ts"])
        if thread in first and thread != own:
            content.append(f"[reply to {first[thread][0]}: {quoted(first[thread][1])}]")
        content += [words] if words else []
        content += _files(message, settings, notes)
        first[own] = speaker, words or "[picture]"
        notes.leave("reactions", message.get("reactions"))
        notes.unread(message, _READ, [words])
        day = datetime.fromtimestamp(time, timezone.utc).strftime("%Y-%m-%d %H:%M")
        made.append(Message(speaker, content or ["[empty message]"], (time, day), notes.left_out))
        notes = Notes()
    if made:
        made[-1].left_out.update(notes.left_out)
    return made


def _channels(folder: Path) -> list[Path]:
    return sorted([one for one in folder.iterdir() if one.is_dir() and any(map(_DAY.fullmatch, _names(one)))])


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def _records(
    path: Path, settings: ReadSettings, on_position: Callable[[int], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_dir():
        what = "no such folder" if not path.exists() else "no folder; unpack the zip file first"
        raise FFRError(f"{path}: {what}; give {_EXPECTED}")
    users, number = _users(path), 0
    for channel in _channels(path):
        for row in cut_chat(channel.name, _messages(channel, users, settings), settings):
            yield number, row
            number += 1
    if not number:
        raise FFRError(f"{path}: no messages in it; give {_EXPECTED}")


def _fits(probe: Probe) -> bool:
    return probe.path.is_dir() and ((probe.path / "users.json").is_file() or bool(_channels(probe.path)))


SLACK = Source(
    about="Slack: the unpacked folder of an export",
    example='general/2024-05-01.json: [{"type": "message", "user": "U1", "text": "look", "ts": "1714559400.0001", '
    '"files": [{"id": "F1", "name": "dog.png", "mimetype": "image/png", "url_private": "https://…"}]}]; users.json: '
    '[{"id": "U1", "name": "ann", "real_name": "Ann"}]',
    records=_records,
    dialogue=take_left_out,
    fits=_fits,
    leaves="pictures without a file in --image-map, service messages, reactions; files but for a mark",
)
