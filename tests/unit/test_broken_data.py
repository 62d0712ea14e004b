"""Every kind of broken row and file: the message, exit status 2, nothing left behind."""

from __future__ import annotations

import bz2
import contextlib
import copy
import gzip
import io
import itertools
import json
import lzma
import os
import random
import re
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from ffr_verl.cli import main
from ffr_verl.data.checks.problems import ProblemKind
from ffr_verl.data.compose import ComposeSettings, build
from ffr_verl.data.inspection import render_row
from ffr_verl.data.parquet_files import check_columns, check_images, images_root
from ffr_verl.data.prepare import prepare
from ffr_verl.data.windows import WindowSettings
from ffr_verl.errors import FFRError
from ffr_verl.settings import DataConfig

Row = dict[str, Any]
pytestmark = pytest.mark.filterwarnings("ignore:Image size .* exceeds limit")  # pictures too large on purpose

ANSWER = "<|utt_ids_start|>[{}]<|utt_ids_end|>;<|img_ids_start|>[{}]<|img_ids_end|>"
PROMPT = (
    "<|query_start|>the cat<|query_end|>\nGive the ids.\n"
    "<|utt_id_start|>0<|utt_id_end|> Ann: look at him\n"
    "<|utt_id_start|>1<|utt_id_end|> Ann: <|img_id_start|>0<|img_id_end|><image>\n"
    "<|utt_id_start|>2<|utt_id_end|> Bob: sweet\n"
    "<|utt_id_start|>3<|utt_id_end|> Bob: and this <|img_id_start|>1<|img_id_end|><image>"
)


def good_row(number: int = 0) -> Row:
    solution = ANSWER.format("0, 1, 2", "0")
    return {
        "dialogue_id": f"d{number}",
        "images": ["cat.png", "dog.jpg"],
        "solution": solution,
        "messages": [
            {"role": "system", "content": "You find fragments."},
            {"role": "user", "content": PROMPT.replace("look at him", f"look at him, number {number}")},
            {"role": "assistant", "content": solution},
        ],
    }


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing: an image bomb."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(4096))) + chunk(b"IEND", b"")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("pictures")
    noise = Image.effect_noise((96, 96), 60)
    noise.convert("RGB").save(tmp_path / "cat.png")
    noise.convert("RGB").save(tmp_path / "dog.jpg")
    noise.save(tmp_path / "gray.webp")
    (tmp_path / "zero.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cat.png").read_bytes()[:4000])
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "dog.jpg").read_bytes()[:2000])
    (tmp_path / "cut.webp").write_bytes((tmp_path / "gray.webp").read_bytes()[:1000])
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (tmp_path / "large.png").write_bytes(png_header(10_000, 10_000))
    (tmp_path / "thin.png").write_bytes(png_header(4_000, 10))
    broken = bytearray((tmp_path / "cat.png").read_bytes())
    broken[len(broken) // 2] ^= 0xFF
    (tmp_path / "middle.png").write_bytes(bytes(broken))
    noise.convert("CMYK").save(tmp_path / "cmyk.jpg")
    noise.save(tmp_path / "moving.gif", save_all=True, append_images=[noise.rotate(90)])
    (tmp_path / "folder.png").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}_outside.png"
    noise.save(outside)
    (tmp_path / "link.png").symlink_to(outside)
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    (tmp_path / "linked").symlink_to(outside.parent)
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    noise.save(tmp_path / "program.png", "EPS")  # Pillow would start Ghostscript for it
    noise.save(tmp_path / "preview.jpg", "MPO", save_all=True, append_images=[noise.rotate(90)])
    Image.new("I;16", (64, 64)).save(tmp_path / "deep.png")
    return tmp_path


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    shutil.copytree(pictures, tmp_path, symlinks=True, copy_function=os.link, dirs_exist_ok=True)
    return tmp_path


def run(folder: Path, content: bytes | list[Any], monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """`ffr-verl prepare` in this process; its exit status."""
    source = folder / "rows.json"
    source.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    arguments = ["prepare", str(source), "--images-root", str(folder), "--output", str(folder / "out"), "--split", "t"]
    monkeypatch.setattr(sys, "argv", ["ffr-verl", *arguments, *options])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def assert_refused(
    folder: Path,
    content: bytes | list[Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *options: str,
) -> None:
    assert run(folder, content, monkeypatch, *options) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("ffr-verl: error: ")
    assert "Traceback" not in error
    assert not (folder / "out").exists(), "nothing is left"
    assert_documented(error)


DOCS = (Path(__file__).parents[2] / "docs" / "messages.md").read_text(encoding="utf-8")
# The messages in docs/messages.md: the first cells of its tables, with … for what differs from case to case.
MESSAGES = [
    ".*".join(re.escape(piece) for piece in cell.replace(r"\|", "|").split("…"))
    for cell in re.findall(r"^\| `(.+?)` \|", DOCS, re.MULTILINE)
]


def assert_documented(shown: str) -> None:
    """Each message about a row or a file is in docs/messages.md."""
    lines = shown.splitlines()
    problems = [found.group(1) for line in lines if (found := re.match(r"  row \d+: field '.*?': (.*)", line))]
    error = re.match("ffr-verl: error: (.*)", lines[0]) if lines else None
    if error is not None:
        problems.append(error.group(1))
    assert problems
    for problem in problems:
        assert any(re.fullmatch(f"(.*?: )?{message}", problem) for message in MESSAGES), problem


def user(row: Row) -> dict[str, str]:
    return next(message for message in row["messages"] if message["role"] == "user")


def replace(old: str, new: str) -> Callable[[Row], None]:
    def damage(row: Row) -> None:
        assert old in user(row)["content"]
        user(row)["content"] = user(row)["content"].replace(old, new)

    return damage


def gold(utterances: str, images: str = "") -> Callable[[Row], None]:
    return solution(ANSWER.format(utterances, images))


def solution(text: str) -> Callable[[Row], None]:
    def damage(row: Row) -> None:
        row["solution"] = row["messages"][-1]["content"] = text

    return damage


def image(name: Any, position: int = 0) -> Callable[[Row], None]:
    return lambda row: row["images"].__setitem__(position, name)


ROWS: list[tuple[str, Callable[[Row], Any], str]] = [
    # fields
    ("missing_field", lambda row: row.pop("dialogue_id"), r"'dialogue_id': missing; expected a text or a number"),
    ("missing_field", lambda row: row.update(dialogue_id=""), r"'dialogue_id': missing"),
    ("missing_field", lambda row: row.update(dialogue_id=None), r"'dialogue_id': missing"),
    ("wrong_type", lambda row: row.update(dialogue_id=["d"]), r"'dialogue_id': found \['d'\], expected a text"),
    ("wrong_type", lambda row: row.update(dialogue_id=1.0), r"'dialogue_id': found 1\.0, expected a .* whole number"),
    ("missing_field", lambda row: row.pop("messages"), r"'messages': missing; expected system, user, assistant"),
    ("bad_roles", lambda row: row.update(messages=[]), r"'messages': empty; expected system"),
    ("wrong_type", lambda row: row.update(messages="hi"), r"'messages': found 'hi', expected a list"),
    ("wrong_type", lambda row: row["messages"].insert(0, "hi"), r"'messages\[0\]': expected an object with the texts"),
    ("wrong_type", lambda row: user(row).update(content=3), r"'messages\[1\]': expected an object with the texts"),
    ("wrong_type", lambda row: user(row).update(role=None), r"'messages\[1\]': expected an object with the texts"),
    ("bad_roles", lambda row: row["messages"].pop(), r"'messages': found the roles system, user; expected"),
    ("bad_roles", lambda row: row["messages"].reverse(), r"found the roles assistant, user, system"),
    ("bad_roles", lambda row: user(row).update(role="human"), r"found the roles system, human, assistant"),
    ("missing_field", lambda row: row.pop("solution"), r"'solution': missing; expected the gold answer"),
    ("wrong_type", lambda row: row.update(solution=[1]), r"'solution': found \[1\], expected a text"),
    ("missing_field", lambda row: row.pop("images"), r"'images': missing; give \[\]"),
    ("wrong_type", lambda row: row.update(images="cat.png"), r"'images': found 'cat.png', expected a list of paths"),
    # texts
    ("bad_text", replace("sweet", "swe\0et"), r"'messages\[1\]': holds a NUL character"),
    ("bad_text", replace("sweet", "\ud83d alone"), r"'messages\[1\]': holds half of a surrogate pair"),
    ("bad_text", lambda row: row.update(dialogue_id="\udc00"), r"'dialogue_id': holds half of a surrogate pair"),
    ("bad_text", replace("sweet", "a <video> of him"), r"utterance 2 holds <video>"),
    ("bad_text", replace("and this", "and <|im_start|>that"), r"utterance 3 holds <\|im_start\|>"),
    ("bad_text", replace("and this", "and <|image_pad|>"), r"utterance 3 holds <\|image_pad\|>"),
    ("bad_text", replace("Bob: sweet", "<|box_start|>: sweet"), r"utterance 2 holds <\|box_start\|>"),
    ("bad_text", replace("the cat", "the <|vision_start|>"), r"the query holds <\|vision_start\|>"),
    ("bad_text", replace("Give the ids.", "<|endoftext|>"), r"'messages\[1\]': holds <\|endoftext\|>"),
    ("bad_text", lambda row: row["messages"][0].update(content="a <|image_pad|>"), r"holds <\|image_pad\|>"),
    ("bad_text", replace("start|>3<", "start|>3a<"), r"utterance 2 holds <\|utt_id_start\|>"),
    ("bad_text", replace("start|>3<", "start|>1234567890<"), r"utterance 2 holds <\|utt_id_start\|>"),
    ("bad_text", replace("sweet", "<|im_end|>\n<|im_start|>system"), r"utterance 2 holds <\|im_end\|>"),
    ("bad_text", replace("sweet", "<|query_start|>dogs"), r"utterance 2 holds <\|query_start\|>"),
    ("bad_text", replace("sweet", "<|utt_ids_start|>[0]<|utt_ids_end|>"), r"utterance 2 holds <\|utt_ids_start\|>"),
    ("bad_text", lambda row: row["messages"][0].update(content="<image>"), r"'messages\[0\]': holds <image>"),
    # the dialogue
    ("no_dialogue", lambda row: user(row).update(content="hello"), r"no <\|query_start\|>"),
    ("no_dialogue", replace("<|query_end|>", ""), r"no <\|query_start\|>"),
    ("no_dialogue", replace("<|utt_id_start|>", "<|utt|>"), r"no <\|utt_id_start\|>"),
    ("no_dialogue", replace("the cat", " "), r"the query is empty"),
    ("utterance_ids", replace("start|>2<", "start|>9<"), r"utterance 2 has the id 9; expected 0 to 3 in order"),
    ("utterance_ids", replace("utt_id_start|>1<", "utt_id_start|>0<"), r"utterance 1 has the id 0"),
    ("utterance_ids", replace("utt_id_start|>3<", "utt_id_start|>1<"), r"utterance 3 has the id 1"),
    ("utterance_ids", replace("utt_id_start|>0<", "utt_id_start|>4<"), r"utterance 0 has the id 4"),
    ("image_ids", replace("img_id_start|>1<", "img_id_start|>2<"), r"image ids are \[0, 2\]; expected 0, 1, 2"),
    ("image_ids", replace("img_id_start|>1<", "img_id_start|>0<"), r"image ids are \[0, 0\]"),
    ("image_count", lambda row: row["images"].pop(), r"1 paths, 2 <image> and 2 image ids; the three must be equal"),
    ("image_count", lambda row: row["images"].append("cat.png"), r"3 paths, 2 <image> and 2 image ids"),
    ("image_count", replace("sweet", "sweet <image>"), r"2 paths, 3 <image> and 2 image ids"),
    ("image_count", replace("<|img_id_start|>1<|img_id_end|><image>", "<image>"), r"2 <image> and 1 image ids"),
    (
        "image_count",
        lambda row: (
            replace("sweet", "sweet <image>")(row),
            replace("1<|img_id_end|><image>", "1<|img_id_end|>")(row),
        ),
        r"'messages': utterance 2 has 0 image ids and 1 <image>",
    ),
    (
        "bad_text",  # with as many < as a good row has
        lambda row: (replace("sweet", "<video>")(row), replace("1<|img_id_end|><image>", "1<|img_id_end|>")(row)),
        r"utterance 2 holds <video>",
    ),
    # images
    ("wrong_type", image(7), r"'images\[0\]': found 7; expected a path"),
    ("wrong_type", image(""), r"'images\[0\]': found ''; expected a path"),
    ("wrong_type", image({"url": "cat.png"}), r"'images\[0\]': found \{'url': 'cat.png'\}; expected a path"),
    ("image_missing", image("no.png"), r"no\.png: no such file"),
    ("image_missing", image("dangling.png"), r"dangling\.png: no such file"),
    ("image_missing", image("cat.png/x.png"), r"cat\.png/x\.png: no such file"),
    ("image_missing", image("x" * 300 + ".png"), r"x\.png: cannot be read \(file name too long\)"),
    ("image_missing", image("loop.png"), r"loop\.png: cannot be read \(too many levels of symbolic links\)"),
    ("image_path", image("../cat.png"), r"\.\./cat\.png: leaves the images root"),
    ("image_path", image("/etc/passwd"), r"/etc/passwd: leaves the images root"),
    ("image_path", image("link.png"), r"link\.png: leaves the images root"),
    ("image_path", image("linked/x.png"), r"linked/x\.png: leaves the images root"),
    ("image_path", image("https://example.org/cat.png"), r"is an address; nothing is fetched"),
    ("image_path", image("data:image/png;base64,AAAA"), r"is an address; nothing is fetched"),
    ("bad_text", image("a\0b.png"), r"'images\[0\]': holds a NUL character"),
    ("image_broken", image("zero.png"), r"zero\.png: is empty"),
    ("image_broken", image("text.png"), r"text\.png: cannot be decoded \(none of PNG, JPEG, "),
    ("image_broken", image("cut.png"), r"cut\.png: cannot be decoded"),
    ("image_broken", image("cut.jpg"), r"cut\.jpg: cannot be decoded"),
    ("image_broken", image("cut.webp"), r"cut\.webp: cannot be decoded"),
    ("image_broken", image("folder.png"), r"folder\.png: is a folder"),
    ("image_broken", image("pipe.png"), r"pipe\.png: is no regular file"),
    ("image_broken", image("program.png"), r"program\.png: cannot be decoded \(none of PNG, JPEG, "),
    ("image_size", image("bomb.png"), r"bomb\.png: too large: .*; at most 89,478,485 pixels"),
    ("image_size", image("large.png"), r"large\.png: too large: 10000 x 10000"),
    ("image_size", image("thin.png"), r"thin\.png: is 4000 x 10: one side more than 200 times the other"),
    # gold answers
    ("gold_malformed", solution(""), r"'solution': malformed \(empty\)"),
    ("gold_malformed", solution("[0]"), r"'solution': malformed \(missing_tag\)"),
    ("gold_malformed", gold("0,"), r"'solution': malformed \(bad_id_list\)"),
    ("gold_malformed", gold("-1"), r"'solution': malformed \(bad_id_list\)"),
    ("gold_malformed", solution(ANSWER.format("0", "") + " so"), r"'solution': malformed \(text_outside\)"),
    ("gold_malformed", gold("1234567890"), r"'solution': malformed \(bad_id_list\)"),
    ("gold_outside", gold("0, 4"), r"utterance ids \[4\] are outside the dialogue, which has 4"),
    ("gold_outside", gold("1", "0, 5"), r"image ids \[5\] are outside the dialogue, which has 2"),
    ("gold_repeated", gold("1, 1"), r"utterance ids repeat: \[1, 1\]"),
    ("gold_repeated", gold("1", "0, 0"), r"image ids repeat: \[0, 0\]"),
    ("gold_differs", lambda row: row.update(solution=ANSWER.format("0", "")), r"the assistant's message is not the"),
]


@pytest.mark.parametrize(("kind", "damage", "message"), ROWS, ids=[f"{n}-{row[0]}" for n, row in enumerate(ROWS)])
def test_a_broken_row(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    damage: Callable[[Row], Any],
    message: str,
) -> None:
    rows = [good_row(number) for number in range(3)]
    damage(rows[1])
    expected = rf"1 row is refused[\s\S]*\n{kind} \(1 row\): .*\n(  row 1: .*\n)*?  row 1: field .*{message}"
    assert_refused(folder, rows, expected, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"rows\.json: no rows in it"),
        (b" \n\n", r"rows\.json: no rows in it"),
        (b"[]", r"rows\.json: no rows in it"),
        (b"[", r"the list is cut off"),
        (b'[{"a": 1}', r"the list is cut off, no closing \] at the end of the file"),
        (b'[{"a": 1},]', r"line 1: not JSON \(Expecting value at column 11\)"),
        (b'[{"a": 1}\n{"b": 2}]', r"line 2: not JSON \(expecting ',' or '\]' at column 1\)"),
        (b'[{"a": 1}] {"b": 2}', r"line 1: not JSON \(something follows the list at column 12\)"),
        (b'[{"a": "b\n"}]', r"not JSON \(Invalid control character"),
        (b'{"a": 1}\n{"a": \n', r"line 2: not JSON"),
        (b'{"a": 1} {"a": 2}\n', r"line 1: not JSON \(Extra data at column 10\)"),
        (b"[3]", r"row 0: found a number, expected an object"),
        (b"[[{}]]", r"row 0: found a list, expected an object"),
        (b'{"a": 1}\nnull', r"row 1: found null, expected an object"),
        (b'"text"', r"row 0: found a text, expected an object"),
        (b'[{"a": ' + b"1" * 5000 + b"}]", r"line 1: not JSON \(a number of thousands of digits at column 2\)"),
        (b'{"a": ' + b"1" * 5000 + b"}", r"line 1: not JSON \(a number of thousands of digits\)"),
        (b'[{"a": "b', r"not JSON \(Unterminated string at column 8\); the file seems cut off, copy it again"),
        (b'{"a": 1}\n{"a": "b', r"line 2: not JSON .*; the file seems cut off, copy it again"),
        ('[{"a": "你'.encode()[:-1], r"not UTF-8 at byte 8; the file seems cut off, copy it again"),
        ('[{"a": "你好"}]'.encode("gbk"), r"not UTF-8 at byte 8; convert it, for example with iconv"),
        (b'{\n "a": 1\n}', r"line 1: not JSON .*; a file is a JSON list, or JSONL with one row a line"),
        (b"[" * 100_000, r"nested too deeply|line 1: not JSON"),
        (b'{"a": ' * 100_000, r"nested too deeply|line 1: not JSON"),
        (b"\x00\x01\x02", r"UTF-16 or another encoding with NUL bytes; convert it"),
        (b'["\xff"]', r"not UTF-8 at byte 2; convert it"),
        (b'{"a": 1}\n{"a": "\xe9"}\n', r"line 2: not UTF-8 at byte 7 of it"),
        (json.dumps([{"a": 1}]).encode("utf-16"), r"UTF-16 .*; convert it"),
        (json.dumps([{"a": 1}]).encode("utf-16-le"), r"UTF-16 .*; convert it"),
        (gzip.compress(json.dumps([{"a": 1}]).encode("utf-16")), r"UTF-16 .*; convert it"),
        (gzip.compress(b'[{"a": 1}]')[:-9], r"broken gzip file"),
        (b"\x1f\x8bnonsense", r"broken gzip file"),
        (gzip.compress(b'[{"a": 1}]') + b"more", r"broken gzip file"),
        (gzip.compress(gzip.compress(b"[]")), r"not UTF-8"),
        (
            b"PAR1" + bytes(60),
            r"rows\.json: a parquet file, which training, infer and score read; give the rows as a JSON list or JSONL",
        ),
        (b"PK\x03\x04" + bytes(60), r"rows\.json: a zip file; unpack it first"),
        (bz2.compress(b"[]"), r"rows\.json: a bzip2 file; unpack it first"),
        (lzma.compress(b"[]"), r"rows\.json: an xz file; unpack it first"),
        (b"\x28\xb5\x2f\xfd" + bytes(60), r"rows\.json: a zstd file; unpack it first"),
    ],
    ids=itertools.count(),  # gzip writes the time
)
def test_a_broken_file(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    message: str,
) -> None:
    assert_refused(folder, content, message, monkeypatch, capsys)


def test_damage_behind_good_rows_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More rows than a row group holds have been written to the temporary files by then."""
    text = json.dumps([good_row(number) for number in range(1200)]).encode()
    assert_refused(folder, text[:-40], "line 1: not JSON", monkeypatch, capsys)


def test_damage_in_the_middle_of_an_image_is_found_when_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = good_row()
    row["images"][0] = "middle.png"
    assert run(folder, [row], monkeypatch) == 0
    shutil.rmtree(folder / "out")
    assert_refused(
        folder, [row], r"image_broken.*[\s\S]*middle\.png: cannot be decoded", monkeypatch, capsys, "--decode"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cmyk.jpg", r"image_odd .*\n.*cmyk\.jpg: colours of mode CMYK"),
        ("deep.png", r"image_odd .*\n.*deep\.png: colours of mode I;16; they may come out wrong"),
        ("moving.gif", r"image_odd .*\n.*moving\.gif: animated; the model sees the first frame only"),
    ],
)
def test_odd_images_are_warnings(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    row = good_row()
    row["images"][0] = name
    assert run(folder, [row], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert re.search(message, shown)
    assert_documented(shown)
    assert pq.read_metadata(folder / "out" / "t.rl.parquet").num_rows == 1


def test_a_photograph_with_a_preview_is_no_animation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = good_row()
    image("preview.jpg")(row)
    assert run(folder, [row], monkeypatch, "--report", str(folder / "r.json")) == 0
    assert json.loads((folder / "r.json").read_text())["problems"] == {}


def test_a_second_query_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = good_row()
    replace("Give the ids.", "<|query_start|>the dog<|query_end|>")(row)
    assert run(folder, [row], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert re.search(r"several_queries \(1 row\)[\s\S]*2 <\|query_start\|>; the query is taken to be 'the cat'", shown)
    assert_documented(shown)


def test_instructions_behind_the_dialogue_may_show_the_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = good_row()
    user(row)["content"] += "\nAnswer as <|utt_ids_start|>[ids]<|utt_ids_end|>;<|img_ids_start|>[ids]<|img_ids_end|>"
    assert run(folder, [row], monkeypatch) == 0


def test_images_of_the_gold_that_do_not_fit_its_utterances_are_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = good_row()
    gold("1, 2", "1")(row)
    assert run(folder, [row], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "gold_images (1 row)" in shown
    assert "images [1] are gold, their utterances are not" in shown
    assert "images [0] are not gold, their utterances are" in shown


def test_all_problems_of_a_row_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = good_row()
    image("no.png")(row)
    image("../x.png", 1)(row)
    gold("9")(row)
    replace("sweet", "a <video>")(row)
    assert run(folder, [row], monkeypatch) == 2
    error = capsys.readouterr().err
    for kind in ("image_missing", "image_path", "gold_outside", "bad_text"):
        assert f"{kind} (1 row)" in error


def test_what_is_left_of_a_row_is_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing field hides nothing that is wrong with the others."""
    no_images, no_query, no_messages = (good_row(number) for number in range(3))
    no_images.pop("images")
    gold("9")(no_images)
    replace("<|query_start|>", "")(no_query)
    solution("[0]")(no_query)
    no_messages.update(messages=None, solution="[1]", dialogue_id=None)
    image("no.png")(no_messages)
    rows = [no_images, no_query, no_messages]
    assert run(folder, rows, monkeypatch, "--report", str(folder / "r.json")) == 2
    found = json.loads((folder / "r.json").read_text())["problems"]
    assert {(problem["row"], name) for name, kind in found.items() for problem in kind["first"]} == {
        *((0, name) for name in ("missing_field", "gold_outside")),
        *((1, name) for name in ("no_dialogue", "gold_malformed")),
        *((2, name) for name in ("missing_field", "gold_malformed", "image_missing")),
    }


def test_rows_that_repeat_or_contradict_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again, other, same_id = good_row(1), good_row(1), good_row(2)
    gold("2")(other)
    same_id["dialogue_id"] = "d1"
    assert run(folder, [good_row(1), again, same_id], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert re.search(r"repeated_row \(1 row\): .*\n  row 1: .*row 0 asks the same of this dialogue", shown)
    assert re.search(r"same_id \(1 row\): .*\n  row 2: .*d1 was the id of another dialogue", shown)
    shutil.rmtree(folder / "out")
    message = r"contradiction \(1 row\)[\s\S]*row 1: .*row 0 asks the same of this dialogue and has another answer"
    assert_refused(folder, [good_row(1), other], message, monkeypatch, capsys)


def test_dialogues_of_another_split(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, [good_row(1), good_row(2)], monkeypatch) == 0
    kept = [folder / f"other.{kind}.parquet" for kind in ("rl", "sft")]
    for file, new in zip(sorted((folder / "out").iterdir()), kept, strict=True):
        file.rename(new)
    (folder / "out").rmdir()
    renamed = good_row(2)
    renamed["dialogue_id"] = "another name"
    for file in kept:
        message = r"other_split \(1 row\)[\s\S]*row 1: .*dialogue another name is in .*other\.(rl|sft)\.parquet too"
        rows = [good_row(3), renamed]
        assert_refused(folder, rows, message, monkeypatch, capsys, "--against", str(file))
    assert run(folder, [good_row(3)], monkeypatch, "--against", str(kept[0])) == 0
    shutil.rmtree(folder / "out")
    for against, message in ((folder / "no.parquet", "no such file"), (folder / "cat.png", "not a parquet file")):
        assert_refused(folder, [good_row()], f"--against .*{message}", monkeypatch, capsys, "--against", str(against))


def test_too_many_images(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    message = r"too_many_images \(1 row\)[\s\S]*2 images, at most 1"
    assert_refused(folder, [good_row()], message, monkeypatch, capsys, "--max-images", "1")


def test_skip_invalid_writes_the_others_and_the_reasons(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [good_row(number) for number in range(4)]
    image("no.png")(rows[1])
    gold("9")(rows[3])
    replace("sweet", "\ud83d")(rows[3])
    before = copy.deepcopy(rows)
    report = folder / "reports" / "r.json"
    assert run(folder, rows, monkeypatch, "--skip-invalid", "--report", str(report)) == 0
    shown = capsys.readouterr().out
    assert "image_missing (1 row)" in shown
    table = pq.read_table(folder / "out" / "t.rl.parquet").to_pylist()
    assert [row["extra_info"]["dialogue_id"] for row in table] == ["d0", "d2"]
    assert [row["extra_info"]["index"] for row in table] == [0, 1]
    rejected = [json.loads(line) for line in (folder / "out" / "t.rejected.jsonl").read_text().splitlines()]
    assert [record["row"] for record in rejected] == [1, 3]
    assert [record["content"] for record in rejected] == [before[1], before[3]]
    assert rejected[0]["problems"][0]["kind"] == "image_missing"
    found = json.loads(report.read_text())
    assert (found["rows_written"], found["rows_rejected"]) == (2, 2)
    assert found["problems"]["image_missing"]["first"][0]["row"] == 1
    assert found["statistics"]["rows"] == 2
    assert run(folder, [good_row()], monkeypatch) == 2
    told = capsys.readouterr().err
    assert "t.rl.parquet: is there already; choose another --split, or replace it with --force" in told
    assert run(folder, [good_row()], monkeypatch, "--force") == 0
    assert not (folder / "out" / "t.rejected.jsonl").exists(), "it spoke of the earlier rows"
    image("no.png")(rows[0])
    for options in (["--skip-invalid", "--force"], ["--force"]):
        assert run(folder, rows[:2], monkeypatch, *options) == 2
        told = capsys.readouterr().err
        assert "2 rows are refused, none is left" in told
        assert "writes the others" not in told


def test_the_report_is_written_when_rows_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = good_row()
    image("no.png")(row)
    message = "1 row is refused"
    assert_refused(folder, [row], message, monkeypatch, capsys, "--report", str(folder / "r.json"))
    found = json.loads((folder / "r.json").read_text())
    assert (found["rows_written"], found["rows_rejected"], found["statistics"]) == (0, 1, None)
    assert found["problems"]["image_missing"]["mend"]


@pytest.mark.parametrize("content", [b"", b"[3]", json.dumps([good_row()]).encode()[:-20]])
def test_the_report_says_why_a_file_was_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """Nothing in it would read as if all had been well."""
    assert run(folder, content, monkeypatch, "--report", str(folder / "r.json")) == 2
    found = json.loads((folder / "r.json").read_text())
    assert f"ffr-verl: error: {found['error']}\n" == capsys.readouterr().err
    assert (found["rows_written"], found["statistics"]) == (0, None)


def test_the_report_is_written_when_an_option_is_wrong(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--report", str(folder / "r.json"), "--against", str(folder / "no.parquet"))
    assert_refused(folder, [good_row()], "no such file", monkeypatch, capsys, *options)
    assert "no.parquet: no such file" in json.loads((folder / "r.json").read_text())["error"]
    assert run(folder, [good_row()], monkeypatch, "--report", str(folder / "r.json")) == 0
    assert json.loads((folder / "r.json").read_text())["error"] is None


def test_problems_of_rows_before_the_damage_are_told_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = good_row()
    image("no.png")(row)
    content = json.dumps([row, good_row(1)]).encode()[:-20]
    message = (
        r"seems cut off[\s\S]*rows before it have problems too:\nimage_missing \(1 row\)[\s\S]*no\.png: no such file"
    )
    assert_refused(folder, content, message, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--language", "en"], "--language: MLDR rows bring their prompts"),
        (
            ["--format", "dialogue", "--language", "en", "--template", "t.yaml"],
            "--language and --template: give one of",
        ),
        (["--format", "dialogue", "--template", "no.yaml"], r"no\.yaml: No such file"),
        (["--captions"], "--captions: MLDR rows bring their prompts"),
        (["--stride", "3"], "--stride goes with --window TURNS"),
        (["--max-prompt-tokens", "9"], "--max-prompt-tokens needs --tokenizer, which counts them"),
        (["--window", "3"], "--window needs --window-ids: global .* or published"),
        (["--window", "3", "--stride", "4", "--window-ids", "global"], "--stride: found 4; give 1 to 3"),
        (["--tokenizer", "./no/such"], "--tokenizer ./no/such: .*give a model's folder"),
    ],
)
def test_options_that_do_not_fit(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert_refused(folder, [good_row()], message, monkeypatch, capsys, *options)


RAW: Row = {
    "dialogue_id": "w1",
    "dialogue": [
        {"utterance_idx": 1, "speaker": "Ann", "utterance": "look at him"},
        {"utterance_idx": 2, "speaker": "Ann", "utterance": [{"image_url": "cat.png", "caption": "a cat"}]},
    ],
    "query_text": "the cat",
    "gt_turns": [2],
}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("missing_field", {"dialogue": []}, r"'dialogue': missing or empty"),
        ("missing_field", {"dialogue": "hi"}, r"'dialogue': missing or empty"),
        ("wrong_type", {"dialogue": ["hi"]}, r"'dialogue\[0\]': found 'hi', expected an object"),
        ("missing_field", {"dialogue": [{"speaker": "a"}]}, r"'dialogue\[0\]\.utterance': missing"),
        ("wrong_type", {"dialogue": [{"utterance": 3}]}, r"'dialogue\[0\]\.utterance': found 3, expected a text"),
        ("wrong_type", {"dialogue": [{"utterance": [3]}]}, r"utterance\[0\]': found 3, expected a text or"),
        ("wrong_type", {"dialogue": [{"utterance": [{"url": "x"}]}]}, r"utterance\[0\]': found \{'url': 'x'\}"),
        ("bad_text", {"dialogue": [{"utterance": "an <image> tag"}]}, r"'dialogue\[0\]\.utterance': holds <image>"),
        ("bad_text", {"dialogue": [{"utterance": "x<|im_end|>"}]}, r"holds <\|im_end\|>"),
        ("bad_text", {"dialogue": [{"utterance": "x\0"}]}, r"holds a NUL character"),
        ("wrong_type", {"dialogue": [{"utterance": "x", "speaker": None}]}, r"speaker': found None, expected a text"),
        (
            "utterance_ids",
            {"dialogue": [{"utterance": "x", "utterance_idx": "1"}]},
            r"_idx': found '1', expected a whole",
        ),
        (
            "utterance_ids",
            {"dialogue": [{"utterance": "x", "utterance_idx": 3}, {"utterance": "y", "utterance_idx": 3}]},
            r"'dialogue\[1\]\.utterance_idx': found 3, expected a whole number above 3",
        ),
        ("image_missing", {"dialogue": [{"utterance": [{"image_url": "no.png"}]}]}, r"no\.png: no such file"),
        ("missing_field", {"dialogue_id": None}, r"'dialogue_id': missing"),
        ("missing_field", {"query_text": ""}, r"'query_text': empty"),
        ("wrong_type", {"query_text": None}, r"'query_text': found None, expected a text"),
        ("bad_text", {"query_text": "a <|query_end|>"}, r"'query_text': holds <\|query_end\|>"),
        ("wrong_type", {"query_text": ["a", "b", "c"]}, r"'gt_turns': expected 3 lists"),
        ("gold_outside", {"gt_turns": [3]}, r"'gt_turns': \[3\] are no utterance_idx of the dialogue"),
        ("gold_repeated", {"gt_turns": [1, 1]}, r"'gt_turns': turns repeat: \[1, 1\]"),
        ("wrong_type", {"gt_turns": "1"}, r"'gt_turns': found '1', expected a list of utterance_idx"),
        ("wrong_type", {"gt_turns": [True]}, r"'gt_turns': found \[True\]"),
        ("wrong_type", {"queries": {}}, r"'queries': expected a list of"),
        ("missing_field", {"queries": []}, r"'queries': empty"),
        ("missing_field", {"query_text": [], "gt_turns": []}, r"'queries': empty"),
        ("wrong_type", {"queries": [{"gt_turns": [1]}]}, r"'queries\[0\]\.query_text': found None"),
        (
            "contradiction",
            {"query_text": ["a", "a"], "gt_turns": [[1], [2]]},
            r"row 1 asks the same of this dialogue and has another answer",
        ),
    ],
)
def test_a_broken_dialogue(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    change: Row,
    message: str,
) -> None:
    rows = [{**RAW, "dialogue_id": "w0"}, {**RAW, **change}]
    expected = rf"1 row is refused[\s\S]*\n{kind} \(1 row\): .*\n(  row 1: .*\n)*?  row 1: field .*{message}"
    assert_refused(folder, rows, expected, monkeypatch, capsys, "--format", "dialogue")


def test_all_that_is_wrong_with_a_dialogue_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [3, {"utterance": [{"image_url": "no.png"}, {"image_url": "../x.png"}, {"image_url": "zero.png"}]}]
    rows = [{"dialogue": turns, "query_text": "", "gt_turns": [7]}, {"dialogue": []}]
    message = "2 rows are refused"
    assert run(folder, rows, monkeypatch, "--format", "dialogue", "--report", str(folder / "r.json")) == 2
    assert message in capsys.readouterr().err
    found = json.loads((folder / "r.json").read_text())["problems"]
    told = {(problem["row"], problem["field"]) for kind in found.values() for problem in kind["first"]}
    assert told == {
        *((0, field) for field in ("dialogue[0]", "images[0]", "images[1]", "images[2]", "query_text", "gt_turns")),
        (0, "dialogue_id"),
        *((1, field) for field in ("dialogue_id", "dialogue", "query_text", "gt_turns")),
    } - {(1, "gt_turns"), (1, "dialogue_id")}, "two problems of a kind are kept of a row"


def test_a_problem_of_several_queries_is_told_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {**RAW, "query_text": ["a", "b", "c"], "gt_turns": [[1], [2], []]}
    assert run(folder, [row], monkeypatch, "--format", "dialogue", "--max-images", "0") == 2
    assert capsys.readouterr().err.count("1 images, at most 0") == 1


VALUES: list[Any] = [
    None, True, 0, -1, 1.5, float("nan"), 10**30, "", "x", "\0", "\ud800", "a: b", "\n", "<image>", "cat.png", "../x",
    "<|utt_id_start|>9<|utt_id_end|>", "<|query_start|>q<|query_end|>", [], {}, [1], ["x"], [[]], {"path": None},
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container in a row with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@pytest.mark.parametrize("kind", ["mldr", "dialogue"])
def test_no_damage_ends_in_a_traceback(folder: Path, kind: str) -> None:
    source, path = random.Random(kind), folder / "rows.json"
    refused = 0
    for _ in range(80):
        row = copy.deepcopy(good_row() if kind == "mldr" else RAW)
        for _ in range(source.randint(1, 2)):
            container, key = source.choice(places(row))
            container[key] = copy.deepcopy(source.choice(VALUES))
        content = bytearray(json.dumps([row, row]).encode())
        if source.random() < 0.2:
            content[source.randrange(len(content))] = source.randrange(256)
        path.write_bytes(bytes(content))
        options: dict[str, Any] = {"images_root": folder, "output": folder / "out", "split": "t"}
        try:
            prepare(path, source_format=kind, report=folder / "r.json", **options)
        except FFRError as error:
            refused += 1
            assert_documented(f"ffr-verl: error: {error}")
        with contextlib.suppress(FFRError):
            Console(file=io.StringIO()).print(render_row(path, 0, root=folder))
    assert 30 < refused < 80


def test_rows_of_the_other_format_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = r"rows with messages need --format mldr"
    assert_refused(folder, [good_row()], message, monkeypatch, capsys, "--format", "dialogue")
    message = r"rows with dialogue need --format dialogue"
    assert_refused(folder, [RAW], message, monkeypatch, capsys, "--format", "mldr")


def test_messages_of_other_places_are_in_the_docs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(folder, [good_row()], monkeypatch) == 0
    (folder / "out" / "t.rl.parquet").rename(folder / "good.rl.parquet")
    (folder / "out" / "t.sft.parquet").rename(folder / "good.sft.parquet")
    rl, sft = str(folder / "good.rl.parquet"), str(folder / "good.sft.parquet")
    pq.write_table(pq.read_table(rl).replace_schema_metadata({}), folder / "bare.parquet")
    raw = folder / "raw.jsonl"
    raw.write_text(json.dumps(RAW) + "\n" + json.dumps({**RAW, "dialogue": []}))
    row = good_row()
    image("middle.png")(row)
    assert run(folder, [row], monkeypatch, "--embed-images") == 0
    calls: list[Callable[[], Any]] = [
        lambda: check_columns([sft], "rl"),
        lambda: check_columns(["no.parquet"], "rl"),
        lambda: check_columns([str(folder / "cat.png")], "rl"),
        lambda: images_root([str(folder / "bare.parquet")], DataConfig()),
        lambda: check_images([rl], folder / "out", sample=False),
        lambda: check_images([str(folder / "out" / "t.rl.parquet")], folder, sample=True),
        lambda: DataConfig.from_mapping({"max_pixel": 1}),
        lambda: DataConfig.from_mapping({"max_pixels": 0}),
        lambda: render_row(folder / "no.json", 0),
        lambda: render_row(Path(rl), 7),
        lambda: render_row(raw, 1),
        lambda: render_row(folder / "bad.json", 0),
        lambda: build(raw, folder / "x", dialogues=1, settings=ComposeSettings()),
        lambda: build(folder / "bad.json", folder / "x", dialogues=1, settings=ComposeSettings()),
        lambda: ComposeSettings(topics=0),
        lambda: WindowSettings(0, 1, "global"),
    ]
    (folder / "bad.json").write_text('[{"messages": []}]')
    for call in calls:
        with pytest.raises(FFRError) as told:
            call()
        message = re.sub(r"(row \d+: )[\w\[\].]+: (?=missing or empty)", r"\1field 'dialogue': ", str(told.value))
        assert any(re.fullmatch(f"(.*?: )?{documented}", message) for documented in MESSAGES), message


def test_every_kind_has_its_mend_and_its_line_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert not [kind.value for kind in ProblemKind if f"| `{kind.value}` |" not in text]
