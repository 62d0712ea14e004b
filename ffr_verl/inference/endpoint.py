"""Answers of an OpenAI-compatible server: GPT, Gemini, Qwen, `vllm serve`, ...

Nothing is contacted but the given address. The key comes from an environment variable and is written nowhere. Retries
with backoff are those of the `openai` package: it waits as long as the server asks, else twice as long each time.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ffr_verl.data.config import DEFAULT_MAX_PIXELS
from ffr_verl.dialogues import with_image_parts
from ffr_verl.errors import FFRError, one_line
from ffr_verl.images import image_source, packed_picture
from ffr_verl.inference.generate import Answer
from ffr_verl.inference.journal import AnswerJournal
from ffr_verl.model_families import QWEN2_VL, ModelFamily, family_named

__all__ = ["EndpointSettings", "ask_endpoint", "data_uri", "read_body", "request_body"]

_FREE = ("images_root", "api_key_env", "concurrency", "timeout", "retries")
_FIRST_RETRIES = 1
_LONGEST_MESSAGE = 300
# So many rows refused, and none answered: it is the request that is wrong, not the rows.
_MOST_REFUSED = 10
_NO_KEY = "none"


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """A server, and how it is asked.

    Attributes:
        url: its base address, such as `https://api.openai.com/v1`.
        model: a name that the server knows.
        images_root: resolved folder that image paths are relative to.
        api_key_env: environment variable with the key; `None` where the server wants none.
        max_new_tokens: most tokens of an answer.
        max_images: most images of a prompt.
        max_pixels: images with more are shrunk before they are sent.
        model_family: of the model, which says to which sizes, see `ffr_verl.model_families`.
        temperature: 0 for greedy answers.
        top_p: share of the probability that tokens are drawn from; sent only when it is not 1.
        seed: sent only when given.
        logprobs: whether to ask for log-probabilities.
        concurrency: most requests in flight.
        timeout: seconds that a request may take.
        retries: of a request that fails for the moment (429, 5xx, timeouts, lost connections).
        body: further fields of each request; `None` takes a field out.

    Raises:
        FFRError: for an address that is none or carries credentials, an environment variable that is not set, or a
            model family that is not known.
    """

    url: str
    model: str
    images_root: Path
    api_key_env: str | None = None
    max_new_tokens: int = 1024
    max_images: int = 8
    max_pixels: int = DEFAULT_MAX_PIXELS
    model_family: str = QWEN2_VL.name
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: bool = False
    concurrency: int = 8
    timeout: float = 300.0
    retries: int = 6
    body: Mapping[str, Any] = field(default_factory=dict)

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
        """The key, out of the environment."""
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


class _RowFailed(Exception):
    """A row that the server refuses; the message says why."""


class _NoCompletion(_RowFailed):
    """What came back is no chat completion at all."""


class _NoAnswerNow(Exception):
    """A row that got no answer after all retries, but may get one later."""


def read_body(text: str | None) -> dict[str, Any]:
    """The JSON object of `--body`.

    Raises:
        FFRError: when it is none.

    Example:
        >>> read_body('{"max_tokens": null, "max_completion_tokens": 512}')
        {'max_tokens': None, 'max_completion_tokens': 512}
    """
    try:
        body = json.loads(text or "{}")
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise FFRError(f"--body: found {text!r}; give a JSON object such as " + '{"max_completion_tokens": 512}')
    return body


def data_uri(image: Path | bytes, *, max_pixels: int, family: ModelFamily = QWEN2_VL) -> str:
    """A picture as a `data:` address, see `packed_picture`.

    Raises:
        ValueError: as `packed_picture`.
    """
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
    pictures = iter(
        [
            data_uri(image_source(image, settings.images_root), max_pixels=settings.max_pixels, family=family)
            for image in row["images"] or ()
        ]
    )
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
        **({"top_p": settings.top_p} if settings.top_p != 1.0 else {}),
        **({"seed": settings.seed} if settings.seed is not None else {}),
        **({"logprobs": True} if settings.logprobs else {}),
        **settings.body,
    }
    return {name: value for name, value in body.items() if value is not None}


def ask_endpoint(
    rows: Iterable[Mapping[str, Any]],
    journal: AnswerJournal,
    settings: EndpointSettings,
    *,
    allow_errors: bool = False,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> str | None:
    """Ask the server for the rows that have no answer yet, and keep each answer in the journal when it comes.

    A row that the server refuses (its content, its length) is kept with the reason. The first request goes alone, so
    that a wrong address or key costs one.

    Args:
        rows: of RL files, as many as the journal has.
        journal: gets the answers.
        settings: the server.
        allow_errors: when the server has answered nothing for a while, return with the answers that there are, if
            there are any, instead of raising.
        on_rows: told how many rows of how many have their answer.

    Returns:
        Why the last of the rows that are left without an answer has none; `None` when none is left.

    Raises:
        FFRError: when the package openai is missing, the server cannot be reached, refuses the key or every row, or
            has answered nothing for a while, see `allow_errors`.
    """
    if journal.answered == journal.rows:
        return None
    try:
        import openai
    except ImportError:
        raise FFRError("--endpoint needs the package openai: pip install 'ffr-verl[endpoint]'") from None
    missing = ((number, row) for number, row in enumerate(rows) if number not in journal)
    return asyncio.run(_Asking(openai, journal, settings, on_rows, allow_errors=allow_errors).all(missing))


class _Asking:
    """One run of requests."""

    def __init__(
        self,
        openai: Any,
        journal: AnswerJournal,
        settings: EndpointSettings,
        on_rows: Callable[[int, int], None],
        *,
        allow_errors: bool,
    ) -> None:
        self._allow_errors, self._gave_up = allow_errors, False
        self._openai, self._journal, self._settings, self._on_rows = openai, journal, settings, on_rows
        self._answered = self._refused = 0
        self._failed_in_succession = 0
        self._last_failure: str | None = None

    async def all(self, missing: Iterator[tuple[int, Mapping[str, Any]]]) -> str | None:
        self._on_rows(self._journal.answered, self._journal.rows)
        async with self._openai.AsyncOpenAI(
            base_url=self._settings.url,
            api_key=self._settings.key(),
            timeout=self._settings.timeout,
            max_retries=self._settings.retries,
        ) as client:
            number, row = next(missing)
            first = client.with_options(max_retries=min(_FIRST_RETRIES, self._settings.retries))
            try:
                await self._ask(first, number, row, is_first=True)
            except _NoAnswerNow:  # a busy server is asked again, as patiently as for the others
                await self._ask_patiently(client, number, row)
            await self._together([self._work(client, missing) for _ in range(self._settings.concurrency)])
        return self._last_failure

    async def _work(self, client: Any, missing: Iterator[tuple[int, Mapping[str, Any]]]) -> None:
        for number, row in missing:  # all workers take from one iterator
            if self._gave_up:
                return
            await self._ask_patiently(client, number, row)

    @staticmethod
    async def _together(work: Sequence[Any]) -> None:
        """All of it; when one fails, the others are ended."""
        tasks = [asyncio.ensure_future(one) for one in work]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_patiently(self, client: Any, number: int, row: Mapping[str, Any]) -> None:
        try:
            await self._ask(client, number, row)
            self._failed_in_succession = 0
        except _NoAnswerNow as error:
            self._last_failure = str(error)
            self._failed_in_succession += 1
            if self._failed_in_succession >= max(3, self._settings.concurrency):
                if self._allow_errors and self._journal.answered:
                    self._gave_up = True
                    return
                raise FFRError(
                    f"--endpoint {self._settings.url}: the last {self._failed_in_succession} requests failed, each "
                    f"tried {self._settings.retries + 1} times ({error}); {self._journal.answered} of "
                    f"{self._journal.rows} rows have their answer and are kept; run the same command again later"
                ) from None

    async def _ask(self, client: Any, number: int, row: Mapping[str, Any], *, is_first: bool = False) -> None:
        try:
            answer = _answer_of(await self._completion(client, row))
            self._answered += 1
        except self._openai.OpenAIError as error:
            self._stop_or_wait(error, is_first=is_first)
            answer = Answer("", error=self._told(error))
        except _RowFailed as error:
            if isinstance(error, _NoCompletion) and not self._answered:
                raise FFRError(
                    f"--endpoint {self._settings.url}: {self._told(error)}; is the address right? Most end in /v1"
                ) from None
            answer = Answer("", error=self._told(error))
        self._journal.append([(number, answer.to_record())])
        self._refused += answer.error is not None
        if self._refused >= _MOST_REFUSED and not self._answered:
            raise FFRError(
                f"--endpoint {self._settings.url}: each of the first {self._refused} rows is refused, such as: "
                f"{answer.error}; change the request with --body or other options, and begin anew with --restart"
            )
        self._on_rows(self._journal.answered, self._journal.rows)

    async def _completion(self, client: Any, row: Mapping[str, Any]) -> Any:
        try:
            body = await asyncio.to_thread(request_body, row, self._settings)
        except (ValueError, OSError) as error:
            raise _RowFailed(f"an image cannot be read: {error}") from None
        named = {name: body.pop(name) for name in ("model", "messages") if name in body}
        try:
            return await client.chat.completions.create(**named, extra_body=body)
        except json.JSONDecodeError as error:
            raise _NoCompletion(f"what came back is not JSON: {error}") from None

    def _stop_or_wait(self, error: Exception, *, is_first: bool) -> None:
        """Raise what stops the run, or what may go better later; return for a row that is refused."""
        status, settings = getattr(error, "status_code", None), self._settings
        told = self._told(error)
        is_lost = isinstance(error, self._openai.APIConnectionError)
        if is_first and is_lost and not isinstance(error, self._openai.APITimeoutError):
            raise FFRError(f"--endpoint {settings.url}: cannot be reached ({told}); is the address right?") from None
        if status == 401 or (status == 403 and not self._answered):
            mend = (
                f"look at the key in {settings.api_key_env}"
                if settings.api_key_env
                else "give the name of the environment variable that has it: --api-key-env NAME"
            )
            raise FFRError(f"--endpoint {settings.url}: the server refuses the key ({told}); {mend}") from None
        if status == 404 and not self._answered:
            raise FFRError(
                f"--endpoint {settings.url}: {told}; most addresses end in /v1, and --model must be a name that the "
                f"server knows (found {settings.model})"
            ) from None
        if status == 402 or getattr(error, "code", None) == "insufficient_quota":
            raise FFRError(
                f"--endpoint {settings.url}: {told}; {self._journal.answered} of {self._journal.rows} rows have their "
                "answer and are kept; run the same command again when the account is in order"
            ) from None
        if is_lost or status in (408, 409, 429) or (status or 0) >= 500:
            raise _NoAnswerNow(told) from None

    def _told(self, error: Exception) -> str:
        """A line of what the server said, without the key, should it repeat it."""
        body = getattr(error, "body", None)
        message = body.get("message") if isinstance(body, Mapping) else None
        status = getattr(error, "status_code", None)
        text = str(message or error)
        if isinstance(error, self._openai.APIConnectionError) and error.__cause__:
            text = f"{text.rstrip('.')}: {error.__cause__}"
        text = one_line(text, longest=len(text))  # it is cut below, when the key is out of it
        text = text.replace(self._settings.key(), "***") if self._settings.api_key_env else text
        told = text if status is None or text.startswith("Error code") else f"{status}: {text}"
        return told[:_LONGEST_MESSAGE]


def _answer_of(completion: Any) -> Answer:
    """The answer in a completion, whatever the server made of the format."""
    choices = getattr(completion, "choices", None)
    if not choices:
        failure = _NoCompletion if isinstance(completion, str) else _RowFailed
        raise failure(f"no choices in what came back: {str(completion)[:_LONGEST_MESSAGE]}")
    choice = choices[0]
    reason = getattr(choice, "finish_reason", None)
    message = getattr(choice, "message", None)
    content = getattr(message, "content", None)
    if isinstance(content, list):  # of parts, as some servers send it
        content = "".join([str(part.get("text") or "") for part in content if isinstance(part, Mapping)])
    if reason == "content_filter" or getattr(message, "refusal", None):
        raise _RowFailed(f"{reason or 'refusal'}: {getattr(message, 'refusal', None) or 'stopped by the server'}")
    if not content and any(getattr(message, name, None) for name in ("reasoning_content", "reasoning")):
        raise _RowFailed(
            f"reasoning and no answer (finish_reason {reason}): give the answer more room with --max-new-tokens, or "
            "turn the server's parsing of reasoning off"
        )
    if not isinstance(content, str):
        raise _RowFailed(f"no text in the answer (finish_reason {reason})")
    tokens = getattr(getattr(choice, "logprobs", None), "content", None) or ()
    # Half of a surrogate pair, which JSON can carry, fits into no file.
    text = content.encode("utf-8", "replace").decode("utf-8")
    return Answer(text, tuple([float(token.logprob) for token in tokens]), is_cut_off=reason == "length")
