"""Servers that send whatever they like: each row has an answer or a reason, or the command says what is wrong."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ATTACKS, HELD, outcome
from fake_server import FakeServer, completion, failure, fake_server
from test_mutated_values import ODD, mutated

from ffr_verl.inference.endpoint import EndpointSettings
from ffr_verl.inference.infer import infer

KEY = "sk-secret-0123456789"
GOOD = completion("yes", logprobs=[-0.5, -0.25])[1]


def pieces(*parts: bytes, pause: float = 0.0) -> Iterator[bytes]:
    for part in parts:
        yield part
        time.sleep(pause)


BEHAVIOURS: dict[str, Callable[[], Any]] = {
    **{
        f"status {status}": lambda status=status: failure(status, "no")
        for status in (100, 199, 204, 300, 304, 400, 401)
    },
    **{
        f"status {status} ": lambda status=status: failure(status, "no")
        for status in (402, 403, 404, 409, 418, 422, 429)
    },
    **{f"status {status}": lambda status=status: failure(status, "no") for status in (500, 502, 503, 504, 599, 999)},
    **{
        f"redirect {status}": lambda status=status: (status, {}, {"location": "http://127.0.0.1:9/steal"})
        for status in (301, 302, 303, 307, 308)
    },
    "no body": lambda: (200, "", {}),
    "half a body": lambda: (200, json.dumps(GOOD)[:40], {}),
    "a body shorter than it says": lambda: (200, pieces(b"{}"), {"content-length": "100"}),
    "no JSON": lambda: (200, "<html>sign in</html>", {"content-type": "text/html"}),
    "no UTF-8": lambda: (200, pieces(b'{"choices": "\xff\xfe"}'), {}),
    "deep JSON": lambda: (200, "[" * 200_000, {}),
    "a number beyond float": lambda: (200, '{"choices": 1e999999}', {}),
    "a number of 100,000 digits": lambda: (200, '{"choices": ' + "9" * 100_000 + "}", {}),
    "an endless body": lambda: (200, itertools.repeat(b" " * 2**20), {}),
    "a slow body": lambda: (200, pieces(*[b" "] * 30, pause=0.1), {}),
    "a bomb": lambda: (200, pieces(b"\x1f\x8b" + b"\0" * 50), {"content-encoding": "gzip"}),
    "an encoding that nobody knows": lambda: (200, json.dumps(GOOD), {"content-encoding": "x-none"}),
    "an error in a good reply": lambda: (200, {"error": {"message": f"bad key {KEY}", "code": 401}}, {}),
    "the key in an error": lambda: failure(400, f"who is {KEY}?"),
    "the key in an answer": lambda: completion(f"your key is {KEY}"),
    "escape sequences": lambda: failure(400, "\x1b]0;owned\x07\x1b[2J\r\n\u202etxt"),
    "half a surrogate pair": lambda: completion("\ud83d"),
    "a very long answer": lambda: completion("x" * 5_000_000),
    "a wait without end": lambda: (429, {}, {"retry-after": "1e308"}),
    "a wait that is none": lambda: (429, {}, {"retry-after": "soon"}),
    "a cookie": lambda: (200, GOOD, {"set-cookie": "a=b; Domain=example.org"}),
    "a streamed answer": lambda: (200, "data: {}\n\ndata: [DONE]\n", {"content-type": "text/event-stream"}),
    "a thousand headers": lambda: (200, GOOD, {f"x-{number}": "y" for number in range(90)}),
    "a header of a megabyte": lambda: (200, GOOD, {"x-long": "y" * 2**20}),
}


def attacked(server: FakeServer, data: Path, output: Path, reply: Any, kind: str) -> None:
    """Three rows, of which the second gets the reply."""
    server.bodies.clear()
    server.reply = lambda body, number: reply() if number == 1 else completion("yes")
    settings = EndpointSettings(
        url=server.url,
        model="m",
        images_root=data.parents[1],
        api_key_env="FFR_TEST_KEY",
        concurrency=1,
        retries=0,
        timeout=2.0,
        logprobs=True,
    )
    said: list[str] = []
    error, _ = outcome(lambda: infer([data], output, settings, limit=3, force=True, restart=True, say=said.append))
    written = output.read_text() if output.exists() else ""
    assert KEY not in (error or "") + written + "".join(said)
    assert "\x1b" not in written
    assert error is not None or len(written.splitlines()) == 3
    HELD[f"{kind}: {'told' if error else 'a row, or its reason'}"] += 1


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeServer]:
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))
    monkeypatch.setenv("FFR_TEST_KEY", KEY)
    with fake_server() as fake:
        yield fake


@pytest.fixture
def data(parquet: Path) -> Path:
    return parquet / "heldout.rl.parquet"


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_behaviours(server: FakeServer, data: Path, tmp_path: Path, name: str) -> None:
    attacked(server, data, tmp_path / "p.jsonl", BEHAVIOURS[name], "hostile servers")


def test_mutated_replies(server: FakeServer, data: Path, tmp_path: Path, source: random.Random) -> None:
    for _ in range(ATTACKS):
        reply = mutated(GOOD, source) if source.random() < 0.9 else source.choice(ODD)
        text = reply if isinstance(reply, str) else json.dumps(reply)
        attacked(server, data, tmp_path / "p.jsonl", lambda text=text: (200, text, {}), "mutated replies")
