"""One server, asked over HTTP: where requests go, what goes with them, and how long and how large a reply may be."""

from __future__ import annotations

import asyncio
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from ffr_verl import __version__
from ffr_verl.errors import FFRError, one_line
from ffr_verl.inference.replies import LostReply, Reply

MOST_BYTES = 64 * 2**20  # of a reply: 32,000 tokens with 20 log-probabilities each take less


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for an address, as curl and others read it; `None` without one."""
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies_environment()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass_environment(parts.netloc, proxies):  # type: ignore[attr-defined]
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


class Server:
    """An OpenAI-compatible server, within a context.

    Nothing but the address, or the proxy of the environment, is contacted: no redirect is followed. No header is sent
    but those given and what HTTP itself needs.

    Attributes:
        proxy: host and port of the proxy that requests go through, if any.

    Raises:
        FFRError: when httpx is missing, or proxy or certificates of the environment cannot be used.
    """

    def __init__(self, url: str, headers: Mapping[str, str], *, timeout: float) -> None:
        try:
            import httpx
        except ImportError:
            raise FFRError("--endpoint needs the package httpx: pip install httpx") from None
        self._httpx = httpx
        self._address = url.rstrip("/")
        self._timeout = timeout
        proxy = proxy_of(url)
        self.proxy = proxy and urllib.parse.urlsplit(proxy).netloc.rpartition("@")[2]
        try:
            certificates = httpx.create_ssl_context()
        except OSError as error:
            name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
            raise FFRError(
                f"{name}={os.environ.get(name)}: {error.strerror or error}; give one with certificates, or unset it"
            ) from None
        try:
            self._client: Any = httpx.AsyncClient(
                headers={
                    "content-type": "application/json",
                    "accept": "application/json",
                    "user-agent": f"ffr-verl/{__version__}",
                    **headers,
                },
                timeout=None,  # of each read, which would let a slow reply go on for ever; see `post`
                limits=httpx.Limits(max_connections=None),
                follow_redirects=False,
                trust_env=False,  # proxy and certificates are read above
                proxy=proxy,
                verify=certificates,
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            host = urllib.parse.urlsplit(url).hostname
            package = " (pip install 'httpx[socks]')" if "socks" in str(error).lower() else ""
            said = re.sub(r"//[^\s@]*@", "//", one_line(str(error)))  # a proxy's user and password
            raise FFRError(
                f"--endpoint {url}: the proxy of ALL_PROXY, HTTPS_PROXY or HTTP_PROXY cannot be used{package}: "
                f"{said}; mend it, or go round it with NO_PROXY={host}"
            ) from None

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._client.aclose()

    async def post(self, body: bytes) -> Reply:
        """The reply to a request for a chat completion; a `LostReply` when none comes whole within the time and
        `MOST_BYTES`."""
        return await self._reply("POST", "chat/completions", body)

    async def get(self, path: str) -> Reply:
        """What the server has at a path, as `post`."""
        return await self._reply("GET", path, None)

    async def _reply(self, method: str, path: str, body: bytes | None) -> Reply:
        try:
            return await asyncio.wait_for(self._whole(method, f"{self._address}/{path}", body), self._timeout)
        except asyncio.TimeoutError:
            raise LostReply(f"no whole reply within {self._timeout:g} s (--timeout)", is_reached=True) from None
        except self._httpx.RequestError as error:
            raise LostReply(f"Connection error: {error or type(error).__name__}") from None

    async def _whole(self, method: str, address: str, body: bytes | None) -> Reply:
        async with self._client.stream(method, address, content=body) as response:
            content = bytearray()
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > MOST_BYTES:
                    raise LostReply(f"a reply of more than {MOST_BYTES // 2**20} MiB", is_reached=True)
            return Reply(response.status_code, dict(response.headers), bytes(content))
