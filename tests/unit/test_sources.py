"""Formats of other tools and data sets: what becomes of each piece, what is told of the rest, which file is what."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gzip
import importlib.metadata
import json
import random
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from ffr_verl import cli
from ffr_verl.data import sources
from ffr_verl.data.compose import ComposeSettings, build
from ffr_verl.data.prepare import PrepareSummary, prepare
from ffr_verl.data.sources import SOURCES, find_source, source_of_file
from ffr_verl.data.sources.rows import RowSettings, chat_rows
from ffr_verl.data.sources.source import ReadSettings
from ffr_verl.data.windows import WindowSettings
from ffr_verl.dialogues import Utterance, parse_dialogue
from ffr_verl.errors import FFRError

Files = dict[str, Any]


def telegram(**changes: Any) -> Files:
    """Two evenings of a chat, a night between them."""
    date = iter([f"2024-05-0{day}T2{hour}:00:00" for day in (1, 2) for hour in range(4)])

    def message(number: int, name: str | None, text: Any, **more: Any) -> dict[str, Any]:
        known = {"id": number, "type": "message", "date": next(date), "from": name, "from_id": "user7"}
        return {**known, "text": text, "text_entities": [], **more}

    absent = "(File not included. Change data exporting settings to download.)"
    link = {"type": "text_link", "text": "this", "href": "https://a.b"}
    messages = [
        message(1, "Ann: work", ["see ", link, "!"]),
        {"id": 2, "type": "service", "date": next(date), "actor": "Ben", "actor_id": "user2", "action": "pin_message"},
        message(3, "Ben", "our <image>", photo="photos/a.jpg", reply_to_message_id=1, reactions=[{"count": 1}]),
        message(4, "Ann: work", "", file=absent, media_type="sticker", sticker_emoji="😏"),
        message(5, None, "", file="v.ogg", media_type="voice_message", duration_seconds=7, note_text="unread"),
        message(6, "Ben", "", photo=absent, forwarded_from="News"),
        message(7, "Ben", "", poll={"question": "Tea?", "answers": [{"text": "Yes"}, {"text": "No"}]}),
        message(8, "Ben", "", file="files/plan.pdf", file_name="plan.pdf", mime_type="application/pdf"),
    ]
    return {"result.json": {"name": "Ann", "type": "personal_chat", "id": 1, "messages": messages, **changes}}


SLACK: Files = {
    "users.json": [{"id": "U1", "name": "ann", "profile": {"display_name": "Ann"}}, {"id": "U2", "real_name": "Ben"}],
    "general/2024-05-01.json": [
        {"type": "message", "user": "U1", "ts": "1714559400.1", "text": "<@U2> see <https://a.b|this> &amp; that"},
        {"type": "message", "user": "U1", "ts": "1714559401.1", "subtype": "channel_join", "text": "joined"},
        {
            "type": "message",
            "user": "U2",
            "ts": "1714559402.1",
            "thread_ts": "1714559400.1",
            "text": "look",
            "files": [
                {"id": "F1", "name": "a.png", "mimetype": "image/png", "url_private": "https://f/1"},
                {"id": "F2", "name": "b.png", "mimetype": "image/png", "url_private": "https://f/2"},
                {"id": "F3", "name": "c.pdf", "mimetype": "application/pdf"},
            ],
        },
    ],
    "general/2024-05-02.json": [
        {
            "type": "message",
            "subtype": "bot_message",
            "username": "CI",
            "ts": "1714645800.1",
            "text": "",
            "attachments": [{"title": "build", "text": "failed", "fallback": "build"}],
        }
    ],
}

_REFER = (
    "<msg><appmsg><title>yes</title><refermsg><displayname>Ann</displayname><content>shall we?</content></refermsg>"
)
MEMOTRACE: Files = {
    "Ann.csv": "localId,TalkerId,Type,SubType,IsSender,CreateTime,Status,StrContent,StrTime,Remark,NickName,Sender\n"
    "1,7,1,0,0,1714559400,,你好,2024-05-01 10:30:00,Ann,A,wx1\n"
    "2,7,47,0,1,1714559401,,<msg><emoji/></msg>,2024-05-01 10:30:01,Ann,A,wx1\n"
    "3,7,34,0,0,1714559402,,,2024-05-01 10:30:02,Ann,A,wx1\n"
    '4,7,49,5,0,1714559403,,"<msg><appmsg><title>News, today</title></appmsg></msg>",2024-05-01 10:30:03,Ann,A,wx1\n'
    f'5,7,49,57,1,1714559404,,"{_REFER}",2024-05-01 10:30:04,Ann,A,wx1\n'
    '6,7,10000,0,0,1714559405,,"""Ann"" 撤回了一条消息",2024-05-01 10:30:05,Ann,A,wx1\n'
    "7,7,10000,0,0,1714559406,,以上是打招呼的内容,2024-05-01 10:30:06,Ann,A,wx1\n"
    "8,7,3,0,0,1714559407,,<msg><img/></msg>,2024-05-01 10:30:07,Ann,A,wx1\n"
}
WEFLOW: Files = {
    "Ann.csv": "id,MsgSvrID,type_name,is_sender,talker,msg,src,CreateTime\r\n"
    "1,9,text,0,Ann: 工作,hi,,2024-05-01T10:30:00.000Z\r\n"
    "2,9,图片,1,me,[图片],photos\\a.jpg,2024-05-01T10:31:00.000Z\r\n"
    "3,9,图片,1,me,[图片],,2024-05-01T10:31:00.000Z\r\n"
}
CHATLOG: Files = {
    "chat.csv": "Time,SenderName,Sender,TalkerName,Talker,Content\n"
    "2024-05-01 10:30:00,Ann,wx1,us,g1,look ![图片](http://127.0.0.1:5030/image/1)\n"
    "2024-05-01 10:31:00,Ben,wx2,us,g1,![图片](photos/a.jpg)\n"
}
WECHAT_TEXT: Files = {
    "Ann.txt": "2024-05-01 10:30:00 Ann\nlook at: this\n\nand this\n\n"
    '2024/5/1 10:31:00 Ben\n[语音]\nflight 2024-05-03 10:00\n2024-05-01 10:32:00 系统消息\n"Ben" 撤回了一条消息\n'
    "2024-05-01 10:33:00 Ann\n[引用 Ben：ok] yes\n"
}
NAME_FIRST: Files = {"Ann.txt": "Ann 2024-05-01 10:30:00\nlook\n\nBen 2024/5/1 10:31:00\nyes\n"}
INLINE: Files = {"Ann.txt": "[2024-05-01 10:30:00] Ann: look\nhere\n[2024-05-01 10:31:00] Ben: [图片]\n"}

PHOTOCHAT: Files = {
    "rows.json": [
        {
            "dialogue": [
                {"message": "my dog", "share_photo": False, "user_id": 1},
                {"message": "", "share_photo": True, "user_id": 1},
                {"message": "cute", "share_photo": False, "user_id": 0},
            ],
            "dialogue_id": 7,
            "photo_description": "a dog",
            "photo_url": "https://p/1.jpg",
            "photo_id": "train/1",
        }
    ]
}
DIALOGCC: Files = {
    "rows.jsonl": {
        "dialogue_id": "bst:1",
        "dialogue": [
            {
                "speaker": "A",
                "utterance": "my dog",
                "shared_image": [
                    {"image_url": "https://p/1.jpg", "caption": "a dog"},
                    {"image_url": "https://p/2.jpg", "caption": "dogs"},
                ],
            },
            {"speaker": "B", "utterance": "cute", "shared_image": []},
        ],
        "split": "train",
    }
}
MMDIALOG: Files = {
    "conversations.json": [
        {
            "conversation": [
                {"turn": [{"__TEXT__": "good morning"}, {"__MEDIA__": "photos/a"}]},
                {"turn": [{"__TEXT__": "nice"}]},
            ],
            "negative_candidate_media_keys": ["x", "y"],
            "negative_candidate_texts": ["z"],
        }
    ]
}
MMDD: Files = {
    "rows.jsonl": {
        "dialog": ["hi", "my dog", "cute"],
        "replaced_idx": 1,
        "img_idx": 4,
        "score": 0.7,
        "dialog_dataset": "persona",
        "dialog_file": "train.txt",
        "img_dataset": "coco",
        "img_file": "photos/a.jpg",
    }
}


def locomo() -> Files:
    def turn(number: str, speaker: str, text: str, **more: Any) -> dict[str, Any]:
        return {"speaker": speaker, "dia_id": number, "text": text, **more}

    def question(text: str, category: int, *evidence: str) -> dict[str, Any]:
        return {"question": text, "answer": "…", "evidence": [*evidence], "category": category}

    picture = {"img_url": ["https://p/1.jpg"], "blip_caption": "a dog", "query": "dog"}
    talk = {
        "speaker_a": "Ann",
        "speaker_b": "Ben",
        "session_10": [turn("D10:1", "Ann", "bye")],
        "session_2_date_time": "1:56 pm on 8 May, 2023",
        "session_2": [turn("D2:1", "Ann", "my dog", **picture), turn("D2:2", "Ben", "cute")],
    }
    asked = [
        question("Which pet?", 4, "D2:1; D10:01"),
        question("What car has Ben?", 5, "D2:1"),
        question("Who?", 1, "D"),
    ]
    return {"locomo.json": [{"sample_id": "c1", "conversation": talk, "qa": asked, "event_summary": {}}]}


def written(folder: Path, files: Files) -> Path:
    """The files of a source; the only one, or their folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (
            content if isinstance(content, str) else json.dumps(content, indent=1 if name == "result.json" else None)
        )
        path.write_text(text, encoding="utf-8", newline="")
    return folder / next(iter(files)) if len(files) == 1 else folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / f"{name}.jpg")
    return tmp_path


def run(folder: Path, source: Path, **options: Any) -> PrepareSummary:
    known = {"images_root": folder, "output": folder / "out", "split": "t", "source_format": "auto"}
    return prepare(source, **{**known, **options})


def turns(row: dict[str, Any]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(one.speaker, one.text, one.image_ids) for one in parse_dialogue(row["messages"], "").utterances]


CASES: dict[str, tuple[str, Files, list[list[tuple[str, str, tuple[int, ...]]]], dict[str, int]]] = {
    "telegram": (
        "telegram",
        telegram(),
        [
            [
                ("Ann:work", "see this (https://a.b)!", ()),
                ("Ben", '[reply to Ann: work: "see this (https://a.b)!"] our < image>', (0,)),
                ("Ann:work", "[sticker 😏]", ()),
            ],
            [
                ("user7", "[voice message, 7 s]", ()),
                ("Ben", "[forwarded from News] [picture]", ()),
                ("Ben", "[poll: Tea? Yes / No]", ()),
                ("Ben", "[file: plan.pdf]", ()),
            ],
        ],
        {
            "service messages": 1,
            "reactions": 1,
            "stickers, a mark stands for each": 1,
            "texts with a piece that has a meaning in a prompt, which got a blank": 1,
            "name of a speaker, 'Ann: work' is written 'Ann:work'": 1,
            "voice messages, a mark stands for each": 1,
            "field not read, note_text": 1,
            "pictures that the export does not include, a mark stands for each": 1,
            "files, a mark stands for each": 1,
        },
    ),
    "slack": (
        "slack",
        SLACK,
        [
            [
                ("Ann", "@Ben see this (https://a.b) & that", ()),
                (
                    "Ben",
                    '[reply to Ann: "@Ben see this (https://a.b) & that"] look [picture: b.png] [file: c.pdf]',
                    (0,),
                ),
            ],
            [("CI", "[attached: build | failed]", ())],
        ],
        {
            "service messages": 1,
            "files, a mark stands for each": 1,
            "pictures without a file, a mark stands for each (--image-map)": 1,
        },
    ),
    "wechat, MemoTrace": (
        "wechat",
        MEMOTRACE,
        [
            [
                ("Ann", "你好", ()),
                ("我", "[动画表情]", ()),
                ("Ann", "[语音]", ()),
                ("Ann", "[链接] News, today", ()),
                ("我", "yes [引用 Ann：shall we?]", ()),
                ("Ann", '["Ann" 撤回了一条消息]', ()),
                ("Ann", "[图片]", ()),
            ]
        ],
        {
            "service messages": 1,
            "stickers, a mark stands for each": 1,
            "voice messages, a mark stands for each": 1,
            "pictures without a file, a mark stands for each": 1,
        },
    ),
    "wechat, WeFlow": (
        "wechat",
        WEFLOW,
        [[("Ann:工作", "hi", ()), ("我", "", (0,)), ("我", "[图片]", ())]],
        {
            "pictures without a file, a mark stands for each": 1,
            "name of a speaker, 'Ann: 工作' is written 'Ann:工作'": 1,
        },
    ),
    "wechat, chatlog": (
        "wechat",
        CHATLOG,
        [[("Ann", "look [图片]", ()), ("Ben", "", (0,))]],
        {"pictures without a file, a mark stands for each": 1},
    ),
    "wechat, text": (
        "wechat",
        WECHAT_TEXT,
        [
            [
                ("Ann", "look at: this\n\nand this", ()),
                ("Ben", "[语音]\nflight 2024-05-03 10:00", ()),
                ("系统消息", '["Ben" 撤回了一条消息]', ()),
                ("Ann", "[引用 Ben：ok] yes", ()),
            ]
        ],
        {"voice messages, a mark stands for each": 1},
    ),
    "wechat, the name first": ("wechat", NAME_FIRST, [[("Ann", "look", ()), ("Ben", "yes", ())]], {}),
    "wechat, a line each": (
        "wechat",
        INLINE,
        [[("Ann", "look\nhere", ()), ("Ben", "[图片]", ())]],
        {"pictures without a file, a mark stands for each": 1},
    ),
    "photochat": ("photochat", PHOTOCHAT, [[("user2", "my dog", ()), ("user2", "", (0,)), ("user1", "cute", ())]], {}),
    "dialogcc": (
        "dialogcc",
        DIALOGCC,
        [[("A", "my dog [picture: dogs]", (0,)), ("B", "cute", ())]],
        {"pictures without a file, a mark stands for each (--image-map)": 1},
    ),
    "mmdialog": (
        "mmdialog",
        MMDIALOG,
        [[("user1", "good morning", (0,)), ("user2", "nice", ())]],
        {"candidates of the retrieval task": 3},
    ),
    "mmdd": (
        "mmdd",
        MMDD,
        [[("user1", "hi", ()), ("user2", "", (0,)), ("user1", "cute", ())]],
        {"texts that a picture replaces (--captions writes them)": 1},
    ),
    "locomo": (
        "locomo",
        locomo(),
        [[("Ann", "my dog", (0,)), ("Ben", "cute", ()), ("Ann", "bye", ())]],
        {
            "times of sessions": 1,
            "search words of pictures": 1,
            "questions whose evidence names no turns of the conversation": 1,
            "answers of questions": 2,
            "summaries and observations": 1,
            "gold answers (--unlabelled)": 1,
        },
    ),
}
IMAGE_FILES = {"https://p/1.jpg": "photos/a.jpg", "F1": "photos/b.jpg"}


@pytest.mark.parametrize("case", CASES)
def test_every_piece_is_in_a_row_or_told(folder: Path, case: str) -> None:
    name, files, expected, left_out = CASES[case]
    source = written(folder, files)
    told: dict[str, int] = {}
    settings = RowSettings(ReadSettings(IMAGE_FILES))
    rows = list(chat_rows(source, ["a query"], settings=settings, on_note=told.__setitem__))
    assert [turns(row) for row in rows] == expected
    assert all(set(row) == {"dialogue_id", "images", "messages"} for row in rows)
    assert told == left_out
    assert source_of_file(source)[0] == name
    mapped = folder / "map.json"
    mapped.write_text(json.dumps(IMAGE_FILES))
    summary = run(folder, source, unlabelled=True, queries=["a query"], image_map=mapped)
    assert (summary.rows, summary.left_out) == (len(expected), left_out)


def test_every_format_has_a_case() -> None:
    assert {name for name, *_ in CASES.values()} | {"mldr", "dialogue"} == set(SOURCES)


def test_an_example_is_of_its_format(tmp_path: Path) -> None:
    for number, (name, source) in enumerate(SOURCES.items()):
        if name != "slack":  # a folder
            path = tmp_path / f"{number}.{'txt' if name == 'wechat' else 'json'}"
            path.write_text(source.example, encoding="utf-8")
            assert source_of_file(path)[0] == name


def test_locomo_brings_queries_and_gold_turns(folder: Path) -> None:
    (folder / "map.tsv").write_text("https://p/1.jpg\tphotos/a.jpg\n")
    summary = run(folder, written(folder, locomo()), image_map=folder / "map.tsv")
    rows = pq.read_table(summary.rl_path).to_pylist()
    assert [(row["extra_info"]["query"], row["reward_model"]["ground_truth"]) for row in rows] == [
        ("Which pet?", "<|utt_ids_start|>[0, 2]<|utt_ids_end|>;<|img_ids_start|>[0]<|img_ids_end|>"),
        ("What car has Ben?", "<|utt_ids_start|>[]<|utt_ids_end|>;<|img_ids_start|>[]<|img_ids_end|>"),
    ]


@pytest.mark.parametrize(
    ("hours", "ids"),
    [(8.0, ["Ann 2024-05-01 20:00", "Ann 2024-05-02 20:00"]), (0, ["Ann"]), (2.0, None)],
)
def test_a_chat_is_cut_where_nobody_wrote_for_long(folder: Path, hours: float, ids: list[str] | None) -> None:
    """Hours lie between messages, two between the first one and that behind the service message."""
    settings = RowSettings(ReadSettings(gap_hours=hours))
    rows = list(chat_rows(written(folder, telegram()), ["q"], settings=settings))
    found = [row["dialogue_id"] for row in rows]
    assert found == (ids or ["Ann 2024-05-01 20:00", "Ann 2024-05-01 22:00", "Ann 2024-05-02 20:00"])


def test_a_chat_goes_through_windows_and_build(folder: Path) -> None:
    source = written(folder, telegram())
    window = WindowSettings(4, 2, "global")
    summary = run(folder, source, unlabelled=True, queries=["q"], gap_hours=0, window=window)
    windows = [row["extra_info"]["window"]["number"] for row in pq.read_table(summary.rl_path).to_pylist()]
    assert windows == [0, 1, 2]
    settings = ComposeSettings(topics=2, unlabelled=True)
    assert build(source, folder / "long.jsonl", dialogues=2, settings=settings, source_format="auto")[0] == 0
    again = run(folder, folder / "long.jsonl", split="long", unlabelled=True, queries=["q"])
    assert (again.rows, again.source_format, again.statistics["turns_mean"]) == (2, "dialogue", 7)
    with pytest.raises(FFRError, match=r"row 0: no query in query_text"):
        build(source, folder / "x.jsonl", dialogues=1, settings=ComposeSettings(topics=1), source_format="auto")


def test_build_asks_for_what_a_field_of_another_format_says(folder: Path) -> None:
    source = written(folder, PHOTOCHAT)
    settings = ComposeSettings(topics=1, negatives=0)
    options: dict[str, Any] = {"query_fields": ["photo_description"], "source_format": "photochat"}
    assert build(source, folder / "long.jsonl", dialogues=1, settings=settings, **options)[0] == 1
    assert json.loads((folder / "long.jsonl").read_text())["queries"] == [
        {"query_text": "a dog", "gt_turns": [0, 1, 2]}
    ]


def test_speakers_with_colons_in_raw_dialogues_stay_apart(folder: Path) -> None:
    names = ["A: B", "A：B", "A:B", "A:\nB", "A"]
    row = {
        "dialogue_id": "d",
        "dialogue": [{"speaker": name, "utterance": "x: y"} for name in [*names, "A: B"]],
        "query_text": "q",
        "gt_turns": [0],
    }
    summary = run(folder, written(folder, {"rows.json": [row]}))
    (made,) = pq.read_table(summary.rl_path).to_pylist()
    found = parse_dialogue(made["prompt"], "d").utterances
    speakers = ["A:B", "A:B (2)", "A:B (3)", "A:B (4)", "A", "A:B"]
    assert found == tuple([Utterance(number, name, "x: y") for number, name in enumerate(speakers)])
    assert sum(summary.left_out.values()) == 4


BROKEN: list[tuple[str, Callable[[Path], Path], str, str]] = [
    (
        "a cut export",
        lambda folder: cut(written(folder, telegram()), 700),
        "auto",
        r"line \d+: not JSON .*seems cut off",
    ),
    (
        "no messages",
        lambda folder: written(folder, telegram(messages=[])),
        "telegram",
        r"no messages in it; give result",
    ),
    ("no list of messages", lambda folder: written(folder, telegram(messages=3)), "telegram", "a chat without a list"),
    (
        "a missing picture",
        lambda folder: gone(folder, telegram()),
        "auto",
        r"images\[0\]': photos/a.jpg: no such file",
    ),
    (
        "another encoding",
        lambda folder: gb18030(folder),
        "auto",
        r"not UTF-8 at byte \d+; convert it, .*iconv -f GB18030",
    ),
    (
        "a cut CSV",
        lambda folder: cut(written(folder, MEMOTRACE), 300),
        "auto",
        r"line 5: fewer fields than columns; .*cut",
    ),
    ("an open quote", lambda folder: cut(written(folder, MEMOTRACE), 470), "auto", r"line \d+: .*seems cut off"),
    ("a cut header", lambda folder: written(folder, {"a.csv": '"类型,时间,内容,发送'}), "wechat", "line 1: .*cut off"),
    (
        "other columns",
        lambda folder: written(folder, {"a.csv": "a,b\n1,2\n"}),
        "wechat",
        r"the columns a, b are of no",
    ),
    ("no heads", lambda folder: written(folder, {"a.txt": "hello\n"}), "wechat", "no line with the time and name"),
    (
        "no format",
        lambda folder: written(folder, {"a.txt": "hello\n"}),
        "auto",
        "a.txt: of none of the formats mldr, dia",
    ),
    ("no folder", lambda folder: written(folder, {"a.json": {}}), "slack", "no folder; unpack the zip file first"),
    ("an empty folder", lambda folder: folder, "slack", "no messages in it; give the unpacked folder"),
    (
        "a wrong name",
        lambda folder: folder,
        "telegramm",
        r"--format: found 'telegramm', expected one of auto, mldr, dialogue, .*; did you mean 'telegram'\? or",
    ),
    ("no rows", lambda folder: written(folder, {"a.json": []}), "photochat", "no rows in it"),
    (
        "a lost field",
        lambda folder: written(folder, {"a.json": [{"dialogue": []}]}),
        "photochat",
        r"missing_field \(1 row\)",
    ),
    (
        "a wrong place",
        lambda folder: written(folder, {"a.json": [{**MMDD["rows.jsonl"], "replaced_idx": 3}]}),
        "mmdd",
        r"field 'replaced_idx': found '3'; expected 0 to 2",
    ),
]


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def gone(folder: Path, files: Files) -> Path:
    (folder / "photos" / "a.jpg").unlink()
    return written(folder, files)


def gb18030(folder: Path) -> Path:
    path = folder / "Ann.txt"
    path.write_bytes(WECHAT_TEXT["Ann.txt"].encode("gb18030"))
    return path


@pytest.mark.parametrize(("make", "name", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_bad_input_is_named_and_nothing_written(
    folder: Path, make: Callable[[Path], Path], name: str, message: str
) -> None:
    with pytest.raises(FFRError, match=message):
        run(folder, make(folder), source_format=name, unlabelled=True, queries=["q"])
    assert not (folder / "out").exists()


def test_a_file_that_fits_two_formats_is_asked_about(folder: Path) -> None:
    row = {**DIALOGCC["rows.jsonl"], "query_text": "dog", "gt_turns": [0]}
    with pytest.raises(FFRError, match=r"may be of the format dialogue or dialogcc; say which with --format dialogue"):
        run(folder, written(folder, {"rows.jsonl": row}))


@pytest.mark.parametrize("case", CASES)
def test_no_damage_ends_in_a_traceback(folder: Path, case: str) -> None:
    name, files, *_ = CASES[case]
    chance = random.Random(case)
    values: list[Any] = [None, 0, -1, 1e40, "", "x", "\ud800", "a: b", "<image>", [], {}, [1], [[]], {"text": 3}]

    def places(value: Any) -> list[tuple[Any, Any]]:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]

    for _ in range(16):
        damaged = copy.deepcopy(files)
        file = chance.choice(list(damaged))
        if isinstance(damaged[file], str):
            start = chance.randrange(len(damaged[file]))
            damaged[file] = damaged[file][:start] + damaged[file][start + chance.randrange(40) :]
        else:
            container, key = chance.choice(places(damaged[file]))
            container[key] = copy.deepcopy(chance.choice(values))
        source = written(folder, damaged)
        with contextlib.suppress(FFRError):
            list(chat_rows(source, ["q"], source_format=name))


THIRD_PARTY = '''
from ffr_verl.data.sources import SOURCES
def lines(path):
    """Texts of my own."""
    turns = [{"speaker": "me", "utterance": line} for line in path.read_text().splitlines()]
    yield {"dialogue_id": path.stem, "dialogue": turns, "query_text": "q", "gt_turns": [0], "left_out": {"smileys": 2}}
def fails(path):
    yield next(lines(path))
    raise ValueError("no more")
def nothing(path): return None
def counts(path): yield {"left_out": {"a": "many"}}
def absent(path): open("no_such_file")
from ffr_verl.data.sources import Source
broken_rows = Source("x", "x", lambda path, settings, on_position: iter([{"a": 1}]), has_gold=True)
broken_dialogue = Source("x", "x", lambda path, settings, on_position: iter([(0, {"a": 1})]),
                         lambda number, row, settings, notes: row["b"], has_gold=True)
ready = SOURCES["dialogue"]
number = 3
'''


def test_formats_of_third_parties(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "third_party_of_tests.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(str(folder))
    points = [
        importlib.metadata.EntryPoint(name, value, sources.ENTRY_POINTS)
        for name, value in (("mine", "third_party_of_tests:lines"), ("broken", "no_such_module_here:x"))
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    source = written(folder, {"mine.txt": "hello\nyou"})
    for name in ("mine", "pkg://third_party_of_tests:lines", f"{folder}/third_party_of_tests.py:lines"):
        summary = run(folder, source, source_format=name)
        assert (summary.rows, summary.left_out) == (1, {"smileys": 2})
    assert find_source("pkg://third_party_of_tests:ready", source)[1] is SOURCES["dialogue"]
    for name, message in (
        (
            "fails",
            r"mine\.txt: behind row 0: --format pkg://.*:fails raised ValueError: no more \(third_party_of_te",
        ),
        ("nothing", r"mine\.txt: --format .* raised TypeError: 'NoneType' object is not iterable; see docs/data\.md"),
        ("broken_rows", r"mine\.txt: --format .* raised ValueError: not enough values to unpack"),
        ("broken_dialogue", r"row 0: --format .*:broken_dialogue raised KeyError: 'b'"),
        ("absent", r"mine\.txt: --format .*:absent raised FileNotFoundError: .*no_such_file"),
        ("counts", r"mine\.txt: row 0: left_out: found \{'a': 'many'\}, expected \{what: number\}"),
    ):
        with pytest.raises(FFRError, match=message):
            run(folder, source, source_format=f"pkg://third_party_of_tests:{name}")
    told: list[str] = []
    assert [name for name in sources.all_sources(told.append) if name not in SOURCES] == ["mine"]
    assert [message.partition(" (")[0] for message in told] == ["--format: broken"]
    for name, message in (
        (
            "broken",
            r"--format: broken \(entry point no_such_module_here:x of .*\): cannot be imported: ModuleNotFoundError",
        ),
        ("pkg://third_party_of_tests:number", "is of type int, expected a Source or a function"),
        ("pkg://third_party_of_tests", "expected pkg://module:name"),
        ("other", "expected one of auto, mldr, .*, broken, mine.*; or one of your own: pkg://module:name"),
    ):
        with pytest.raises(FFRError, match=message):
            find_source(name, source)


def test_a_format_of_a_third_party_tells_its_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    its = dataclasses.replace(SOURCES["dialogue"], fits=lambda probe: probe.text.startswith("mine"))
    monkeypatch.setitem(sys.modules, "third_party_of_tests", types.SimpleNamespace(its=its))
    point = importlib.metadata.EntryPoint("its", "third_party_of_tests:its", sources.ENTRY_POINTS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    assert sources.source_of_file(written(folder, {"a.txt": "mine"}))[0] == "its"


def test_a_whole_telegram_export_starts_with_contacts(folder: Path) -> None:
    contacts = [{"user_id": number, "first_name": "x" * 100} for number in range(4000)]
    whole = {"about": "", "personal_information": {}, "contacts": {"list": contacts}, "chats": {"list": []}}
    assert sources.source_of_file(written(folder, {"a.json": whole}))[0] == "telegram"


def test_a_csv_cut_in_its_last_column_is_told(folder: Path) -> None:
    file = written(folder, MEMOTRACE)
    whole = run(folder, file, source_format="wechat", unlabelled=True, queries=["q"]).left_out
    file.write_text(file.read_text(encoding="utf-8").rstrip(), encoding="utf-8")
    cut_off = run(folder, file, source_format="wechat", unlabelled=True, queries=["q"]).left_out
    assert dict(Counter(cut_off) - Counter(whole)) == {
        "what came after, if the file was cut off: its last line has no end": 1
    }


def test_words_of_slack_that_stand_in_blocks_alone(folder: Path) -> None:
    section = {"type": "section", "text": {"type": "mrkdwn", "text": "Release <https://a.b|1.2>"}}
    rich = {"type": "rich_text", "elements": [{"type": "rich_text_section", "elements": [
        {"type": "text", "text": "is out"}, {"type": "user", "user_id": "U1"}]}]}  # fmt: skip
    message = {"type": "message", "username": "bot", "ts": "1714559400.1", "text": "", "blocks": [section, rich]}
    file = written(folder, {"general/2024-05-01.json": [message]})
    (row,) = chat_rows(file.parent.parent, ["q"], source_format="slack")
    assert turns(row) == [("bot", "Release 1.2 (https://a.b) is out", ())]


def test_the_example_of_the_docs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    example = docs.partition("### A format of your own")[2].partition("```python\n")[2].partition("```")[0]
    (folder / "matrix_of_the_docs.py").write_text(example)
    monkeypatch.syspath_prepend(str(folder))
    source = written(folder, {"us.txt": "Ann\thello\nBen\tyes?\n"})
    (row,) = chat_rows(source, ["q"], source_format="pkg://matrix_of_the_docs:dialogues")
    assert (row["dialogue_id"], turns(row)) == ("us", [("Ann", "hello", ()), ("Ben", "yes?", ())])


def test_the_command_lists_the_formats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("prepare", "build"):
        monkeypatch.setattr("sys.argv", ["ffr-verl", command, "--format", "list"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr().out
        assert end.value.code == 0
        assert all(name in shown for name in SOURCES)


def test_image_maps(folder: Path) -> None:
    source = written(folder, PHOTOCHAT)
    for text, message in (
        ("no tab", r"--image-map .*: line 1: no tab in it; give a JSON object"),
        ('{"a": 1}', "a value is no text"),
        ("{", "give a JSON object"),
        ('{"a": ' + 10_000 * "[", "give a JSON object"),
    ):
        (folder / "map").write_text(text)
        with pytest.raises(FFRError, match=message):
            run(folder, source, unlabelled=True, queries=["q"], image_map=folder / "map")


def test_a_damaged_gzip_file_is_said(folder: Path) -> None:
    packed = bytearray(gzip.compress(json.dumps(PHOTOCHAT).encode()))
    packed[10] ^= 0xFF
    (folder / "rows.json.gz").write_bytes(packed)
    with pytest.raises(FFRError, match="broken gzip file"):
        run(folder, folder / "rows.json.gz")


def test_long_messages_and_odd_times_of_wechat(folder: Path) -> None:
    text = "long " * 40_000
    lines = f"id,MsgSvrID,type_name,is_sender,talker,msg,src,CreateTime\r\n1,9,text,0,Ann,{text},,²²\r\n"
    (folder / "Ann.csv").write_text(lines, encoding="utf-8", newline="")
    run(folder, folder / "Ann.csv", unlabelled=True, queries=["q"])
    (row,) = pq.read_table(folder / "out" / "t.rl.parquet").to_pylist()
    assert text.strip() in row["prompt"][-1]["content"]
