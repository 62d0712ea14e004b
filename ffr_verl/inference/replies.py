"""What a server for chat completions sent back: an answer, or why there is none.

Everything in it is foreign: a field may be missing, or hold anything that JSON has.
"""

from __future__ import annotations

import email.utils
import http
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ffr_verl.inference.generate import Answer
from ffr_verl.predictions import LEAST_LOGPROB, cut_off_before_text

_FOR_THE_MOMENT = (408, 409, 425, 429)
# What an error in a good reply says, where it gives no status; anything else may pass.
_STATUS_OF_WORDS = {
    "rate_limit": 429,
    "too_many": 429,
    "overloaded": 503,
    "unavailable": 503,
    "server_error": 500,
    "authentication": 401,
    "content": 400,
    "invalid": 400,
    "length": 400,
}


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply, of any status."""

    status: int
    headers: Mapping[str, str]  # names in lower case
    content: bytes


class FailedReply(Exception):
    """There is no answer; the message says why, in the server's own words, as long as they are.

    Attributes:
        status: of the reply, or that which an error inside it names.
        is_for_the_moment: whether the same request may be answered later.
        is_of_chat: whether it comes from a server for chat completions at all.
        is_quota: whether the account is empty.
        wait: seconds that the server asks to wait until the request is tried again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        is_for_the_moment: bool = False,
        is_of_chat: bool = True,
        is_quota: bool = False,
        wait: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.wait = status, wait
        self.is_for_the_moment = is_for_the_moment or status in _FOR_THE_MOMENT or (status or 0) >= 500
        self.is_of_chat, self.is_quota = is_of_chat, is_quota


class LostReply(FailedReply):
    """No whole reply came; `is_reached`: although somebody is at the address."""

    def __init__(self, message: str, *, is_reached: bool = False) -> None:
        super().__init__(message, is_for_the_moment=True)
        self.is_reached = is_reached


def answer_of(reply: Reply) -> Answer:
    """The answer in a reply; a `FailedReply` when there is none."""
    is_good = 200 <= reply.status < 300
    try:
        found = json.loads(reply.content)
    except (ValueError, RecursionError) as error:
        if is_good:
            said = f"what came back is not JSON: {error}: {_text(reply)}"
            raise FailedReply(said, is_for_the_moment=True, is_of_chat=False) from None
        found = None
    completion = found if isinstance(found, dict) else {}
    choices = completion.get("choices")
    choice = _dict(choices[0]) if isinstance(choices, list) and choices else {}
    if not is_good:
        raise _refusal(reply, completion)
    if (failure := _error_in(completion, choice, reply.headers)) is not None:
        raise failure
    if not choice:
        raise FailedReply(f"no choices in what came back: {_text(reply)}", is_of_chat=isinstance(found, dict))
    reason, message = choice.get("finish_reason"), _dict(choice.get("message"))
    if reason == "content_filter" or message.get("refusal"):
        raise FailedReply(f"{reason or 'refusal'}: {message.get('refusal') or 'stopped by the server'}")
    content = message.get("content")
    if isinstance(content, list):  # of parts, as some servers send it
        content = "".join([str(_dict(part).get("text") or "") for part in content])
    is_cut_off = reason == "length"
    if not content and any(message.get(name) for name in ("reasoning_content", "reasoning")):
        error_text = (
            f"reasoning and no answer (finish_reason {reason}): give the answer more room with --max-new-tokens, or "
            "turn the server's parsing of reasoning off"
        )
        return Answer("", is_cut_off=is_cut_off, error=error_text)
    if cut_off := cut_off_before_text(content if isinstance(content, str) else "", is_cut_off=is_cut_off):
        return Answer("", is_cut_off=True, error=cut_off)
    if not isinstance(content, str):
        raise FailedReply(f"no text in the answer (finish_reason {reason})")
    # Half of a surrogate pair, which JSON can carry, fits into no file.
    text = content.encode("utf-8", "replace").decode("utf-8")
    return Answer(text, _logprobs(choice), is_cut_off=is_cut_off)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(reply: Reply) -> str:
    return reply.content.decode("utf-8", "replace")


def _refusal(reply: Reply, body: dict[str, Any]) -> FailedReply:
    """Of a status that says it did not go well."""
    error = body.get("error")
    fields = error if isinstance(error, dict) else body
    if 300 <= reply.status < 400:
        message = f"a redirect to {reply.headers.get('location')}, which is not followed"
    else:
        said = error if isinstance(error, str) else fields.get("message") or fields.get("detail")
        message = str(said or _text(reply) or _phrase(reply.status))
    return FailedReply(
        f"{reply.status}: {message}",
        status=reply.status,
        is_quota=fields.get("code") == "insufficient_quota",
        wait=_asked_wait(reply.headers),
    )


def _phrase(status: int) -> str:
    return http.HTTPStatus(status).phrase if status in list(http.HTTPStatus) else "no text"


def _error_in(completion: dict[str, Any], choice: dict[str, Any], headers: Mapping[str, str]) -> FailedReply | None:
    """The error in a reply that says it went well."""
    found = completion.get("error") or choice.get("error")
    if not found and completion.get("object") == "error":  # as older servers have it
        found = completion
    if not found:
        return None
    error = found if isinstance(found, dict) else {"message": found}
    codes = [str(error.get(name)).lower() for name in ("code", "status", "status_code", "type")]
    status = next((int(code) for code in codes if re.fullmatch("[45][0-9]{2}", code)), None)
    if status is None:
        said = " ".join(codes)
        status = next((code for word, code in _STATUS_OF_WORDS.items() if word in said), None)
    message = str(error.get("message") or found)
    return FailedReply(
        message if status is None else f"{status}: {message}",
        status=status,
        is_for_the_moment=status is None,
        is_quota="insufficient_quota" in codes,
        wait=_asked_wait(headers),
    )


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait until a request is tried again."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        asked = headers.get(name, "")
        try:
            seconds = unit * float(asked)
        except ValueError:
            date = email.utils.parsedate_tz(asked)
            try:
                seconds = math.nan if date is None else email.utils.mktime_tz(date) - time.time()
            except (ValueError, OverflowError):  # a date that no calendar has
                seconds = math.nan
        if seconds >= 0:
            return seconds
    return None


def _logprobs(choice: dict[str, Any]) -> tuple[float, ...]:
    """Of the answer's tokens; none where one of them has none."""
    tokens = _dict(choice.get("logprobs")).get("content")
    values = [_dict(token).get("logprob") for token in tokens] if isinstance(tokens, list) else []
    found = [_number(value) for value in values]
    return () if any(map(math.isnan, found)) else tuple([max(value, LEAST_LOGPROB) for value in found])


def _number(value: Any) -> float:
    """NaN for what is no log-probability, or none that a float has."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value == math.inf:
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
