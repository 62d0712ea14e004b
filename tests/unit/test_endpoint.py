"""Asking a server: what is sent, what is retried, what stops the run, what is kept; the key is written nowhere."""

from __future__ import annotations

import base64
import functools
import io
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_server import FakeServer, completion, failure, fake_server, user_text
from PIL import Image

from ffr_verl.data.prepare import prepare
from ffr_verl.errors import FFRError
from ffr_verl.evaluation import BootstrapSettings, evaluate_file
from ffr_verl.images import resized
from ffr_verl.inference.endpoint import EndpointSettings, data_uri, read_body, read_headers, request_body
from ffr_verl.inference.infer import InferSummary, infer
from ffr_verl.inference.journal import journal_folder
from ffr_verl.inference.score import answers_of_predictions

KEY = "sk-secret-0123456789"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as fake:
        yield fake


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))  # reading the system's certificates takes longer than a test
    monkeypatch.setenv("FFR_TEST_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")


@pytest.fixture
def data(parquet: Path) -> Path:
    """16 rows, some without images."""
    return parquet / "heldout.rl.parquet"


def settings(server: FakeServer, data: Path, **options: Any) -> EndpointSettings:
    options = {"api_key_env": "FFR_TEST_KEY", "concurrency": 4, "retries": 3, **options}
    return EndpointSettings(url=server.url, model="m", images_root=data.parents[1].resolve(), **options)


def ask(server: FakeServer, data: Path, output: Path, **options: Any) -> InferSummary:
    names = ("limit", "allow_errors", "force", "restart", "say")
    of_infer = {name: options.pop(name) for name in names if name in options}
    return infer([data], output, settings(server, data, **options), **of_infer)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(data: Path) -> list[dict[str, Any]]:
    return pq.read_table(data).to_pylist()


@functools.cache
def texts_of(data: Path) -> list[str]:
    return [row["prompt"][-1]["content"].replace("<image>", "") for row in rows_of(data)]


def position(body: dict[str, Any], data: Path) -> int:
    """The row that a request asks for."""
    return texts_of(data).index(user_text(body))


def test_what_is_sent_and_what_is_written(server: FakeServer, data: Path, tmp_path: Path) -> None:
    server.reply = lambda body, number: completion(f"answer {position(body, data)}", logprobs=[-0.25, -0.5])
    summary = ask(server, data, tmp_path / "new" / "pred.jsonl", logprobs=True, max_new_tokens=64)
    rows = rows_of(data)
    assert (summary.rows, summary.asked, summary.resumed, summary.errors) == (16, 16, 0, ())
    assert not journal_folder(tmp_path / "new" / "pred.jsonl").exists()
    for number, (row, line) in enumerate(zip(rows, lines(tmp_path / "new" / "pred.jsonl"), strict=True)):
        assert line == {
            "response": f"answer {number}",
            "labels": row["reward_model"]["ground_truth"],
            "logprobs": {"content": [{"logprob": -0.25}, {"logprob": -0.5}]},
            "messages": [*row["prompt"], {"role": "assistant", "content": f"answer {number}"}],
            "images": row["images"],
            "dialogue_id": row["extra_info"]["dialogue_id"],
            "split": "heldout",
        }
    found = list(answers_of_predictions(tmp_path / "new" / "pred.jsonl", [data]))
    assert [one["response"] for one in found] == [f"answer {number}" for number in range(16)]
    assert found[0]["logprobs"] == [-0.25, -0.5]
    assert set(server.authorizations) == {f"Bearer {KEY}"}
    for body in server.bodies:
        row = rows[position(body, data)]
        sent = {name: body[name] for name in body if name != "messages"}
        assert sent == {"model": "m", "max_tokens": 64, "temperature": 0.0, "logprobs": True}
        assert body["messages"][0] == row["prompt"][0]
        content = body["messages"][1]["content"]
        if not row["images"]:
            assert content == row["prompt"][1]["content"]
            continue
        pieces = [part["text"] if part["type"] == "text" else "<image>" for part in content]
        assert "".join(pieces) == row["prompt"][1]["content"], "images stand where the prompt has them"
        for name, part in zip(row["images"], [part for part in content if part["type"] == "image_url"], strict=True):
            kind, encoded = part["image_url"]["url"].split(",", 1)
            assert kind == "data:image/png;base64"
            assert base64.b64decode(encoded) == (data.parents[1] / name).read_bytes()


def test_sampling_and_further_fields(server: FakeServer, data: Path) -> None:
    body = read_body('{"max_tokens": null, "max_completion_tokens": 9, "temperature": null, "reasoning": {"a": 1}}')
    row = {"prompt": [{"role": "user", "content": "hello"}], "images": None}
    made = request_body(row, settings(server, data, temperature=0.7, top_p=0.9, seed=5, body=body))
    messages = [{"role": "user", "content": "hello"}]
    assert made == {
        "model": "m",
        "messages": messages,
        "top_p": 0.9,
        "seed": 5,
        "max_completion_tokens": 9,
        "reasoning": {"a": 1},
    }
    for text in ("{", "[]", '"x"', '{"a": NaN}', "[" * 200_000):
        with pytest.raises(FFRError, match="--body: found"):
            read_body(text)


def test_images_that_servers_do_not_take_as_they_are_are_packed_again(tmp_path: Path) -> None:
    def sent(path: Path | bytes, **options: Any) -> tuple[str, bytes]:
        kind, encoded = data_uri(path, max_pixels=10_000, **options).split(";base64,")
        return kind, base64.b64decode(encoded)

    Image.new("RGB", (400, 200), "red").save(tmp_path / "large.png")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "small.bmp")
    Image.new("RGBA", (400, 200), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (40, 20)).save(tmp_path / "small.webp")
    kind, content = sent(tmp_path / "large.png")
    with Image.open(io.BytesIO(content)) as picture:
        assert (kind, picture.format) == ("data:image/png", "PNG"), "what was lossless stays so"
        assert picture.size == resized(400, 200, max_pixels=10_000)
    with Image.open(io.BytesIO(sent(tmp_path / "small.bmp")[1])) as picture:
        assert (picture.format, picture.size) == ("PNG", (40, 20))
    with Image.open(io.BytesIO(sent(tmp_path / "clear.png")[1])) as picture:
        assert picture.getpixel((5, 5)) == (255, 255, 255), "what is transparent shows white, as in Qwen's code"
    whole = (tmp_path / "small.webp").read_bytes()
    assert sent(tmp_path / "small.webp") == sent(whole) == ("data:image/webp", whole)


def test_damage_in_the_middle_of_an_image(server: FakeServer, demo_set: Path, tmp_path: Path) -> None:
    """It shows only when the picture is decoded, here to be shrunk: its row has an error, the others their answer."""
    prepare(demo_set / "heldout.json", images_root=demo_set, output=tmp_path, split="heldout", embed_images=True)
    data = tmp_path / "heldout.rl.parquet"
    table = pq.read_table(data)
    rows = table.to_pylist()
    number = next(number for number, row in enumerate(rows) if row["images"])
    content = bytearray(rows[number]["images"][0]["bytes"])
    content[60:100] = bytes(40)
    rows[number]["images"][0]["bytes"] = bytes(content)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), data)
    ask(server, data, tmp_path / "pred.jsonl", max_pixels=1000)
    errors = {number: line["error"] for number, line in enumerate(lines(tmp_path / "pred.jsonl")) if "error" in line}
    assert list(errors) == [number]
    assert errors[number].startswith("an image cannot be read: ")


def test_images_in_the_file_are_sent_and_named(server: FakeServer, demo_set: Path, tmp_path: Path) -> None:
    prepare(
        demo_set / "heldout.json", images_root=demo_set, output=tmp_path / "data", split="heldout", embed_images=True
    )
    data = tmp_path / "data" / "heldout.rl.parquet"
    ask(server, data, tmp_path / "pred.jsonl")
    rows = rows_of(data)
    assert [line["images"] for line in lines(tmp_path / "pred.jsonl")] == [row["extra_info"]["images"] for row in rows]
    bodies = [body for body in server.bodies if not isinstance(body["messages"][1]["content"], str)]
    assert bodies
    for body in bodies:
        urls = [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]
        pictures = [image["bytes"] for image in rows[position(body, data)]["images"]]
        assert [base64.b64decode(url.split(",")[1]) for url in urls] == pictures


def test_failures_for_the_moment_are_tried_again(server: FakeServer, data: Path, tmp_path: Path) -> None:
    """429, 503 and a timeout, one after another for the same row."""
    seen: dict[str, int] = {}

    def reply(body: dict[str, Any], number: int) -> Any:
        text = user_text(body)
        seen[text] = seen.get(text, 0) + 1
        if position(body, data) == 5 and seen[text] < 4:
            if seen[text] == 3:
                time.sleep(1.2)
            return failure(429 if seen[text] == 1 else 503, "wait")
        return completion("yes")

    server.reply = reply
    summary = ask(server, data, tmp_path / "pred.jsonl", timeout=1.0)
    assert summary.errors == ()
    assert sorted(seen.values()) == [1] * 15 + [4]
    assert {line["response"] for line in lines(tmp_path / "pred.jsonl")} == {"yes"}


def test_the_wait_is_the_servers(server: FakeServer, data: Path, tmp_path: Path) -> None:
    times: list[float] = []

    def reply(body: dict[str, Any], number: int) -> Any:
        times.append(time.monotonic())
        return failure(429, "slow down", retry_ms=300) if number == 1 else completion("yes")

    server.reply = reply
    ask(server, data, tmp_path / "pred.jsonl", concurrency=1, limit=2)
    assert len(times) == 3
    assert times[2] - times[1] >= 0.3


def test_requests_in_flight_are_bounded(server: FakeServer, data: Path, tmp_path: Path) -> None:
    gate = threading.Barrier(3)

    def reply(body: dict[str, Any], number: int) -> Any:
        if 0 < number <= 15:
            gate.wait(timeout=20)  # passes only when three are open together
        return completion("yes")

    server.reply = reply
    ask(server, data, tmp_path / "pred.jsonl", concurrency=3)
    assert server.most_at_once == 3


def test_a_refused_row_is_kept_with_its_reason(server: FakeServer, data: Path, tmp_path: Path) -> None:
    def reply(body: dict[str, Any], number: int) -> Any:
        return {
            3: failure(400, f"content policy; your key {KEY} is known", code="content_filter"),
            4: completion("half an ans", finish_reason="content_filter"),
            5: (200, {"choices": []}, {}),
            6: completion(None),
            7: completion("too lo", finish_reason="length"),
            8: failure(403, "flagged by moderation"),
            9: completion("fine", finish_reason=KEY),
            10: completion(None, finish_reason=KEY),
            11: completion([{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]),
            13: (400, '{"error": {"message": "cut \\ud83d off"}}', {}),
            12: completion(None, finish_reason="length", reasoning="well, let me think"),
        }.get(position(body, data), completion("yes"))

    server.reply = reply
    summary = ask(server, data, tmp_path / "pred.jsonl")
    found = lines(tmp_path / "pred.jsonl")
    errors = {number: line["error"] for number, line in enumerate(found) if "error" in line}
    assert errors[3] == "400: content policy; your key *** is known"
    assert errors[4] == "content_filter: stopped by the server"
    assert errors[5].startswith("no choices in what came back")
    assert errors[8] == "403: flagged by moderation"
    assert errors[10] == "no text in the answer (finish_reason ***"  # to the next space
    assert errors[12].startswith("reasoning and no answer (finish_reason length): give the answer more room")
    assert errors[13] == "400: cut off"
    assert errors[6] == "no text in the answer (finish_reason stop)"
    assert sorted(errors) == [3, 4, 5, 6, 8, 10, 12, 13]
    assert found[11]["response"] == "in parts"
    assert [found[number]["response"] for number in (3, 4, 5, 6, 7, 8)] == ["", "", "", "", "too lo", ""]
    assert all(found[number]["response"] == "yes" for number in (0, 1, 2, 14, 15))
    assert (sum(count for _, count in summary.errors), summary.cut_off) == (8, 1)


def test_reasons_that_differ_in_numbers_are_one(server: FakeServer, data: Path, tmp_path: Path) -> None:
    def reply(body: dict[str, Any], number: int) -> Any:
        place = position(body, data)
        return failure(400, f"{5000 + place} tokens, at most 4096") if place % 4 == 1 else completion("yes")

    server.reply = reply
    summary = ask(server, data, tmp_path / "pred.jsonl")
    assert summary.errors == (("400: 5001 tokens, at most 4096", 4),)


def test_log_probabilities_that_do_not_come_are_told(server: FakeServer, data: Path, tmp_path: Path) -> None:
    said: list[str] = []
    ask(server, data, tmp_path / "pred.jsonl", logprobs=True, say=said.append)
    assert said == ["16 answers came without log-probabilities, although they were asked for"]
    said.clear()
    server.reply = lambda body, number: completion("yes", logprobs=[-0.5])
    ask(server, data, tmp_path / "more.jsonl", logprobs=True, say=said.append)
    assert said == []


@pytest.mark.parametrize(
    ("reply", "message", "asked"),
    [
        (
            failure(401, f"bad key {KEY}"),
            r"refuses the key \(401: bad key \*\*\*\); look at the key in FFR_TEST_KEY",
            1,
        ),
        (failure(403, "not yours"), r"refuses the key \(403: not yours\)", 1),
        (failure(404, "no model m"), r"404: no model m; most addresses end in /v1, and --model must be a name", 1),
        ((200, "<html>", {"content-type": "text/html"}), "not JSON: .*: <html>; is the address right", 1),
        ((200, "{", {}), "what came back is not JSON.*; is the address right", 1),
        (failure(402, "no credit"), r"402: no credit; 0 of 16 rows have their answer and are kept", 1),
        (
            failure(429, "quota", code="insufficient_quota"),
            "429: quota; 0 of 16 rows .* when the account is in order",
            6,
        ),
        (failure(400, "unknown field"), r"each of the first 1\d rows is refused, such as: 400: unknown field", 16),
        (failure(500, "out of order"), r"the last 4 rows got no answer in 16 requests \(500: out of order\)", 26),
    ],
)
def test_what_stops_the_run(
    server: FakeServer, data: Path, tmp_path: Path, reply: Any, message: str, asked: int
) -> None:
    server.reply = lambda body, number: reply
    with pytest.raises(FFRError, match=message):
        ask(server, data, tmp_path / "pred.jsonl")
    assert len(server.bodies) <= asked
    assert not (tmp_path / "pred.jsonl").exists()
    assert journal_folder(tmp_path / "pred.jsonl").exists() == ("refused, such as" in message), "nothing to go on with"


def test_a_key_that_is_refused_in_the_middle(server: FakeServer, data: Path, tmp_path: Path) -> None:
    server.reply = lambda body, number: failure(401, "revoked") if number == 6 else completion("yes")
    with pytest.raises(FFRError, match="refuses the key"):
        ask(server, data, tmp_path / "pred.jsonl", concurrency=2)
    first = len(server.bodies)
    server.reply = lambda body, number: completion("yes")
    summary = ask(server, data, tmp_path / "pred.jsonl", concurrency=8, retries=1, timeout=20.0)
    assert summary.resumed >= 5, "concurrency, retries and timeout may differ when a run goes on"
    assert len(server.bodies) == first + 16 - summary.resumed


def test_rows_without_an_answer_for_now(server: FakeServer, data: Path, tmp_path: Path) -> None:
    """They are asked again by the same command; the output waits for them, unless told otherwise."""
    server.reply = lambda body, number: failure(500, "odd") if position(body, data) in (2, 9) else completion("yes")
    with pytest.raises(FFRError, match=r"2 of 16 rows have no answer \(500: odd\).*run the same command again"):
        ask(server, data, tmp_path / "pred.jsonl")
    assert not (tmp_path / "pred.jsonl").exists()
    server.bodies.clear()
    summary = ask(server, data, tmp_path / "pred.jsonl", allow_errors=True)
    assert {position(body, data) for body in server.bodies} == {2, 9}
    assert summary.errors == (("no answer so far (500: odd)", 2),)
    found = lines(tmp_path / "pred.jsonl")
    why = "no answer so far (500: odd)"
    assert [number for number, line in enumerate(found) if line.get("error") == why] == [2, 9]
    server.reply = lambda body, number: completion("later")
    ask(server, data, tmp_path / "pred.jsonl", force=True)
    assert {line["response"] for line in lines(tmp_path / "pred.jsonl")} == {"later"}


def test_what_there_is_is_written_although_the_server_is_silent(
    server: FakeServer, data: Path, tmp_path: Path
) -> None:
    """With --allow-errors, also when only rows without an answer are left: then nothing but failures comes back."""
    lost = set(range(1, 16, 2))
    server.reply = lambda body, number: failure(500, "odd") if position(body, data) in lost else completion("yes")
    with pytest.raises(FFRError, match="8 of 16 rows have no answer"):
        ask(server, data, tmp_path / "pred.jsonl", concurrency=16)
    with pytest.raises(FFRError, match="run the same command again later"):
        ask(server, data, tmp_path / "pred.jsonl", concurrency=2)
    summary = ask(server, data, tmp_path / "pred.jsonl", concurrency=2, allow_errors=True)
    assert summary.errors == (("no answer so far (500: odd)", 8),)
    found = lines(tmp_path / "pred.jsonl")
    assert {number for number, line in enumerate(found) if "error" in line} == lost


def test_an_input_is_never_written_over(server: FakeServer, data: Path, tmp_path: Path) -> None:
    before = data.read_bytes()
    with pytest.raises(FFRError, match=r"is read by this command; give another name, such as pred\.jsonl"):
        ask(server, data, data, force=True)
    assert data.read_bytes() == before
    assert not server.bodies


def test_no_row_has_an_answer(server: FakeServer, data: Path, tmp_path: Path) -> None:
    server.reply = lambda body, number: failure(400, "too long")
    for _ in range(2):
        with pytest.raises(FFRError, match=r"no row has an answer, such as: 400: too long.*--restart"):
            ask(server, data, tmp_path / "pred.jsonl", limit=3)
    server.reply = lambda body, number: completion("yes")
    assert ask(server, data, tmp_path / "pred.jsonl", limit=3, restart=True).errors == ()


def test_other_settings_do_not_go_on(server: FakeServer, data: Path, tmp_path: Path) -> None:
    server.reply = lambda body, number: failure(401, "no") if number == 3 else completion("yes")
    with pytest.raises(FFRError, match="refuses the key"):
        ask(server, data, tmp_path / "pred.jsonl", concurrency=1)
    for change, name in (
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"limit": 4}, "rows"),
        ({"body": {"n": 1}}, "body"),
    ):
        with pytest.raises(FFRError, match=rf"different: {name}\); finish that one, or forget it with --restart"):
            ask(server, data, tmp_path / "pred.jsonl", **change)
    assert ask(server, data, tmp_path / "pred.jsonl", max_new_tokens=5, restart=True).resumed == 0


def test_nobody_listens(data: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    asked = EndpointSettings(url=url, model="m", images_root=data.parents[1].resolve(), retries=0)
    with pytest.raises(FFRError, match=r"cannot be reached \(Connection error: .*\); is the address right\?"):
        infer([data], tmp_path / "pred.jsonl", asked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000/v1"}, "give an address such as http://localhost:8000/v1"),
        ({"url": "http://me:secret@host/v1"}, "carries a user, a password or a query"),
        ({"url": "https://host/v1?key=secret"}, "carries a user, a password or a query"),
        ({"url": "https://host/v1/chat/completions/"}, "give the base address, without /chat/completions"),
        ({"url": "https://[host/v1"}, "give an address such as"),
        ({"url": "https://host:99999/v1"}, "give an address such as"),
        ({"url": "https://host/v1\n"}, "give an address such as"),
        ({"url": "https://host/v1", "api_key_env": "FFR_NOT_SET"}, "--api-key-env FFR_NOT_SET: no such environment"),
        (
            {"url": "https://host/v1", "api_key_env": "FFR_BROKEN"},
            "--api-key-env FFR_BROKEN: its value has a line end",
        ),
        (
            {"url": "https://host/v1", "header_env": {"OpenAI-Project": "FFR_NOT_SET"}},
            "--header-env FFR_NOT_SET: no such environment",
        ),
    ],
)
def test_addresses_and_keys_that_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FFR_BROKEN", "sk-secret\nsecret")
    with pytest.raises(FFRError, match=message) as caught:
        EndpointSettings(**options, model="m", images_root=tmp_path)
    assert "secret" not in str(caught.value)


def test_without_a_key_none_is_sent(server: FakeServer, data: Path, tmp_path: Path) -> None:
    """Not that of the variable which the openai package reads by itself, either."""
    assert os.environ["OPENAI_API_KEY"]
    ask(server, data, tmp_path / "pred.jsonl", api_key_env=None, limit=2)
    assert set(server.authorizations) == {"Bearer none"}


def error_in_200(code: Any, message: str = "too many requests", **more: Any) -> Any:
    return 200, {"choices": None, "error": {"code": code, "message": message, **more}}, {}


def test_an_error_in_a_good_reply_is_tried_again_as_its_code_says(
    server: FakeServer, data: Path, tmp_path: Path
) -> None:
    replies = [
        error_in_200(429),
        error_in_200("503"),
        error_in_200("rate_limit_exceeded"),
        error_in_200(None, "upstream gave up"),
        (200, {"error": "model is loading"}, {}),
        (200, '{"choices": [', {}),
        (200, "<html>", {"content-type": "text/html"}),
        (200, "[" * 200_000, {}),
        (200, '{"choices": [{"logprobs": ' + "9" * 5000 + "}]}", {}),
        (200, {"object": "error", "message": "busy", "code": 500}, {}),
        (200, {"choices": [{"index": 0, "error": {"code": 502, "message": "upstream"}, "message": {}}]}, {}),
    ]
    server.reply = lambda body, number: replies[number - 1] if 1 <= number <= 5 else completion("yes")
    summary = ask(server, data, tmp_path / "pred.jsonl", concurrency=5, limit=6)
    assert (summary.errors, len(server.bodies)) == ((), 6 + 5)


def test_an_error_in_a_good_reply_that_refuses_the_row_or_the_key(
    server: FakeServer, data: Path, tmp_path: Path
) -> None:
    server.reply = lambda body, number: error_in_200(400, "too long") if number == 1 else completion("yes")
    summary = ask(server, data, tmp_path / "pred.jsonl", concurrency=1, limit=3)
    assert summary.errors == (("400: too long", 1),)
    server.reply = lambda body, number: error_in_200(401, "no")
    with pytest.raises(FFRError, match=r"refuses the key \(401: no\)"):
        ask(server, data, tmp_path / "other.jsonl")


@pytest.mark.parametrize("place", ["message", "no choices", "cut by the server", "answer"])
def test_no_piece_of_the_key_is_written(
    server: FakeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Also where a text is cut in the middle of it, by us or by the server."""
    long = "sk-" + "abcdefghij" * 16
    monkeypatch.setenv("FFR_TEST_KEY", long)
    replies = {
        "message": failure(400, "x" * 270 + long),
        "no choices": (200, {"filler": "x" * 60, "auth": long}, {}),
        "cut by the server": failure(400, f"bad: {long[:40]}"),
        "answer": completion(f"your key is {long}"),
    }
    server.reply = lambda body, number: completion("yes") if number == 0 else replies[place]
    ask(server, data, tmp_path / "pred.jsonl", concurrency=1, limit=2)
    text = (tmp_path / "pred.jsonl").read_text()
    assert "sk-" not in text
    assert "***" in text


@pytest.mark.parametrize(
    "content",
    [
        [{"token": "a", "logprob": None}],
        [{"logprob": "-0.5"}],
        [{"logprob": 10**400}],
        [{"logprob": float("inf")}],
        [{"logprob": True}],
        [-0.5],
        [{"token": "a"}],
        "x",
        3,
    ],
)
def test_an_answer_with_odd_log_probabilities_is_kept_without_them(
    server: FakeServer, data: Path, tmp_path: Path, content: Any
) -> None:
    status, body, headers = completion("yes")
    assert isinstance(body, dict)
    body["choices"][0]["logprobs"] = {"content": content}
    server.reply = lambda _body, number: (status, body, headers)
    said: list[str] = []
    ask(server, data, tmp_path / "pred.jsonl", logprobs=True, limit=1, say=said.append)
    [line] = lines(tmp_path / "pred.jsonl")
    assert (line["response"], line["logprobs"]) == ("yes", {"content": []})
    assert said == ["1 answers came without log-probabilities, although they were asked for"]


def test_a_wait_that_is_too_long_is_told(server: FakeServer, data: Path, tmp_path: Path) -> None:
    server.reply = lambda body, number: (429, {"error": {"message": "tomorrow"}}, {"retry-after": "600"})
    with pytest.raises(
        FFRError,
        match=r"no answer in 3 requests \(429: tomorrow; the server asks to wait 600 s, longer than -",
    ):
        ask(server, data, tmp_path / "pred.jsonl", concurrency=2)
    assert len(server.bodies) <= 5


@pytest.mark.parametrize(
    "choices", [5, "x", {}, None, [5], [None], [[]], [{"message": 3}], [{"message": {"content": 5}}]]
)
def test_foreign_values_are_no_answer(server: FakeServer, data: Path, tmp_path: Path, choices: Any) -> None:
    server.reply = lambda body, number: (200, {"choices": choices}, {}) if number == 1 else completion("yes")
    summary = ask(server, data, tmp_path / "pred.jsonl", limit=3, concurrency=1)
    [(reason, count)] = summary.errors
    assert (count, reason.startswith(("no choices in what came back", "no text in the answer"))) == (1, True)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_takes_nothing_along(server: FakeServer, data: Path, tmp_path: Path, status: int) -> None:
    with fake_server() as other:
        server.reply = lambda body, number: (status, "", {"location": f"{other.url}/chat/completions"})
        message = rf"{status}: a redirect to {other.url}/chat/completions, which is not followed: .*give the address"
        with pytest.raises(FFRError, match=message):
            ask(server, data, tmp_path / "pred.jsonl")
        assert (len(server.bodies), other.bodies) == (1, [])


def test_a_proxy_of_the_environment_is_said(
    server: FakeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host and port, not its password; what NO_PROXY names goes straight."""
    host = server.url.split("/")[2]
    monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@{host}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    said: list[str] = []
    asked = EndpointSettings(url="http://far.invalid/v1", model="m", images_root=data.parents[1].resolve())
    infer([data], tmp_path / "pred.jsonl", asked, limit=1, say=said.append)
    assert said == [f"requests to far.invalid go through the proxy {host}, which the environment names"]
    assert server.targets == ["http://far.invalid/v1/chat/completions"]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    ask(server, data, tmp_path / "more.jsonl", limit=1, say=said.append)
    assert (len(said), server.targets[1]) == (1, "/v1/chat/completions")


def test_headers_of_the_environment_are_sent_when_asked_for(
    server: FakeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.setenv(name, "x-mine: organization-of-mine")
    ask(server, data, tmp_path / "pred.jsonl", limit=1)
    needed = {"host", "accept", "accept-encoding", "connection", "content-length", "content-type", "user-agent"}
    assert set(server.headers[0]) == needed | {"authorization"}
    server.reply = lambda body, number: (
        failure(400, "no x-mine: organization-of-mine") if number == 2 else completion("1")
    )
    headers = read_headers(["OpenAI-Organization=OPENAI_ORG_ID"])
    summary = ask(server, data, tmp_path / "more.jsonl", limit=2, header_env=headers, concurrency=1)
    assert server.headers[1]["openai-organization"] == "x-mine: organization-of-mine"
    assert summary.errors == (("400: no ***", 1),)
    with pytest.raises(FFRError, match="--header-env: found 'a b=c'; give HEADER=VARIABLE"):
        read_headers(["a b=c"])


def drip() -> Iterator[bytes]:
    for _ in range(40):
        yield b" "
        time.sleep(0.1)


def test_a_reply_that_drips_or_never_ends_is_given_up(server: FakeServer, data: Path, tmp_path: Path) -> None:
    """Each byte comes in time, the whole does not; and no reply fills the memory."""
    server.reply = lambda body, number: (200, drip(), {}) if number == 1 else completion("yes")
    assert ask(server, data, tmp_path / "pred.jsonl", limit=3, timeout=1.0, concurrency=1).errors == ()
    assert len(server.bodies) == 4
    server.reply = lambda body, number: (200, itertools.repeat(b" " * 2**20), {})
    with pytest.raises(FFRError, match=r"the last 3 rows got no answer in 3 requests \(a reply of more than 64 MiB\)"):
        ask(server, data, tmp_path / "more.jsonl", limit=3, concurrency=1, retries=0)
    server.reply = lambda body, number: (200, drip(), {})
    with pytest.raises(FFRError, match=r"in 3 requests \(no whole reply within 1 s \(--timeout\)\)"):
        ask(server, data, tmp_path / "most.jsonl", limit=3, concurrency=1, retries=0, timeout=1.0)


def test_certificates_that_are_not_there(
    server: FakeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(FFRError, match=r"SSL_CERT_FILE=.*none\.pem: No such file or directory; give one with certif"):
        ask(server, data, tmp_path / "pred.jsonl")


@pytest.mark.parametrize(
    "asked", ["nan", "-5", "soon", "Fri, 31 Dec 99999 23:59:59 GMT", "Mon, 01 Jan 2001 00:00:00 GMT"]
)
def test_a_wait_that_means_nothing_is_ours(server: FakeServer, data: Path, tmp_path: Path, asked: str) -> None:
    busy = (429, {"error": {"message": "busy"}}, {"retry-after": asked})
    server.reply = lambda body, number: busy if number == 1 else completion("yes")
    assert ask(server, data, tmp_path / "pred.jsonl", limit=2, concurrency=1).errors == ()


def test_a_proxy_that_cannot_be_used_is_named(
    server: FakeServer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(FFRError, match=r"the proxy of ALL_PROXY, .* cannot be used.*NO_PROXY=127\.0\.0\.1"):
        ask(server, data, tmp_path / "pred.jsonl")


def test_an_answer_cut_off_before_it_says_anything_is_none(server: FakeServer, data: Path, tmp_path: Path) -> None:
    server.reply = lambda body, number: completion(["", " \n", None][number % 3], finish_reason="length")
    summary = ask(server, data, tmp_path / "pred.jsonl")
    assert sum(count for _, count in summary.errors) == 16
    result = evaluate_file(tmp_path / "pred.jsonl", bootstrap=BootstrapSettings(0))
    assert (result.unanswered["any"], result.malformed["any"], result.macro["joint"]["f1"]) == (16, 0, 0.0)
    server.reply = lambda body, number: completion("")
    assert ask(server, data, tmp_path / "empty.jsonl").errors == (), "an empty text that ended by itself is an answer"
