"""Answers of an OpenAI-compatible server: GPT, Gemini, Qwen, `vllm serve`, ...

Nothing is contacted but the given address (see `Server`). The key comes from an environment variable and is written
nowhere. What fails for the moment is tried again after the time that the server asks for, else after twice as long
each time.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ffr_verl.dialogues import with_image_parts
from ffr_verl.errors import FFRError, one_line
from ffr_verl.images import image_source, packed_picture
from ffr_verl.inference.generate import Answer
from ffr_verl.inference.journal import Answers
from ffr_verl.inference.replies import FailedReply, LostReply, answer_of
from ffr_verl.inference.server import Server, proxy_of
from ffr_verl.model_families import QWEN2_VL, ModelFamily, family_named
from ffr_verl.settings import DEFAULT_MAX_IMAGES, DEFAULT_MAX_NEW_TOKENS, DEFAULT_MAX_PIXELS

_FREE = ("images_root", "api_key_env", "header_env", "concurrency", "timeout", "retries")
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds, where the server asks for no time
_SHOWN_OF_KEY = 12  # so many characters of a longer key tell it
# So many rows refused, and none answered: it is the request that is wrong, not the rows.
_MOST_REFUSED = 10
_LEAST_SECRET = 8
_NO_KEY = "none"
_SHOWN_MODELS = 5
_HEADER = re.compile("[A-Za-z0-9-]+")


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """A server, and how it is asked; `ffr-verl infer --help` describes the options of these names.

    Raises:
        FFRError: for an address that is none or carries credentials, an environment variable that is not set, or a
            model family that is not known.
    """

    url: str  # the base address, such as `https://api.openai.com/v1`
    model: str
    images_root: Path  # resolved folder that image paths are relative to
    api_key_env: str | None = None  # `None` where the server wants no key
    header_env: Mapping[str, str] = field(default_factory=dict)  # further headers: the variable that each is read from
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    max_images: int = DEFAULT_MAX_IMAGES
    max_pixels: int = DEFAULT_MAX_PIXELS  # to which images are shrunk before they are sent, as the family has it
    model_family: str = QWEN2_VL.name
    temperature: float = 0.0
    top_p: float = 1.0  # sent when it is not 1; `seed` when given
    seed: int | None = None
    logprobs: bool = False
    concurrency: int = 8
    timeout: float = 300.0  # seconds that a request may take, and most seconds that the server may ask to wait
    retries: int = 6
    body: Mapping[str, Any] = field(default_factory=dict)  # further fields of each request; `None` takes a field out

    def __post_init__(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # of brackets, or a port that is none
            is_address = False
        if not is_address or not self.url.isprintable():
            raise FFRError(f"--endpoint: found {self.url!r}; give an address such as http://localhost:8000/v1")
        if parts.path.rstrip("/").endswith("/completions"):
            raise FFRError(
                f"--endpoint: found {self.url!r}; give the base address, without /chat/completions, which is added"
            )
        if parts.username or parts.password or parts.query:
            raise FFRError(
                "--endpoint: the address carries a user, a password or a query; give the plain address, and with "
                "--api-key-env NAME the environment variable that has the key"
            )
        self.headers()
        family_named(self.model_family)

    def headers(self) -> dict[str, str]:
        """The key, and what else the environment is asked for; secrets."""
        key = _NO_KEY if self.api_key_env is None else _secret(self.api_key_env, "--api-key-env")
        further = {name.lower(): _secret(variable, "--header-env") for name, variable in self.header_env.items()}
        return {"authorization": f"Bearer {key}", **further}

    def redact(self, text: str, *, is_answer: bool = False) -> str:
        """A text without the secrets that it may repeat, whole or cut; the one way to what leaves the process.

        Those of less than 8 characters, such as a local server's, may be words of an answer, so they stay in one.
        """
        secrets = [value.removeprefix("Bearer ") for value in self.headers().values()]
        secrets += [password] if (password := urllib.parse.urlsplit(proxy_of(self.url) or "").password) else []
        for secret in secrets:
            is_long = len(secret) > _SHOWN_OF_KEY
            if len(secret) >= _LEAST_SECRET or not (is_answer or secret == _NO_KEY):
                rest = r"[^\s\"'<>]*" if is_long else ""
                text = re.sub(re.escape(secret[:_SHOWN_OF_KEY]) + rest, "***", text)
        return text

    def work(self) -> dict[str, Any]:
        """What answers depend on, for an `AnswerJournal`; without the key."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


def _secret(variable: str, option: str) -> str:
    value = os.environ.get(variable, "").strip()
    if not value:
        raise FFRError(
            f"{option} {variable}: no such environment variable, or an empty one; give the name of the variable, not "
            f"its value: export {variable}=..."
        )
    if not (value.isascii() and value.isprintable()):
        raise FFRError(f"{option} {variable}: its value has a line end or another letter that no HTTP header can have")
    return value


class _NoAnswerNow(Exception):
    """A row that got no answer, but may get one later; with the number of tries."""

    def __init__(self, message: str, tries: int) -> None:
        super().__init__(message)
        self.tries = tries


def read_body(text: str | None) -> dict[str, Any]:
    """The JSON object of `--body`; an `FFRError` when it is none."""
    try:
        body = json.loads(text or "{}")
        json.dumps(body, allow_nan=False)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise FFRError(
            f"--body: found {one_line(repr(text))}; give a JSON object such as " + '{"max_completion_tokens": 512}'
        )
    return body


def served_model(settings: EndpointSettings) -> str:
    """The name of the model, of a server that has one.

    Raises:
        FFRError: when the server cannot be reached, does not say it, or has several.
    """

    async def asked() -> Any:
        async with Server(settings.url, settings.headers(), timeout=settings.timeout) as server:
            return json.loads((await server.get("models")).content)

    try:
        names = [str(model["id"]) for model in asyncio.run(asked())["data"]]
    except LostReply as error:
        told = one_line(settings.redact(str(error)))
        raise FFRError(f"--endpoint {settings.url}: cannot be reached ({told}); is the address right?") from None
    except (ValueError, RecursionError, KeyError, TypeError):  # whatever the server sends
        names = []
    if len(names) != 1:
        some = ", ".join([one_line(settings.redact(name), longest=80) for name in names[:_SHOWN_MODELS]])
        found = f"{len(names)} models, such as {some}"
        if not names:
            found = "the server does not say which model it has (most addresses end in /v1)"
        raise FFRError(f"--endpoint {settings.url}: {found}; give --model NAME")
    return names[0]


def read_headers(pairs: Iterable[str]) -> dict[str, str]:
    """`HEADER=VARIABLE` of `--header-env`; an `FFRError` for one that is not."""
    headers = {}
    for pair in pairs:
        name, _, variable = pair.partition("=")
        if not (_HEADER.fullmatch(name) and variable):
            raise FFRError(
                f"--header-env: found {pair!r}; give HEADER=VARIABLE, such as OpenAI-Organization=OPENAI_ORG_ID"
            )
        headers[name] = variable
    return headers


def data_uri(image: Path | bytes, *, max_pixels: int, family: ModelFamily = QWEN2_VL) -> str:
    """A picture as a `data:` address; errors as of `packed_picture`."""
    kind, packed = packed_picture(image, max_pixels=max_pixels, family=family)
    content = packed or (image if isinstance(image, bytes) else image.read_bytes())
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def request_body(row: Mapping[str, Any], settings: EndpointSettings) -> dict[str, Any]:
    """The JSON of a chat completion request for a row of an RL file, images in their places among the text.

    Example:
        >>> row = {"prompt": [{"role": "user", "content": "Find it."}], "images": []}
        >>> request_body(row, EndpointSettings("http://localhost/v1", "m", Path("/data"), body={"n": 1}))
        {'model': 'm', 'messages': [{'role': 'user', 'content': 'Find it.'}], 'max_tokens': 1024, 'temperature': 0.0, \
'n': 1}
    """
    family = family_named(settings.model_family)
    sources = [image_source(image, settings.images_root) for image in row["images"] or ()]
    pictures = iter([data_uri(source, max_pixels=settings.max_pixels, family=family) for source in sources])
    messages = []
    for message in with_image_parts(row["prompt"]):
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": next(pictures)}} if part["type"] == "image" else part
            for part in message["content"]
        ]
        is_text = all(part["type"] == "text" for part in parts)
        content = "".join([part["text"] for part in parts]) if is_text else parts
        messages.append({"role": message["role"], "content": content})
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": messages,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": None if settings.top_p == 1.0 else settings.top_p,
        "seed": settings.seed,
        "logprobs": settings.logprobs or None,
        **settings.body,
    }
    return {name: value for name, value in body.items() if value is not None}


def ask_endpoint(
    rows: Iterable[Mapping[str, Any]],
    journal: Answers,
    settings: EndpointSettings,
    *,
    allow_errors: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> str | None:
    """Ask the server for the rows that have no answer yet, and keep each answer in the journal when it comes.

    A row that the server refuses (its content, its length) is kept with the reason. The first request goes alone, so
    that a wrong address or key costs one. `say` is told of a proxy, `on_rows` how many rows of how many have their
    answer.

    Returns:
        Why the last of the rows that are left without an answer has none; `None` when none is left.

    Raises:
        FFRError: when the package httpx is missing, the server cannot be reached, refuses the key or every row, or
            has answered nothing for a while; with `allow_errors` the answers that there are then suffice.
    """
    if journal.answered == journal.rows:
        return None
    server = Server(settings.url, settings.headers(), timeout=settings.timeout)
    if server.proxy:
        host = urllib.parse.urlsplit(settings.url).netloc
        say(f"requests to {host} go through the proxy {server.proxy}, which the environment names")
    missing = ((number, row) for number, row in enumerate(rows) if number not in journal)
    return asyncio.run(_Asking(server, journal, settings, on_rows, allow_errors).all(missing))


def unanswered(failure: str | None) -> dict[str, Any]:
    """The record of a row that `ask_endpoint` left without an answer, given what it returned."""
    why = f" ({failure})" if failure else ""
    return {"response": "", "logprobs": [], "error": f"no answer so far{why}"}


@dataclass
class _Asking:
    """One run of requests."""

    _server: Server
    _journal: Answers
    _settings: EndpointSettings
    _on_rows: Callable[[int, int], None]
    _allow_errors: bool
    _is_first = True  # the request that shows whether address and key are right
    _gave_up = False
    _answered = _refused = 0
    _tries: list[int] = field(default_factory=list)  # of each row of the last ones, which all got no answer
    _last_failure: str | None = None

    async def all(self, missing: Iterator[tuple[int, Mapping[str, Any]]]) -> str | None:
        self._on_rows(self._journal.answered, self._journal.rows)
        async with self._server:
            await self._work(itertools.islice(missing, 1))
            self._is_first = False
            tasks = [asyncio.ensure_future(self._work(missing)) for _ in range(self._settings.concurrency)]
            try:
                await asyncio.gather(*tasks)
            finally:  # when one fails, the others are ended
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return self._last_failure

    async def _work(self, rows: Iterator[tuple[int, Mapping[str, Any]]]) -> None:
        for number, row in rows:  # all workers take from one iterator
            if self._gave_up:
                return
            try:
                await self._ask(number, row)
                self._tries.clear()
            except _NoAnswerNow as error:
                self._last_failure = str(error)
                self._tries.append(error.tries)
                if len(self._tries) < max(3, self._settings.concurrency):
                    continue
                if self._allow_errors and self._journal.answered:
                    self._gave_up = True
                    return
                raise self._stop(
                    f"the last {len(self._tries)} rows got no answer in {sum(self._tries)} requests ({error}); "
                    f"{self._kept()}; run the same command again later"
                ) from None

    async def _ask(self, number: int, row: Mapping[str, Any]) -> None:
        try:
            answer = await self._answer(row)
            answer = replace(answer, response=self._settings.redact(answer.response, is_answer=True))
            answer = answer if answer.error is None else replace(answer, error=self._told(answer.error))
            self._answered += 1
        except FailedReply as error:
            answer = Answer("", error=self._told(error))
        self._journal.append([(number, answer.to_record())])
        self._refused += answer.error is not None
        if self._refused >= _MOST_REFUSED and not self._answered:
            raise self._stop(
                f"each of the first {self._refused} rows is refused, such as: {answer.error}; change the request with "
                f"--body or other options, and start again{' with --restart' * self._journal.is_kept}"
            )
        self._on_rows(self._journal.answered, self._journal.rows)

    async def _answer(self, row: Mapping[str, Any]) -> Answer:
        try:
            body = await asyncio.to_thread(_packed, row, self._settings)
        except (ValueError, OSError) as error:
            raise FailedReply(f"an image cannot be read: {error}") from None
        for tries in itertools.count(1):
            try:
                return answer_of(await self._server.post(body))
            except FailedReply as error:
                self._stop_after(error)
                if not error.is_for_the_moment:
                    raise
                told, wait = self._told(error), error.wait
                if wait is not None and wait > self._settings.timeout:
                    limit = f"longer than --timeout, {self._settings.timeout:g} s"
                    raise _NoAnswerNow(f"{told}; the server asks to wait {wait:.0f} s, {limit}", tries) from None
                if tries > self._settings.retries:
                    raise _NoAnswerNow(told, tries) from None
            await asyncio.sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (tries - 1)) if wait is None else wait)
        raise AssertionError

    def _stop_after(self, error: FailedReply) -> None:
        """Raise an `FFRError` where the run cannot go on after the error."""
        status, settings, told = error.status, self._settings, self._told(error)
        if self._is_first and isinstance(error, LostReply) and not error.is_reached:
            raise self._stop(f"cannot be reached ({told}); is the address right?") from None
        if 300 <= (status or 0) < 400:
            raise self._stop(f"{told}: it would take data and key along; give the address that is meant") from None
        if status == 401 or (status == 403 and not self._answered):
            mend = "give the name of the environment variable that has it: --api-key-env NAME"
            mend = f"look at the key in {settings.api_key_env}" if settings.api_key_env else mend
            raise self._stop(f"the server refuses the key ({told}); {mend}") from None
        if status == 404 and not self._answered:
            raise self._stop(
                f"{told}; most addresses end in /v1, and --model must be a name that the server knows (found "
                f"{settings.model})"
            ) from None
        if status == 402 or error.is_quota:
            raise self._stop(
                f"{told}; {self._kept()}; run the same command again when the account is in order"
            ) from None
        if not error.is_of_chat and not self._answered:
            raise self._stop(f"{told}; is the address right? Most end in /v1") from None

    def _stop(self, why: str) -> FFRError:
        return FFRError(f"--endpoint {self._settings.url}: {why}")

    def _kept(self) -> str:
        kept = " and are kept" if self._journal.is_kept else ""
        return f"{self._journal.answered} of {self._journal.rows} rows have their answer{kept}"

    def _told(self, error: FailedReply | str) -> str:
        """A line of what the server said; the secrets go out of it before it is cut."""
        return one_line(self._settings.redact(str(error)))


def _packed(row: Mapping[str, Any], settings: EndpointSettings) -> bytes:
    return json.dumps(request_body(row, settings), ensure_ascii=False).encode()
