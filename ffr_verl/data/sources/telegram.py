"""Telegram Desktop's export as JSON (`result.json`): one chat, or all of them under `chats.list`.

Of a message `from`, `text` (a text, or a list of texts and `{"type", "text", "href"}`), `photo`, `file`, `media_type`
and the like are read; what is no text and no picture becomes a mark such as `[sticker 😏]`. Paths of pictures are
relative to the folder of the export.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ffr_verl.data.sources.chats import Message, cut_chat, quoted, seconds
from ffr_verl.data.sources.json_document import read_object
from ffr_verl.data.sources.source import Notes, Probe, ReadSettings, Source, take_left_out
from ffr_verl.errors import FFRError

_EXPECTED = "result.json of Telegram Desktop (Export chat history, format JSON)"
_NOT_INCLUDED = "(File "  # "(File not included. Change data exporting settings to download.)", "(File exceeds …)"
_KINDS = {
    "voice_message": "voice message",
    "video_message": "video message",
    "video_file": "video",
    "audio_file": "audio",
    "animation": "GIF",
}
# Of the fields whose names or values look like content, those that are read, or tell of the file beside it.
_READ = frozenset({"text", "text_entities", "photo", "photo_file_size", "file", "file_name", "file_size"}) | {
    "thumbnail", "thumbnail_file_size", "sticker_emoji", "media_spoiler", "contact_vcard", "contact_vcard_file_size",
    "via_bot",
}  # fmt: skip


def _words(value: Any) -> str:
    """A text, or pieces of one; the address of a link stands behind its words."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_words, value))
    if isinstance(value, Mapping):
        text, link = _words(value.get("text", "")), value.get("href")
        return f"{text} ({link})" if isinstance(link, str) and link != text else text
    return ""


def _media(message: Mapping[str, Any], notes: Notes) -> list[Any]:
    """Pictures and marks of a message."""
    made: list[Any] = []
    kind, mime = message.get("media_type"), str(message.get("mime_type", ""))
    for name in ("photo", "file"):
        file = message.get(name)
        if not isinstance(file, str) or not file or kind == "sticker":
            continue
        is_picture = name == "photo" or (mime.startswith("image/") and kind is None)
        if is_picture and not file.startswith(_NOT_INCLUDED):
            made.append({"image_url": file})
        elif is_picture:
            notes.leave("pictures that the export does not include, a mark stands for each")
            made.append("[picture]")
        else:
            length = message.get("duration_seconds")
            said = [message.get(one) for one in ("performer", "title", "file_name")] if kind != "voice_message" else []
            named = " - ".join([one for one in said if isinstance(one, str) and one])
            what = _KINDS.get(str(kind), "file")
            made.append(f"[{what}{f': {named}' if named else ''}{f', {length} s' if length else ''}]")
            notes.leave(f"{what}s, a mark stands for each")
    if kind == "sticker":
        made.append(f"[sticker {message.get('sticker_emoji') or ''}".rstrip() + "]")
        notes.leave("stickers, a mark stands for each")
    return made


def _marks(message: Mapping[str, Any]) -> Iterator[str]:
    """What else a message may be."""
    contact, place, poll = (message.get(one) for one in ("contact_information", "location_information", "poll"))
    if isinstance(contact, Mapping):
        yield f"[contact: {' '.join([str(one) for one in contact.values() if one])}]"
    if isinstance(place, Mapping):
        named = [message.get("place_name"), message.get("address"), place.get("latitude"), place.get("longitude")]
        yield f"[location: {', '.join([str(one) for one in named if one])}]"
    if isinstance(poll, Mapping):
        answers = [_words(one) for one in poll.get("answers") or ()] if isinstance(poll.get("answers"), list) else []
        yield f"[poll: {_words(poll.get('question'))} {' / '.join(answers)}]"
    if message.get("game_title"):
        yield f"[game: {message['game_title']} {message.get('game_description') or ''}".rstrip() + "]"


def _messages(chat: Mapping[str, Any], where: str) -> list[Message]:
    made: list[Message] = []
    earlier: dict[str, tuple[str, str]] = {}  # speaker and words of a message, for those that answer it
    notes = Notes()
    for number, message in enumerate(chat["messages"]):
        if not isinstance(message, Mapping):
            raise FFRError(f"{where}: messages[{number}]: found {message!r:.80}, expected an object; give {_EXPECTED}")
        if message.get("type") == "service":
            notes.leave("service messages")
            continue
        speaker = str(message.get("from") or message.get("from_id") or "deleted account")
        words = _words(message.get("text", ""))
        content: list[Any] = []
        if message.get("forwarded_from"):
            content.append(f"[forwarded from {message['forwarded_from']}]")
        if message.get("reply_to_message_id") is not None:
            who, what = earlier.get(str(message["reply_to_message_id"]), ("", ""))
            content.append(f"[reply to {who}: {quoted(what)}]" if who else "[reply]")
        content += [words] if words else []
        content += _media(message, notes)
        content += _marks(message)
        notes.leave("reactions", message.get("reactions"))
        notes.leave("messages with buttons of a bot", "inline_bot_buttons" in message)
        notes.unread(message, _READ, [words])
        said = next(
            (one for one in content[::-1] if isinstance(one, str) and not one.startswith("[reply")), "[picture]"
        )
        earlier[str(message.get("id"))] = speaker, words or said
        date = str(message.get("date", ""))
        time = seconds(date)
        made.append(
            Message(
                speaker,
                content or [f"[{message.get('type') or 'unknown'} message]"],
                None if time is None else (time, date.replace("T", " ")[:16]),
                notes.left_out,
            )
        )
        notes = Notes()
    if made:
        made[-1].left_out.update(notes.left_out)
    return made


def _records(
    path: Path, settings: ReadSettings, on_position: Callable[[int], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    file = path / "result.json" if path.is_dir() else path
    found = read_object(file, expected=_EXPECTED)
    chats: list[Any] = [found] if "messages" in found else []
    for name in () if chats else ("chats", "left_chats"):
        listed = found.get(name)
        found_list = listed.get("list") if isinstance(listed, Mapping) else None
        chats += found_list if isinstance(found_list, list) else []
    named: Counter[str] = Counter()
    number = 0
    for chat in chats:
        if not isinstance(chat, Mapping) or not isinstance(chat.get("messages"), list):
            raise FFRError(f"{file}: a chat without a list of messages; give {_EXPECTED}")
        name = str(chat.get("name") or f"chat {chat.get('id', '')}".rstrip())
        named[name] += 1
        name = name if named[name] == 1 else f"{name} ({chat.get('id', named[name])})"
        for row in cut_chat(name, _messages(chat, f"{file}: chat {name}"), settings):
            yield number, row
            number += 1
    if not number:
        raise FFRError(f"{file}: no messages in it; give {_EXPECTED}")
    on_position(file.stat().st_size)


def _fits(probe: Probe) -> bool:
    if probe.path.is_dir():
        return (probe.path / "result.json").is_file()
    if {"about", "personal_information"} <= probe.keys:  # all that there is; contacts may fill its start
        return True
    return "messages" in probe.keys and not {"from_id", "actor_id", "text_entities", "date_unixtime"}.isdisjoint(
        probe.keys
    )


TELEGRAM = Source(
    about="Telegram Desktop: result.json, or its folder",
    example='{"name": "Ann", "type": "personal_chat", "id": 1, "messages": [{"id": 1, "type": "message", "date": '
    '"2024-05-01T10:30:00", "from": "Ann", "from_id": "user1", "text": "look", "photo": "photos/photo_1.jpg"}]}',
    records=_records,
    dialogue=take_left_out,
    fits=_fits,
    leaves="service messages, reactions, buttons; sounds, videos, stickers and files but for a mark",
)
