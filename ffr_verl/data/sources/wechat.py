"""WeChat exports, in the shapes that common tools write: CSV files (MemoTrace/WeChatMsg, WeFlow/PyWxDump, chatlog)
and texts with a line of time and name above each message.

CSV columns are found by name, see `_COLUMNS`. Stickers, voices, videos, links, quoted and revoked messages become
marks, in the words that the tools use: `[语音]`, `[动画表情]`, `[链接] …`, `[引用 …]`. A picture that is a file of
its own (a path with a picture's ending) is one; others are the mark `[图片]`.
"""

from __future__ import annotations

import contextlib
import csv
import html
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ffr_verl.data.sources.chats import Message, cut_chat, seconds
from ffr_verl.data.sources.source import Notes, Probe, ReadSettings, Source, take_left_out
from ffr_verl.errors import FFRError
from ffr_verl.files import disk_errors, refuse_special
from ffr_verl.images import PICTURE_ENDINGS

_EXPECTED = "a WeChat export as CSV or text (docs/data.md)"
# What a column is for: its names, in the tools' files.
_COLUMNS = {
    "content": ("StrContent", "内容", "msg", "Content", "content", "消息内容"),
    "time": ("StrTime", "时间", "CreateTime", "Time", "time"),
    "kind": ("Type", "类型", "type_name", "type"),
    "subkind": ("SubType",),
    "is_own": ("IsSender", "is_sender"),
    "speaker": ("发送人", "SenderName", "Remark", "NickName", "昵称", "talker", "Sender"),
    "chat": ("TalkerName", "Talker", "TalkerId", "room_name"),
    "file": ("src",),
}
# Columns that are read, or say nothing more.
_KNOWN = frozenset({"CompressContent", "DisplayContent", "BytesExtra", "消息ID", "备注", "更多信息"}) | {
    name for names in _COLUMNS.values() for name in names
}
_HEADERS = (
    {"StrContent", "StrTime"},
    {"类型", "时间", "内容"},
    {"type_name", "is_sender"},
    {"Time", "SenderName", "Content"},
)
_OWN = "我"
_KINDS = {
    "3": "图片", "图片": "图片", "image": "图片",
    "34": "语音", "语音": "语音", "voice": "语音", "语音消息": "语音",
    "43": "视频", "62": "视频", "视频": "视频", "video": "视频",
    "47": "动画表情", "表情包": "动画表情", "动画表情": "动画表情", "表情": "动画表情", "sticker": "动画表情",
    "48": "位置", "位置": "位置", "位置分享": "位置", "42": "名片", "名片": "名片", "50": "通话", "音视频通话": "通话",
    "49": "链接", "链接": "链接", "分享链接": "链接", "卡片式链接": "链接", "小程序": "小程序", "文件": "文件",
    "转账": "转账", "红包": "红包", "引用": "引用", "引用回复": "引用", "引用消息": "引用",
    "合并转发的聊天记录": "聊天记录", "聊天记录": "聊天记录",
    "10000": "系统", "系统消息": "系统", "系统通知": "系统", "system": "系统", "拍一拍": "系统",
}  # fmt: skip
_SUBKINDS = {
    "6": "文件",
    "19": "聊天记录",
    "33": "小程序",
    "36": "小程序",
    "57": "引用",
    "2000": "转账",
    "2001": "红包",
}
_LEFT = {
    "图片": "pictures without a file, a mark stands for each",
    "语音": "voice messages, a mark stands for each",
    "视频": "videos, a mark stands for each",
    "动画表情": "stickers, a mark stands for each",
    "表情包": "stickers, a mark stands for each",
    "文件": "files, a mark stands for each",
}
_PICTURE_FILE = re.compile(rf"[^\n<>:\"|?*]+{PICTURE_ENDINGS}", re.IGNORECASE)
_SHOWN = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")  # chatlog writes pictures as Markdown does
_MARK = re.compile(r"\[(图片|语音|视频|动画表情|表情包|文件)[\]:：, ]")
_XML = ("<?xml", "<msg", "<sysmsg", "<voipmsg", "<appmsg")
_REVOKED = re.compile(r"撤回了一条消息|recalled a message")
_TIME = r"(\d{4}[-/]\d{1,2}[-/]\d{1,2}[ T]\d{1,2}:\d\d(?::\d\d)?)"
_HEADS = (
    re.compile(rf"\[{_TIME}\]\s*(?P<name>\S.*)"),
    re.compile(rf"{_TIME}\s+(?P<name>\S.*)"),
    re.compile(rf"(?P<name>\S.*?)\s*[\s(（]{_TIME}[)）]?\s*"),
)


def _tag(text: str, name: str) -> str:
    """What stands in an element of WeChat's XML."""
    found = re.search(rf"<{name}>(?:<!\[CDATA\[)?(.*?)(?:\]\]>)?</{name}>", text, re.DOTALL)
    return " ".join(html.unescape(found.group(1)).split()) if found else ""


def _content(kind: str, text: str, file: str, settings: ReadSettings, notes: Notes) -> list[Any]:
    """Words, marks and picture of a message."""
    if kind == "图片":
        known = settings.image_files
        name = next((one for one in (file, text) if one in known or _PICTURE_FILE.fullmatch(one)), None)
        if name is not None:
            return [{"image_url": known.get(name, name.replace("\\", "/"))}]
    said = text
    if text.startswith(_XML):
        said = _tag(text, "title") or _tag(text, "label")
        if "<refermsg>" in text:
            what = _tag(text, "content")
            return [said, f"[引用 {_tag(text, 'displayname')}：{'' if what.startswith('<') else what}]"]
    elif kind in ("", "引用"):
        return list(_pieces(text, settings, notes))
    if kind in _LEFT:
        notes.leave(_LEFT[kind])
    return [said if said.startswith(f"[{kind or '消息'}") else f"[{kind or '消息'}] {said}".rstrip()]


def _pieces(text: str, settings: ReadSettings, notes: Notes) -> Iterator[Any]:
    """A text with pictures in it, and the marks of what the tool left out."""
    end = 0
    for found in _SHOWN.finditer(text):
        yield text[end : found.start()].strip()
        end, target = found.end(), found[2]
        if target in settings.image_files or _PICTURE_FILE.fullmatch(target):
            yield {"image_url": settings.image_files.get(target, target)}
        else:
            notes.leave(_LEFT["图片"])
            yield "[图片]"
    rest = text[end:].strip()
    for mark in _MARK.findall(rest):
        notes.leave(_LEFT[mark])
    yield rest


def _message(
    kind: str, speaker: str, text: str, file: str, time: tuple[float, str] | None, settings: ReadSettings, notes: Notes
) -> Message | None:
    """A message; `None` for a note of the system, but not for one that tells of a revoked message."""
    if kind == "系统":
        if not _REVOKED.search(text):
            notes.leave("service messages")
            return None
        return Message(speaker, [f"[{' '.join(re.sub('<[^>]*>', ' ', text).split())}]"], time, Counter())
    content = [one for one in _content(kind, text, file, settings, notes) if one]
    return Message(speaker, content or ["[空消息]"], time, Counter())


def _time(text: str) -> tuple[float, str] | None:
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) <= 13:
        number = int(text) / (1000 if len(text) > 11 else 1)
        if number > 1e10:
            return None
        return number, datetime.fromtimestamp(number, timezone.utc).strftime("%Y-%m-%d %H:%M")
    found = re.match(r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})[ T](\d{1,2}):(.*)", text)
    if found is None:
        return None
    year, month, day, hour, rest = found.groups()
    whole = f"{year}-{int(month):02}-{int(day):02} {int(hour):02}:{rest}"
    at = seconds(re.sub(r"\.\d+", "", whole))
    return None if at is None else (at, whole[:16])


def _of_csv(path: Path, text: str, settings: ReadSettings) -> Iterator[tuple[str, Message]]:
    """Chat and message of each line."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    lines = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = [name.strip() for name in lines.fieldnames or ()]
    except csv.Error as error:
        raise FFRError(f"{path}: line 1: {error}; the file seems cut off, copy it again") from None
    if not any(header <= set(names) for header in _HEADERS):
        raise FFRError(f"{path}: the columns {', '.join(names)[:200]} are of no known tool; give {_EXPECTED}")
    lines.fieldnames = names
    notes = Notes()
    last: Message | None = None
    chat = path.stem
    try:
        for line in lines:
            number = lines.line_num
            if line.get(names[-1]) is None:
                raise FFRError(
                    f"{path}: line {number}: fewer fields than columns; the file seems cut off, copy it again"
                )

            def of(what: str, line: Mapping[str, str] = line) -> str:
                return next((str(line[name]).strip() for name in _COLUMNS[what] if line.get(name)), "")

            kind = _KINDS.get(of("kind"), of("kind") if not of("kind").isdigit() else "")
            kind = "" if kind in ("文本", "文字", "text") else kind
            kind = _SUBKINDS.get(of("subkind"), kind) if of("kind") == "49" else kind
            words = of("content")
            if words.startswith('{"') and '"msg"' in words:  # older files of PyWxDump
                with contextlib.suppress(ValueError):
                    words = str(json.loads(words).get("msg", ""))
            speaker = _OWN if of("is_own") in ("1", "True", "true") else of("speaker") or "对方"
            notes.unread({name: value for name, value in line.items() if name}, _KNOWN, [words])
            chat = of("chat") or path.stem
            made = _message(kind, speaker, words, of("file"), _time(of("time")), settings, notes)
            if made is not None:
                made.left_out, last, notes = notes.left_out, made, Notes()
                yield chat, made
    except csv.Error as error:
        raise FFRError(f"{path}: line {lines.line_num}: {error}; the file seems cut off, copy it again") from None
    if not text.endswith("\n"):  # which the tools write behind the last line, too
        notes.leave("what came after, if the file was cut off: its last line has no end")
    if last is not None:
        last.left_out.update(notes.left_out)


def _head(line: str, patterns: Sequence[re.Pattern[str]] = _HEADS) -> tuple[str, str, re.Pattern[str]] | None:
    """Time and name of a line above a message, and the pattern that it fits."""
    for pattern in patterns:
        found = pattern.fullmatch(line.strip())
        if found is not None:
            time = next(text for text in found.groups() if text and re.fullmatch(_TIME, text))
            return time, found["name"].strip(), pattern
    return None


def _of_text(path: Path, text: str, settings: ReadSettings) -> Iterator[tuple[str, Message]]:
    blocks: list[tuple[str, str, list[str]]] = []
    patterns: Sequence[re.Pattern[str]] = _HEADS
    for line in text.splitlines():
        head = _head(line, patterns)
        if head is not None:
            blocks.append((head[0], head[1], []))
            patterns = (head[2],)  # a file has lines of one kind; others that look like one are in a message
        elif blocks:
            blocks[-1][2].append(line.rstrip())
    if not blocks:
        raise FFRError(f"{path}: no line with the time and name of a message in it; give {_EXPECTED}")
    is_inline = patterns[0] is _HEADS[0] or not any("".join(lines) for _, _, lines in blocks)
    last: Message | None = None
    notes = Notes()
    for time, name, lines in blocks:
        words = "\n".join(lines).strip()
        if is_inline:
            parts = re.split(r": |：|:$", name, maxsplit=1)
            name, first = parts[0], parts[1] if len(parts) > 1 else ""
            words = f"{first}\n{words}".strip()
        is_system = name in ("系统消息", "系统") or not words or bool(_REVOKED.search(words) and len(words) < 80)
        kind = "系统" if is_system else ""
        made = _message(kind, name.strip("'\""), words, "", _time(time), settings, notes)
        if made is not None:
            made.left_out, last, notes = notes.left_out, made, Notes()
            yield path.stem, made
    if last is not None:
        last.left_out.update(notes.left_out)


def _records(
    path: Path, settings: ReadSettings, on_position: Callable[[int], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.is_dir():
        raise FFRError(f"{path}: is a folder; give {_EXPECTED}")
    refuse_special(path)
    with disk_errors(path, f"give {_EXPECTED}"):
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        mend = f"convert it, for example: iconv -f GB18030 -t UTF-8 {path.name} > new{path.suffix}"
        if error.reason == "unexpected end of data":
            mend = "the file seems cut off, copy it again"
        raise FFRError(f"{path}: not UTF-8 at byte {error.start}; {mend}") from None
    first = text.lstrip().split("\n", 1)[0]
    read = _of_csv if path.suffix.lower() == ".csv" or _is_header(first) else _of_text
    chats: dict[str, list[Message]] = {}
    for chat, message in read(path, text, settings):
        chats.setdefault(chat, []).append(message)
    if not chats:
        raise FFRError(f"{path}: no messages in it; give {_EXPECTED}")
    number = 0
    for chat, messages in chats.items():
        name = chat if len(chats) == 1 or not chat.isdigit() else f"{path.stem} {chat}"
        for row in cut_chat(path.stem if len(chats) == 1 else name, messages, settings):
            yield number, row
            number += 1
    on_position(len(data))


def _is_header(line: str) -> bool:
    names = {name.strip().strip('"') for name in line.split(",")}
    return any(header <= names for header in _HEADERS)


def _fits(probe: Probe) -> bool:
    lines = probe.text.splitlines()[:40]
    return not probe.is_json and bool(lines) and (_is_header(lines[0]) or any(map(_head, lines)))


WECHAT = Source(
    about="WeChat: a CSV of MemoTrace, WeFlow, PyWxDump or chatlog, or a text with time and name above each message",
    example="2024-05-01 10:30:00 Ann\nlook at this\n\n2024-05-01 10:31:00 Ben\n[图片]",
    records=_records,
    dialogue=take_left_out,
    fits=_fits,
    leaves="notes of the system but for revoked messages; sounds, videos, stickers, files, and pictures without a "
    "file of their own, but for a mark",
)
