"""Answers of an OpenAI-compatible server: GPT, Gemini, Qwen, `vllm serve`, ...

Nothing is contacted but the given address. The key comes from an environment variable and is written nowhere. What
fails for the moment is tried again after the time that the server asks for, else after twice as long each time.
"""

from __future__ import annotations

import asyncio
import base64
import email.utils
import itertools
import json
import math
import os
import re
import time
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
from ffr_verl.model_families import QWEN2_VL, ModelFamily, family_named
from ffr_verl.predictions import LEAST_LOGPROB, cut_off_before_text
from ffr_verl.settings import DEFAULT_MAX_PIXELS

__all__ = ["EndpointSettings", "ask_endpoint", "data_uri", "read_body", "request_body", "served_model", "unanswered"]

_FREE = ("images_root", "api_key_env", "concurrency", "timeout", "retries")
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds, where the server asks for no time
_FOR_THE_MOMENT = (408, 409, 425, 429)
_LONGEST_MESSAGE = 300
_SHOWN_OF_KEY = 12  # so many characters of a longer key tell it
# So many rows refused, and none answered: it is the request that is wrong, not the rows.
_MOST_REFUSED = 10
_NO_KEY = "none"
_SHOWN_MODELS = 5


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
    max_new_tokens: int = 1024
    max_images: int = 8
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
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
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
        self.key()
        family_named(self.model_family)

    def key(self) -> str:
        if self.api_key_env is None:
            return _NO_KEY
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise FFRError(
                f"--api-key-env {self.api_key_env}: no such environment variable, or an empty one; give the name of "
                f"the variable, not the key: export {self.api_key_env}=..."
            )
        return key

    def work(self) -> dict[str, Any]:
        """What answers depend on, for an `AnswerJournal`; without the key."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}


class _Failed(Exception):
    """The reply is no answer; the message says why."""

    def __init__(self, message: str, *, status_code: int | None = None, is_reply: bool = True) -> None:
        super().__init__(message)
        self.status_code = status_code  # of an error that stands in a reply with status 200
        self.is_reply = is_reply  # whether it is a reply of a server for chat completions at all


class _NoAnswerNow(Exception):
    """A row that got no answer, but may get one later; with the number of tries."""

    def __init__(self, message: str, tries: int) -> None:
        super().__init__(message)
        self.tries = tries


def read_body(text: str | None) -> dict[str, Any]:
    """The JSON object of `--body`; an `FFRError` when it is none."""
    try:
        body = json.loads(text or "{}")
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise FFRError(f"--body: found {text!r}; give a JSON object such as " + '{"max_completion_tokens": 512}')
    return body


def served_model(settings: EndpointSettings) -> str:
    """The name of the model, of a server that has one.

    Raises:
        FFRError: when the package openai is missing, or the server does not say it, or has several.
    """
    openai = _openai()
    try:
        with openai.OpenAI(base_url=settings.url, api_key=settings.key(), timeout=30.0, max_retries=1) as client:
            names = [str(model.id) for model in client.models.list()]
    except (openai.OpenAIError, ImportError, ValueError, AttributeError, TypeError):  # whatever the server sends
        names = []
    if len(names) != 1:
        some = ", ".join([one_line(name, longest=80).replace(settings.key(), "***") for name in names[:_SHOWN_MODELS]])
        found = f"{len(names)} models, such as {some}" if names else "the server does not say which model it has"
        raise FFRError(f"--endpoint {settings.url}: {found}; give --model NAME")
    return names[0]


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise FFRError("--endpoint needs the package openai: pip install 'ffr-verl[endpoint]'") from None
    return openai


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
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> str | None:
    """Ask the server for the rows that have no answer yet, and keep each answer in the journal when it comes.

    A row that the server refuses (its content, its length) is kept with the reason. The first request goes alone, so
    that a wrong address or key costs one. `on_rows` is told how many rows of how many have their answer.

    Returns:
        Why the last of the rows that are left without an answer has none; `None` when none is left.

    Raises:
        FFRError: when the package openai is missing, the server cannot be reached, refuses the key or every row, or
            has answered nothing for a while; with `allow_errors` the answers that there are then suffice.
    """
    if journal.answered == journal.rows:
        return None
    openai = _openai()
    missing = ((number, row) for number, row in enumerate(rows) if number not in journal)
    return asyncio.run(_Asking(openai, journal, settings, on_rows, allow_errors).all(missing))


def unanswered(failure: str | None) -> dict[str, Any]:
    """The record of a row that `ask_endpoint` left without an answer, given what it returned."""
    why = f" ({failure})" if failure else ""
    return {"response": "", "logprobs": [], "error": f"no answer after all retries{why}"}


@dataclass
class _Asking:
    """One run of requests."""

    _openai: Any
    _journal: Answers
    _settings: EndpointSettings
    _on_rows: Callable[[int, int], None]
    _allow_errors: bool
    _is_first = True  # the request that shows whether address and key are right
    _gave_up = False
    _answered = _refused = _failed_in_succession = 0
    _last_failure: str | None = None

    async def all(self, missing: Iterator[tuple[int, Mapping[str, Any]]]) -> str | None:
        self._on_rows(self._journal.answered, self._journal.rows)
        async with self._client() as client:
            await self._work(client, itertools.islice(missing, 1))
            self._is_first = False
            tasks = [asyncio.ensure_future(self._work(client, missing)) for _ in range(self._settings.concurrency)]
            try:
                await asyncio.gather(*tasks)
            finally:  # when one fails, the others are ended
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return self._last_failure

    def _client(self) -> Any:
        settings = self._settings
        try:
            return self._openai.AsyncOpenAI(
                base_url=settings.url, api_key=settings.key(), timeout=settings.timeout, max_retries=0
            )
        except (ImportError, ValueError) as error:  # httpx, of the proxies that the environment names
            host = urllib.parse.urlsplit(settings.url).hostname
            package = " (pip install 'httpx[socks]')" if "socks" in str(error).lower() else ""
            raise FFRError(
                f"--endpoint {settings.url}: the proxy of ALL_PROXY, HTTPS_PROXY or HTTP_PROXY cannot be used"
                f"{package}: {one_line(str(error))}; mend it, or go round it with NO_PROXY={host}"
            ) from None

    async def _work(self, client: Any, rows: Iterator[tuple[int, Mapping[str, Any]]]) -> None:
        for number, row in rows:  # all workers take from one iterator
            if self._gave_up:
                return
            try:
                await self._ask(client, number, row)
                self._failed_in_succession = 0
            except _NoAnswerNow as error:
                self._last_failure = str(error)
                self._failed_in_succession += 1
                if self._failed_in_succession < max(3, self._settings.concurrency):
                    continue
                if self._allow_errors and self._journal.answered:
                    self._gave_up = True
                    return
                raise self._stop(
                    f"the last {self._failed_in_succession} requests failed, each tried {error.tries} "
                    f"time{'s' * (error.tries > 1)} ({error}); {self._kept()}; run the same command again later"
                ) from None

    async def _ask(self, client: Any, number: int, row: Mapping[str, Any]) -> None:
        try:
            answer = await self._answer(client, row)
            self._answered += 1
        except (self._openai.OpenAIError, _Failed) as error:
            answer = Answer("", error=self._told(error))
        self._journal.append([(number, answer.to_record())])
        self._refused += answer.error is not None
        if self._refused >= _MOST_REFUSED and not self._answered:
            raise self._stop(
                f"each of the first {self._refused} rows is refused, such as: {answer.error}; change the request with "
                f"--body or other options, and start again{' with --restart' * self._journal.is_kept}"
            )
        self._on_rows(self._journal.answered, self._journal.rows)

    async def _answer(self, client: Any, row: Mapping[str, Any]) -> Answer:
        try:
            body = await asyncio.to_thread(request_body, row, self._settings)
        except (ValueError, OSError) as error:
            raise _Failed(f"an image cannot be read: {error}") from None
        named = {name: body.pop(name) for name in ("model", "messages") if name in body}
        for tries in itertools.count(1):
            try:
                answer = _answer_of(await client.chat.completions.create(**named, extra_body=body))
                key = self._settings.key()
                # Short ones, such as of a local server, may be words of an answer.
                is_echo = len(key) > _SHOWN_OF_KEY and key in answer.response
                return replace(answer, response=answer.response.replace(key, "***")) if is_echo else answer
            except json.JSONDecodeError as error:
                raise self._stopped(_Failed(f"what came back is not JSON: {error}", is_reply=False)) from None
            except (self._openai.OpenAIError, _Failed) as error:
                if not self._is_for_the_moment(self._stopped(error)):
                    raise
                asked, told = _asked_wait(error), self._told(error)
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (tries - 1)) if asked is None else asked
                if asked is not None and asked > self._settings.timeout:
                    limit = f"longer than --timeout, {self._settings.timeout:g} s"
                    raise _NoAnswerNow(f"{told}; the server asks to wait {asked:.0f} s, {limit}", tries) from None
                if tries > self._settings.retries:
                    raise _NoAnswerNow(told, tries) from None
            await asyncio.sleep(wait)
        raise AssertionError

    def _is_for_the_moment(self, error: Exception) -> bool:
        status = getattr(error, "status_code", None)
        is_lost = isinstance(error, self._openai.APIConnectionError)
        return is_lost or status in _FOR_THE_MOMENT or (status or 0) >= 500

    def _stopped(self, error: Exception) -> Exception:
        """The error again, when the run can go on after it, else an `FFRError` is raised."""
        status, settings, told = getattr(error, "status_code", None), self._settings, self._told(error)
        is_lost = isinstance(error, self._openai.APIConnectionError)
        if self._is_first and is_lost and not isinstance(error, self._openai.APITimeoutError):
            raise self._stop(f"cannot be reached ({told}); is the address right?") from None
        if status == 401 or (status == 403 and not self._answered):
            mend = "give the name of the environment variable that has it: --api-key-env NAME"
            mend = f"look at the key in {settings.api_key_env}" if settings.api_key_env else mend
            raise self._stop(f"the server refuses the key ({told}); {mend}") from None
        if status == 404 and not self._answered:
            raise self._stop(
                f"{told}; most addresses end in /v1, and --model must be a name that the server knows (found "
                f"{settings.model})"
            ) from None
        if status == 402 or getattr(error, "code", None) == "insufficient_quota":
            raise self._stop(
                f"{told}; {self._kept()}; run the same command again when the account is in order"
            ) from None
        if isinstance(error, _Failed) and not error.is_reply and not self._answered:
            raise self._stop(f"{told}; is the address right? Most end in /v1") from None
        return error

    def _stop(self, why: str) -> FFRError:
        return FFRError(f"--endpoint {self._settings.url}: {why}")

    def _kept(self) -> str:
        kept = " and are kept" if self._journal.is_kept else ""
        return f"{self._journal.answered} of {self._journal.rows} rows have their answer{kept}"

    def _told(self, error: Exception) -> str:
        """A line of what the server said, without the key, should it repeat it."""
        body = getattr(error, "body", None)
        message = body.get("message") if isinstance(body, Mapping) else None
        status = getattr(error, "status_code", None)
        text = str(message or error)
        if isinstance(error, self._openai.APIConnectionError) and error.__cause__:
            text = f"{text.rstrip('.')}: {error.__cause__}"
        text = one_line(text, longest=len(text))  # it is cut below, when the key is out of it
        if self._settings.api_key_env:
            # The server may have cut it too.
            text = re.sub(re.escape(self._settings.key()[:_SHOWN_OF_KEY]) + r"[^\s\"'<>]*", "***", text)
        told = text if status is None or text.startswith("Error code") else f"{status}: {text}"
        return told[:_LONGEST_MESSAGE]


def _asked_wait(error: Exception) -> float | None:
    """Seconds that the server asks to wait until a request is tried again."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        asked = str(headers.get(name) or "")
        try:
            seconds = unit * float(asked)
        except ValueError:
            date = email.utils.parsedate_tz(asked)
            seconds = math.nan if date is None else email.utils.mktime_tz(date) - time.time()
        if seconds >= 0:
            return seconds
    return None


def _error_in(completion: Any) -> _Failed | None:
    """The error in a reply that says it went well."""
    choices = getattr(completion, "choices", None) or [None]
    found = getattr(completion, "error", None) or getattr(choices[0], "error", None)
    if not found and getattr(completion, "object", None) == "error":  # as older servers have it
        found = {name: getattr(completion, name, None) for name in ("code", "status", "message", "type")}
    if not found:
        return None
    error = found if isinstance(found, Mapping) else {"message": found}
    codes = [str(error.get(name)).lower() for name in ("code", "status", "status_code", "type")]
    status = next((int(code) for code in codes if re.fullmatch("[45][0-9]{2}", code)), None)
    if status is None:
        said = " ".join(codes)
        words = {"rate_limit": 429, "too_many": 429, "overloaded": 503, "unavailable": 503, "server_error": 500}
        status = next((code for word, code in words.items() if word in said), None)
    return _Failed(str(error.get("message") or found), status_code=status)


def _answer_of(completion: Any) -> Answer:
    """The answer in a completion, whatever the server made of the format; `_Failed` when there is none."""
    choices = getattr(completion, "choices", None)
    if (failure := _error_in(completion)) is not None:
        raise failure
    if not choices:
        raise _Failed(f"no choices in what came back: {completion}", is_reply=not isinstance(completion, str))
    choice = choices[0]
    reason = getattr(choice, "finish_reason", None)
    message = getattr(choice, "message", None)
    if reason == "content_filter" or getattr(message, "refusal", None):
        raise _Failed(f"{reason or 'refusal'}: {getattr(message, 'refusal', None) or 'stopped by the server'}")
    content = getattr(message, "content", None)
    if isinstance(content, list):  # of parts, as some servers send it
        content = "".join([str(part.get("text") or "") for part in content if isinstance(part, Mapping)])
    is_cut_off = reason == "length"
    if not content and any(getattr(message, name, None) for name in ("reasoning_content", "reasoning")):
        error = (
            f"reasoning and no answer (finish_reason {reason}): give the answer more room with --max-new-tokens, or "
            "turn the server's parsing of reasoning off"
        )
        return Answer("", is_cut_off=is_cut_off, error=error)
    if cut_off := cut_off_before_text(content if isinstance(content, str) else "", is_cut_off=is_cut_off):
        return Answer("", is_cut_off=True, error=cut_off)
    if not isinstance(content, str):
        raise _Failed(f"no text in the answer (finish_reason {reason})")
    # Half of a surrogate pair, which JSON can carry, fits into no file.
    text = content.encode("utf-8", "replace").decode("utf-8")
    return Answer(text, _logprobs(choice), is_cut_off=is_cut_off)


def _logprobs(choice: Any) -> tuple[float, ...]:
    """Of the answer's tokens; none where one of them has none."""
    tokens = getattr(getattr(choice, "logprobs", None), "content", None)
    values = [getattr(token, "logprob", None) for token in tokens] if isinstance(tokens, list) else []
    found = [float(value) for value in values if isinstance(value, (int, float)) and not math.isnan(value)]
    return tuple([max(value, LEAST_LOGPROB) for value in found]) if len(found) == len(values) else ()
