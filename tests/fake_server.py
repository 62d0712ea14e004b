"""A server that answers chat completions as a test says: for retries, timeouts, errors and malice, which no real one
makes on request. It is a proxy, too: it answers whatever host it is asked for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["FakeServer", "completion", "failure", "fake_server"]

Reply = tuple[int, "dict[str, Any] | str | Iterable[bytes]", dict[str, str]]  # pieces are sent one by one


def completion(
    text: Any, *, finish_reason: str = "stop", logprobs: list[float] | None = None, reasoning: str | None = None
) -> Reply:
    """An answer."""
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text},
    }
    if reasoning is not None:
        choice["message"]["reasoning_content"] = reasoning
    if logprobs is not None:
        choice["logprobs"] = {"content": [{"token": "x", "logprob": value, "top_logprobs": []} for value in logprobs]}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}, {}


def failure(status: int, message: str, *, code: str | None = None, retry_ms: int = 1) -> Reply:
    """An error in OpenAI's form."""
    return status, {"error": {"message": message, "code": code}}, {"retry-after-ms": str(retry_ms)}


class FakeServer:
    """What was asked, and what is answered.

    Attributes:
        reply: makes the answer to a request: its body, and how many requests came before it.
        bodies: of the requests.
        headers: of the requests, names in lower case.
        targets: of the requests, as their first lines have them.
        most_at_once: most requests that were open together.
        models: names that it says it has.
        url: for `--endpoint`.
    """

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda body, number: completion("yes")
        self.bodies: list[dict[str, Any]] = []
        self.models = ["m"]
        self.headers: list[dict[str, str]] = []
        self.targets: list[str] = []
        self.most_at_once = self._open = 0
        self._lock = threading.Lock()
        self.url = ""

    def handle(self, body: dict[str, Any], target: str, headers: dict[str, str]) -> Reply:
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(headers)
            self.targets.append(target)
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        try:
            return self.reply(body, number)
        finally:
            with self._lock:
                self._open -= 1

    @property
    def authorizations(self) -> list[str | None]:
        """Of the requests."""
        return [headers.get("authorization") for headers in self.headers]

    def texts(self) -> list[str]:
        """The user's text in each request."""
        return [user_text(body) for body in self.bodies]


def user_text(body: dict[str, Any]) -> str:
    """The text of a request's user message, without its images."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A server on a free port of this machine."""
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "me"} for name in fake.models]
            known = self.path == "/v1/models"
            self.answer((200, {"object": "list", "data": models}, {}) if known else failure(404, "no route"))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not self.path.endswith("/v1/chat/completions"):
                self.answer(failure(404, f"no route {self.path}"))
            else:
                sent = {name.lower(): value for name, value in self.headers.items()}
                self.answer(fake.handle(body, self.path, sent))

        def answer(self, reply: Reply) -> None:
            status, content, headers = reply
            is_whole = isinstance(content, (str, dict))
            data = (content if isinstance(content, str) else json.dumps(content)).encode() if is_whole else b""
            try:
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                if is_whole:
                    self.send_header("content-length", str(len(data)))
                self.end_headers()
                for piece in [data] if is_whole else content:
                    self.wfile.write(piece)
                    self.wfile.flush()
                self.close_connection = not is_whole
            except (BrokenPipeError, ConnectionResetError):  # the other side has gone
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
