"""One server: a single attempt at a request, and what came of it.

No exception of the HTTP client leaves this module: the frames of its traceback hold the key that was sent.
"""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import math
import os
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2

from kdtrain.config.diagnose import HIDDEN, clean
from kdtrain.config.server_urls import is_loopback, is_metadata_address
from kdtrain.errors import PreflightError

LONGEST_REPLY = 256 * 2**20
"""Bytes. 8,192 tokens with 128 entries each take some 70 MiB."""
_LONGEST_REFUSAL = 64 * 2**10
_LONGEST_QUOTE = 80
_READ_OF_QUOTES = 8000
_CONNECT_S = 10.0
# httpcore names the connection's kind in front: `connection`, or `socks` through such a proxy.
_OPENED = ".connect_tcp.complete"


class ReplyError(ValueError):
    """A reply that came with status 200 and cannot be used; its text says what is wrong with it, and where."""


@dataclass(frozen=True)
class Reply:
    """What came with status 200, read as JSON."""

    value: Any
    connection: int
    """The number of the server's connections that had been opened when the one it came over was, or more."""


@dataclass(frozen=True)
class Failure:
    """Why there is no usable reply."""

    kind: Literal["unreachable", "failed", "busy", "malformed", "refused"]
    """`unreachable`: no connection; `failed`: no reply, or 5xx; `busy`: 429; `refused`: no use in asking again."""
    what: str
    """In words that are safe to print."""
    status: int | None = None
    retry_after_s: float = 0.0

    def remedy(self, api_key_env: str | None) -> str:
        """What to do about it."""
        status = self.status
        if status in (401, 403):
            return (
                "Name the variable that holds its key in rlhf.teacher.api_key_env."
                if api_key_env is None
                else f"It refuses the key: check the variable {api_key_env}."
            )
        if status == 404:
            return "Check rlhf.teacher.base_url, which mostly ends in /v1, and rlhf.teacher.model."
        if status == 429:
            return "It wants fewer requests: lower rlhf.teacher.concurrency, or raise rlhf.teacher.max_retries."
        if status is not None and 300 <= status < 400:
            return "Redirects are not followed: if that is the server you mean, write its address into base_url."
        if status is not None and status < 500:
            return "The server refuses the request: see its log for the reason."
        if "WRONG_VERSION_NUMBER" in self.what:  # OpenSSL's words for a reply that is no TLS
            return "The server there does not speak https: write rlhf.teacher.base_url with http://."
        if self.kind == "unreachable":
            return "Check that the server runs and that rlhf.teacher.base_url is its address."
        if self.kind == "failed":
            return "See the server's log; or raise rlhf.teacher.timeout_s or max_retries, or lower concurrency."
        return "Check that rlhf.teacher.base_url is the API of the teacher, and which server and version it runs."


class Bearer(httpx2.Auth):
    """Sends the key; the only object that holds it."""

    def __init__(self, key: str) -> None:
        self._key = key

    @classmethod
    def of(cls, variable: str) -> Bearer:
        """The key in an environment variable, checked here: HTTP libraries repeat a header that they refuse."""
        key = os.environ.get(variable, "").strip()
        if not key:
            raise PreflightError(f"rlhf.teacher.api_key_env: the variable {variable} is not set. Set it to the key.")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise PreflightError(
                f"rlhf.teacher.api_key_env: what the variable {variable} holds is no key: it has spaces, line breaks "
                "or characters beyond ASCII. Set it to the key alone."
            )
        return cls(key)

    def auth_flow(self, request: httpx2.Request) -> Generator[httpx2.Request, httpx2.Response, None]:
        request.headers["Authorization"] = f"Bearer {self._key}"
        yield request

    def hide(self, text: str) -> str:
        return text.replace(self._key, HIDDEN)


class Server:
    """One server, its connections, and how it has been doing. Lives in one event loop.

    Proxies of the environment are used for other hosts, as by every HTTP client; for this machine never: what is meant
    for a local server would leave it, key included.
    """

    def __init__(self, url: str, auth: Bearer | None, concurrency: int) -> None:
        self.url, self._auth = url, auth
        self.in_flight = 0
        self.failures = 0
        """In a row, without any reply between them."""
        self.left_out_until: float | None = None
        self.held_until = 0.0
        """Until when it asked for no requests."""
        self.opened = 0
        """Connections so far."""
        self.verified = 0
        """How many of them had been opened when the last check began that found the right model."""
        self.verifying: asyncio.Task[None] | None = None
        self.client = httpx2.AsyncClient(
            auth=auth,
            timeout=httpx2.Timeout(None, connect=_CONNECT_S),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency + 1, keepalive_expiry=60),
            follow_redirects=False,
            trust_env=not is_loopback(urlsplit(url).hostname or ""),
        )

    async def ask(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Reply | Failure:
        """One attempt, within `timeout_s` from the first byte sent to the last one received."""
        try:
            response, content, connection = await asyncio.wait_for(self._exchange(method, path, body), timeout_s)
            if response.status_code != 200:
                return self._not_ok(response, content)
            return self._read(content, connection)
        except asyncio.TimeoutError:
            return Failure("failed", f"no complete reply within {timeout_s:.3g} s")
        except (ReplyError, httpx2.DecodingError) as error:
            return Failure("malformed", f"a reply that cannot be read ({self._named(error)})")
        except _MetadataAddress:
            return Failure("refused", "its name leads to an address where clouds hand out credentials")
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            return Failure("unreachable", f"no connection ({self._named(error)})")
        except httpx2.HTTPError as error:
            return Failure("failed", f"the connection broke ({self._named(error)})")

    async def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[httpx2.Response, bytes, int]:
        connection, before = 0, self.opened

        async def trace(event: str, info: dict[str, Any]) -> None:
            nonlocal connection
            if event.endswith(_OPENED):
                self.opened += 1
                connection = self.opened
                _check_peer(info["return_value"])

        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = self.client.stream(
            method, self.url + path, content=body, headers=headers, extensions={"trace": trace}
        )
        async with request as response:
            content = await _content(response)
        return response, content, connection or before

    def _read(self, content: bytes, connection: int) -> Reply | Failure:
        try:
            return Reply(strict_json(content), connection)
        except ReplyError as error:
            text = content[:_READ_OF_QUOTES].decode("utf-8", "replace")
            return Failure("malformed", f"a reply that {error}: '{self.quote(text)}'")

    def _not_ok(self, response: httpx2.Response, content: bytes) -> Failure:
        status = response.status_code
        what = f"status {status}"
        if 300 <= status < 400:
            return Failure("refused", f"{what}, a redirect to {self._target(response)}", status)
        what += f": '{self.quote(_message(content))}'"
        kind: Literal["busy", "failed", "refused"] = "refused"
        if status == 429 or status >= 500:
            kind = "busy" if status == 429 else "failed"
        return Failure(kind, what, status, _seconds(response.headers.get("retry-after", "")))

    def _target(self, response: httpx2.Response) -> str:
        """The host alone, for the rest may have a key in it."""
        try:
            host = urlsplit(response.headers.get("location", "")).hostname
        except ValueError:
            host = None
        return f"host '{self.quote(host)}'" if host else "another path"

    def quote(self, text: str, limit: int = _LONGEST_QUOTE) -> str:
        """The beginning of what a server sent, without keys and control characters."""
        text = text if self._auth is None else self._auth.hide(text)
        text = clean(" ".join(text[:_READ_OF_QUOTES].split()))
        return text if len(text) <= limit else text[: limit - 1] + "…"

    def _named(self, error: Exception) -> str:
        return f"{type(error).__name__}: {self.quote(str(error))}" if str(error) else type(error).__name__


class _MetadataAddress(Exception):
    """The other end of a connection is where no key and no prompt must go."""


def _check_peer(stream: Any) -> None:
    """Before anything is sent: a name may lead anywhere."""
    peer = stream.get_extra_info("server_addr")
    if isinstance(peer, tuple) and is_metadata_address(ipaddress.ip_address(peer[0].partition("%")[0])):
        raise _MetadataAddress


async def _content(response: httpx2.Response) -> bytes:
    pieces, size, ok = [], 0, response.status_code == 200
    async for piece in response.aiter_bytes():
        pieces.append(piece)
        size += len(piece)
        if ok and size > LONGEST_REPLY:
            raise ReplyError(f"the reply is longer than {LONGEST_REPLY // 2**20} MiB")
        if not ok and size > _LONGEST_REFUSAL:
            break
    return b"".join(pieces)


def strict_json(content: bytes) -> Any:
    """JSON as the standard has it: UTF-8, no NaN, no key twice in an object.

    Raises:
        ReplyError: what it does instead.
    """
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_without_repeats)
    except ReplyError:
        raise
    except (ValueError, RecursionError):
        raise ReplyError("is no JSON") from None


def _no_constant(name: str) -> None:
    raise ReplyError(f"has {name}, which is no JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ReplyError("has a key twice in an object")
    return found


def _message(content: bytes) -> str:
    """The text of an error as OpenAI's API and vLLM write it, or all of it."""
    text = content.decode("utf-8", "replace")
    try:
        found = json.loads(text)["error"]["message"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return text
    return found if isinstance(found, str) else text


def _seconds(retry_after: str) -> float:
    """Of a Retry-After header: seconds, or a date; 0 where it says neither."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
