"""Asking a chat: what is asked, what is printed, the page, and what is said of answers that are none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, completion, fake_server, user_text
from PIL import Image
from typer.testing import CliRunner

from ffr_verl import cli
from ffr_verl.data.prepare import prepare
from ffr_verl.data.windows import WindowSettings
from ffr_verl.dialogues import parse_dialogue
from ffr_verl.fragments import Fragment, format_fragment
from ffr_verl.inference.rows import AskedRows

QUERY = "where do we talk about the garden?"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as fake:
        yield fake


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """A raw dialogue of 6 turns with a picture in turns 2 and 4, and one of 2 turns."""
    for number, colour in enumerate(["red", "green"]):
        Image.new("RGB", (56, 56), colour).save(tmp_path / f"{number}.png")
    told: list[Any] = ["hello", "the garden?", ["look", {"image_url": "0.png"}], "<b>roses</b> & more\x1b[31m",
                       [{"image_url": "1.png"}], "bye"]  # fmt: skip
    first = [{"speaker": "Ann" if number % 2 else "Ben", "utterance": one} for number, one in enumerate(told)]
    rows = [{"dialogue_id": "long", "dialogue": first}, {"dialogue_id": "short", "dialogue": first[:2]}]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    return tmp_path / "chat.json"


def answer(utterances: list[int], images: list[int]) -> Any:
    return completion(format_fragment(Fragment(tuple(utterances), tuple(images))))


def turns_of(body: dict[str, Any]) -> list[int]:
    dialogue = parse_dialogue([{"role": "user", "content": user_text(body)}], "d")
    return [utterance.id for utterance in dialogue.utterances]


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr, or the message of the error."""
    result = CliRunner().invoke(cli.app, ["ask", *map(str, arguments)])
    message = "" if result.exception is None or isinstance(result.exception, SystemExit) else str(result.exception)
    return result.exit_code, result.stdout, message or result.stderr


def test_the_fragment_is_printed_as_a_chat(server: FakeServer, chat: Path) -> None:
    server.reply = lambda body, _: answer([1, 2, 5], [0, 1]) if len(turns_of(body)) == 6 else answer([], [])
    code, out, _ = run("--endpoint", server.url, chat, QUERY)
    assert code == 0
    assert out.splitlines() == [
        QUERY,
        "long, of 6 turns: 3 turns, 2 pictures",
        "    1 Ann: the garden?",
        "    2 Ben: look",
        "      [image 0: 0.png]",
        "      …",
        "    4 Ben:  (its picture only)",
        "      [image 1: 1.png]",
        "    5 Ann: bye",
        "nothing found in 1 dialogue",
        "",
    ]
    assert {body["model"] for body in server.bodies} == {"m"}, "the only model of the server"


def test_prompts_are_those_of_prepare_and_windows_those_of_infer(server: FakeServer, chat: Path) -> None:
    server.reply = lambda body, _: answer(turns_of(body)[-1:], [])
    code, out, _ = run("--endpoint", server.url, "--json", "--window", 4, "--stride", 2, chat, QUERY)
    made = prepare(chat, images_root=chat.parent, output=chat.parent / "out", split="t", unlabelled=True,
                   source_format="dialogue", queries=[QUERY])  # fmt: skip
    rows = list(AskedRows([made.rl_path], window=WindowSettings(4, 2, "global")))
    assert sorted(server.texts()) == sorted([row["prompt"][-1]["content"].replace("<image>", "") for row in rows])
    assert code == 0
    first, second = map(json.loads, out.splitlines())
    assert (first["utterances"], first["images"], first["query"], first["dialogue_id"]) == ([3, 5], [], QUERY, "long")
    assert [turn["text"] for turn in first["turns"]] == ["<b>roses</b> & more\x1b[31m", "bye"]
    assert (second["utterances"], second["error"], second["malformed"]) == ([1], None, [])


def test_many_queries_in_any_format(server: FakeServer, chat: Path, demo_set: Path) -> None:
    """Rows with prompts too: their dialogues are asked, once each, and their queries are not."""
    (chat.parent / "queries.txt").write_text("one\n\ntwo\none\n")
    rows = json.loads((demo_set / "heldout.json").read_text())
    server.reply = lambda body, _: answer([0], [])
    code, out, told = run("--endpoint", server.url, "--json", "--queries", chat.parent / "queries.txt",
                          demo_set / "heldout.json", "three")  # fmt: skip
    found = [json.loads(line) for line in out.splitlines()]
    dialogues = len({(row["messages"][1]["content"].partition("<|query_end|>")[2]) for row in rows})
    assert code == 0, told
    assert [one["query"] for one in found] == [name for name in ("three", "one", "two") for _ in range(dialogues)]
    queries = {parse_dialogue([{"role": "user", "content": text}], "d").query for text in server.texts()}
    assert queries == {"one", "two", "three"}


def test_an_export_of_80_turns_in_one_command(server: FakeServer, chat: Path) -> None:
    export = {"name": "us", "type": "personal_chat", "id": 1, "messages": [
        {"id": number, "type": "message", "date": "2024-05-01T10:00:00", "from": "Ann: A", "from_id": "1",
         "text": f"turn {number}"} for number in range(80)]}  # fmt: skip
    (chat.parent / "result.json").write_text(json.dumps(export))
    server.reply = lambda body, _: answer([one for one in turns_of(body) if one % 39 == 0], [])
    code, out, _ = run("--endpoint", server.url, chat.parent / "result.json", QUERY)
    assert (code, len(server.bodies)) == (0, 3), "windows of 40 turns"
    assert out.splitlines()[1:3] == ["us, of 80 turns: 3 turns, 0 pictures", "    0 Ann:A: turn 0"]
    assert out.splitlines()[3:] == ["      …", "   39 Ann:A: turn 39", "      …", "   78 Ann:A: turn 78", ""]


def test_what_is_no_answer_is_said_with_the_raw_text(server: FakeServer, chat: Path) -> None:
    def reply(body: dict[str, Any], _: int) -> Any:
        return completion("it is \x1b[5m in turn 3") if len(turns_of(body)) == 6 else answer([1, 9], [0])

    server.reply = reply
    code, out, _ = run("--endpoint", server.url, chat, QUERY)
    assert code == 0
    assert "the answer is not in the format; as written: it is \\x1b[5m in turn 3" in out
    assert "ids that the model was not shown: utterances 9; images 0" in out
    assert "    1 Ann: the garden?" in out
    server.reply = lambda body, _: (400, {"error": {"message": "too long"}}, {})
    assert run("--endpoint", server.url, chat, QUERY)[0::2] == (1, "there is no answer: 400: too long")


def test_one_window_without_an_answer(server: FakeServer, chat: Path) -> None:
    """The others' fragment counts; an image that one window names unseen is not outside the dialogue."""

    def reply(body: dict[str, Any], number: int) -> Any:
        return (400, {"error": {"message": "no"}}, {}) if 5 in turns_of(body) else answer([1], [0])

    server.reply = reply
    code, out, _ = run("--endpoint", server.url, "--window", 4, "--stride", 2, chat, QUERY)
    assert code == 0
    assert "1 Ann: the garden?" in out
    assert "no answer: 1 of 2 windows have no answer: 400: no" in out


def test_the_page(server: FakeServer, chat: Path) -> None:
    server.reply = lambda body, _: answer([3], [0]) if len(turns_of(body)) == 6 else answer([], [])
    page = chat.parent / "found.html"
    code, out, _ = run("--endpoint", server.url, "--html", page, chat, "<script>alert(1)</script>", "roses")
    assert code == 0, out
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&lt;b&gt;roses&lt;/b&gt; &amp; more" in text
    lit = re.findall(r'<li class="turn[^"]*hit" id="turn-(\d+)-(\d+)">', text)
    assert lit == [("0", "3"), ("1", "3")]
    assert text.count('<figure class="picture hit">') == 2
    assert text.count('src="data:image/webp;base64,') == 4
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(re.findall(r'id="([^"]+)"', text))
    assert "is there already" in run("--endpoint", server.url, "--html", page, chat, "roses")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["CHAT"], "no query; give one"),
        (["none.json", "x"], "none.json: no such file"),
        (["EMPTY", "x", "--format", "telegram"], "no messages in it"),
        (["NONE", "x"], "no dialogue in it, read as mldr"),
        (["CHAT", "put <image> there"], "the query 'put <image> there' holds <image>"),
        (["CHAT", " "], "the query '' is empty"),
        (
            ["CHAT", "x", "--queries", "none.txt"],
            "--queries none.txt: No such file or directory; give a UTF-8 text with one query a line",
        ),
        (["CHAT", "x", "--max-images", "1"], "2 images, at most 1; raise --max-images"),
        (["CHAT", "x", "--images-root", "none"], "--images-root: none: no such folder"),
        (["CHAT", "x", "--images-root", "."], "image_missing"),
        (["CHAT", "x", "--lora", "a"], "--lora is the server's business"),
        (["CHAT", "x", "--html", "CHAT"], "is read by this command"),
    ],
)
def test_bad_input_asks_nothing(server: FakeServer, chat: Path, arguments: list[str], message: str) -> None:
    (chat.parent / "empty.json").write_text('{"name": "us", "type": "personal_chat", "id": 1, "messages": []}')
    (chat.parent / "none.json").write_text("[]")
    places = {"CHAT": str(chat), "EMPTY": str(chat.parent / "empty.json"), "NONE": str(chat.parent / "none.json")}
    code, _, told = run("--endpoint", server.url, *[places.get(one, one) for one in arguments])
    assert code == 1
    assert message in told
    assert not server.bodies


def test_a_server_with_several_models_is_asked_for_none(server: FakeServer, chat: Path) -> None:
    server.models = ["a", "b"]
    assert "2 models, such as a, b; give --model NAME" in run("--endpoint", server.url, chat, QUERY)[2]
