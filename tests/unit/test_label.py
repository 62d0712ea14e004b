"""Labels by a language model: what is asked, what of its answers is refused, what is written, and a resume."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_server import FakeServer, completion, failure, fake_server, user_text
from PIL import Image
from typer.testing import CliRunner

from ffr_verl import cli
from ffr_verl.data.prepare import prepare
from ffr_verl.dialogues import Dialogue, Utterance, parse_dialogue
from ffr_verl.errors import FFRError
from ffr_verl.fragments import Fragment
from ffr_verl.inference.journal import journal_folder
from ffr_verl.inference.labels import LabelPrompts, read_labels

GOOD: dict[str, Any] = {
    "queries": [
        {"topic": "roses", "query": "planting roses", "utterances": [1, 2], "images": [0]},
        {"topic": "bye", "query": "the farewell", "utterances": [3], "images": []},
    ],
    "negatives": ["buying a car"],
}
DIALOGUE = Dialogue("d", (Utterance(0, "a", "hi"), Utterance(1, "a", "see", (0,)), Utterance(2, "b", "ok")), "?")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as fake:
        fake.reply = lambda body, number: completion(json.dumps(GOOD))
        yield fake


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """Three raw dialogues of four turns, with a picture in the second; the last one is Chinese."""
    Image.new("RGB", (56, 56), "red").save(tmp_path / "0.png")
    rows = [
        {
            "dialogue_id": name,
            "dialogue": [
                {"speaker": "Ann" if number % 2 else "Ben", "utterance": one}
                for number, one in enumerate([hello, [{"image_url": "0.png", "caption": "a rose"}], "rose", name])
            ],
        }
        for name, hello in (("one", "hello"), ("two", "the garden"), ("three", "我们在花园里种玫瑰吧" * 3))
    ]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    return tmp_path / "chat.json"


def run(chat: Path, server: FakeServer, *arguments: object) -> tuple[int, str]:
    """Exit status, and what is printed, or the message of the error."""
    command = ["label", str(chat), "--output", str(chat.parent / "made.jsonl"), "--endpoint", server.url]
    result = CliRunner().invoke(cli.app, [*command, "--retries", "0", *map(str, arguments)])
    message = "" if result.exception is None or isinstance(result.exception, SystemExit) else str(result.exception)
    return result.exit_code, message or " ".join(result.stdout.split())


def rows_of(chat: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (chat.parent / "made.jsonl").read_text().splitlines()]


def test_the_rows_are_those_that_prepare_reads(server: FakeServer, chat: Path) -> None:
    code, out = run(chat, server)
    assert code == 0, out
    assert "accepted at try 1 │ 3 " in out
    assert "share accepted │ 100.0% " in out
    assert [row["dialogue_id"] for row in rows_of(chat)] == [name for name in ("one", "two", "three") for _ in "123"]
    assert [row.get("topic") for row in rows_of(chat)][:3] == ["roses", "bye", None]
    made = prepare(chat.parent / "made.jsonl", images_root=chat.parent, output=chat.parent / "out", split="t")
    assert (made.source_format, made.rows, dict(made.problems.rows)) == ("mldr", 9, {})
    raw = json.loads(chat.read_text())
    for one in raw:
        one["queries"] = [
            {"query_text": label["query"], "gt_turns": label["utterances"]}
            for label in [*GOOD["queries"], {"query": GOOD["negatives"][0], "utterances": []}]
        ]
    chat.write_text(json.dumps(raw))
    same = prepare(chat, images_root=chat.parent, output=chat.parent / "out", split="t2", source_format="dialogue")
    labelled, by_hand = ([{**row, "extra_info": {**row["extra_info"], "split": ""}} for row in
                          pq.read_table(path).to_pylist()] for path in (made.rl_path, same.rl_path))  # fmt: skip
    assert labelled == by_hand


def test_what_is_asked(server: FakeServer, chat: Path) -> None:
    """In the dialogue's language, with pictures, or their captions."""
    assert run(chat, server, "--queries", 7, "--concurrency", 1)[0] == 0
    english, _, chinese = server.texts()
    assert "7 where it has so many" in english
    assert "话题" in chinese
    assert [utterance.text for utterance in parse_dialogue([{"role": "user", "content": "<|query_start|>?<|query_end|>"
            + english}], "d").utterances] == ["hello", "", "rose", "one"]  # fmt: skip
    assert all(any(part["type"] == "image_url" for part in body["messages"][1]["content"]) for body in server.bodies)
    assert "a rose" not in english
    assert run(chat, server, "--text-only", "--force", "--concurrency", 1)[0] == 0
    text = server.bodies[-1]["messages"][1]["content"]
    assert "<|img_id_start|>0<|img_id_end|><|caption_start|>a rose<|caption_end|>" in text
    assert "a rose" not in json.dumps(rows_of(chat))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda good: good["queries"][0].update(utterances=[1, 9]), "queries[0]: utterances [9] are not in the conv"),
        (lambda good: good["queries"][1].update(images=[4]), "queries[1]: images [4] are not in the conversation"),
        (lambda good: good["queries"][0].update(utterances=[1, 1]), "queries[0]: utterances name an id twice"),
        (lambda good: good["queries"][0].update(utterances=[]), "queries[0]: utterances is empty"),
        (lambda good: good["queries"][0].update(utterances=["1"]), "queries[0]: utterances: expected a list of ids"),
        (lambda good: good["queries"][0].update(utterances=[True]), "queries[0]: utterances: expected a list of ids"),
        (lambda good: good["queries"][0].update(utterances=[2]), "queries[0]: images [0] are in none of its utter"),
        (lambda good: good["queries"][0].update(query=" "), "queries[0]: the query is empty"),
        (lambda good: good["queries"][0].update(query="<image>"), "queries[0]: the query holds <image>"),
        (lambda good: good["queries"][0].pop("query"), "queries[0]: expected a text for the query"),
        (lambda good: good["negatives"].append("Planting  ROSES"), "the query 'planting roses' is there twice"),
        (lambda good: good.update(negatives=[]), "0 negatives, expected 1"),
        (lambda good: good.update(queries=[]), "expected a list queries with at least one query"),
        (lambda good: good.update(queries={}), "expected a list queries"),
        (lambda good: good.update(queries=["x"]), "queries[0]: expected an object"),
    ],
)
def test_what_is_refused(change: Callable[[Any], Any], reason: str) -> None:
    good = json.loads(json.dumps(GOOD))
    good["queries"][1]["utterances"] = [0]
    assert len(read_labels(f"Sure!\n```json\n{json.dumps(good)}\n```", DIALOGUE, negatives=1)) == 3
    change(good)
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_labels(json.dumps(good), DIALOGUE, negatives=1)


@pytest.mark.parametrize("text", ["", "no idea", "{", "[1]", '{"queries": [{]}', "}{", "{" * 100_000])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"it is not (a )?JSON"):
        read_labels(text, DIALOGUE)


def test_a_topic_that_fits_into_no_file_and_words_with_braces() -> None:
    text = '{"queries": [{"topic": "a \\ud83d", "query": "q", "utterances": [1]}], "negatives": []} Hope {that} helps'
    (found,) = read_labels(text, DIALOGUE)
    assert found.topic == "a"


def test_ids_come_sorted() -> None:
    text = json.dumps({"queries": [{"query": "a\nb", "utterances": [2, 1], "images": [0]}], "negatives": []})
    (found,) = read_labels(text, DIALOGUE)
    assert (found.query, found.fragment) == ("a b", Fragment((1, 2), (0,)))


def test_wrong_answers_are_asked_for_again_with_the_reason_then_left_out(server: FakeServer, chat: Path) -> None:
    """The first dialogue gets ids outside at first, the second garbage always; the third is refused by the server."""
    outside = json.dumps({**GOOD, "queries": [{"query": "x", "utterances": [7], "images": []}]})

    def reply(body: dict[str, Any], _: int) -> Any:
        first = user_text({"messages": body["messages"][:2]})
        if "Ben: hello" in first:
            return completion(outside if len(body["messages"]) == 2 else json.dumps(GOOD))
        return completion("I <image> would rather not") if "Ben: the garden" in first else failure(400, "too rude")

    server.reply = reply
    code, out = run(chat, server)
    assert code == 0, out
    for told in ("accepted at try 1 │ 0 ", "accepted at try 2 │ 1 ", "accepted at try 3 │ 0 ", "left out │ 2 ",
                 "share accepted │ 33.3% ", "1 left out: it is not JSON", "1 left out: 400: too rude"):  # fmt: skip
        assert told in out
    assert {row["dialogue_id"] for row in rows_of(chat)} == {"one"}
    again = [body["messages"] for body in server.bodies if len(body["messages"]) == 4]
    (outside_again,) = [messages for messages in again if messages[2]["content"] == outside]
    assert outside_again[3]["role"] == "user"
    assert "queries[0]: utterances [7] are not in the conversation" in outside_again[3]["content"]
    assert sorted(len(body["messages"]) for body in server.bodies) == [2, 2, 2, 4, 4, 6]
    assert not journal_folder(chat.parent / "made.jsonl").exists()


def test_a_run_that_was_interrupted_is_resumed(server: FakeServer, chat: Path) -> None:
    """In the second round, and with no question asked twice."""

    def reply(body: dict[str, Any], number: int) -> Any:
        if number < 3:
            return completion("no" if number else json.dumps(GOOD))
        return completion(json.dumps(GOOD)) if number == 3 or number > 4 else failure(503, "busy")

    server.reply = reply
    output = chat.parent / "made.jsonl"
    code, message = run(chat, server, "--concurrency", 1)
    assert code == 1
    assert "1 of 2 dialogues have no answer (503: busy); the others are kept: run the same command again" in message
    assert not output.exists()
    with pytest.raises(FFRError, match="other settings"):
        raise FFRError(run(chat, server, "--temperature", 0.5)[1])
    code, out = run(chat, server)
    assert code == 0, out
    assert "answers of an interrupted run │ 4 " in out
    assert len(server.bodies) == 6
    assert len(rows_of(chat)) == 9
    assert not journal_folder(output).exists()
    assert "is there already" in run(chat, server)[1]


def test_nothing_accepted_is_nothing_written(server: FakeServer, chat: Path) -> None:
    server.reply = lambda body, number: completion("garbage")
    code, message = run(chat, server, "--tries", 2)
    assert (code, len(server.bodies)) == (1, 6)
    assert "no answer of m was accepted, such as: it is not JSON; change --prompts" in message
    assert not (chat.parent / "made.jsonl").exists()
    server.reply = lambda body, number: completion(json.dumps(GOOD))
    assert run(chat, server, "--restart")[0] == 0


OWN = "{system: s, user: 'find {dialogue}', again: 'no: {reason}'}"


def test_prompts_of_ones_own(server: FakeServer, chat: Path) -> None:
    """One language serves every dialogue."""
    (chat.parent / "own.yaml").write_text("en: " + OWN)
    assert run(chat, server, "--prompts", chat.parent / "own.yaml")[0] == 0
    assert {body["messages"][0]["content"] for body in server.bodies} == {"s"}
    assert all(text.startswith("find <|utt_id_start|>0<|utt_id_end|> Ben: ") for text in server.texts())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fr: " + OWN, "fr: unknown key"),
        ("en: {system: s, user: u}", "en: expected the texts system, user, again"),
        ("en: " + OWN.replace("{dialogue}", ""), "user: expected {dialogue} in it, once"),
        ("en: " + OWN.replace("no:", "<image>"), "holds <image>"),
        ("[]", "no language in it"),
        ("{", "while parsing"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(FFRError) as error:
        LabelPrompts.read(tmp_path / "own.yaml")
    assert message in str(error.value)


def test_prompts_that_are_no_file_of_yaml(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FFRError, match="a pipe or a device"):
        LabelPrompts.read(tmp_path / "pipe")
    (tmp_path / "deep.yaml").write_text(5_000 * "[")
    with pytest.raises(FFRError, match=r"--prompts .*deep\.yaml: maximum recursion"):
        LabelPrompts.read(tmp_path / "deep.yaml")


def test_bad_input_asks_nothing(server: FakeServer, chat: Path) -> None:
    assert "1 images, at most 0; raise --max-images, or give --text-only" in run(chat, server, "--max-images", 0)[1]
    assert "no such file" in run(chat.with_name("none.json"), server)[1]
    assert "none.yaml: No such file or directory; give a YAML file" in run(chat, server, "--prompts", "none.yaml")[1]
    assert not server.bodies
    server.reply = lambda body, number: failure(401, "who are you?")
    assert "the server refuses the key" in run(chat, server)[1]
    assert not journal_folder(chat.parent / "made.jsonl").exists()
