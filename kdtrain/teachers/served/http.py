"""Requests to the servers that a teacher runs on: concurrent, checked, retried, and never to another host.

One event loop in a daemon thread serves all of them. What is retried, and how often, is in `Servers.post`.

    TeacherError
    ├── NoAnswerError   no server gave a reply, however often it was asked
    ├── StatusError     a reply with a status that says no: 400, 401, 403, 404, …
    └── (others)        replies that cannot be used; another model than before
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from kdtrain.config.server_urls import check_server_urls
from kdtrain.errors import ConfigError, TeacherError
from kdtrain.teachers.served.event_loop import EventLoop
from kdtrain.teachers.served.pool import Pool
from kdtrain.teachers.served.server import Bearer, Failure, Reply, ReplyError, Server

__all__ = ["Counts", "NoAnswerError", "ReplyError", "Servers", "StatusError"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0
_SAID = 3


class NoAnswerError(TeacherError):
    """No server gave a reply, however often it was asked."""


class StatusError(TeacherError):
    """A status that says no.

    Args:
        status: such as 400.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Counts:
    """What was asked of the servers so far."""

    requests: int = 0
    """Sent, repeated ones included."""
    retries: int = 0
    prompt_tokens: int = 0
    """As the servers' `usage` says."""
    completion_tokens: int = 0


class Servers:
    """One server, or several that serve the same model.

    Of several, the one with the fewest requests in flight is asked next. One that does not answer is left out, with a
    warning, and tried again after a pause.

    Args:
        base_urls: such as `http://127.0.0.1:8000/v1`; checked (see `config/server_urls.py`).
        api_key_env: name of the variable with the key; read here and kept by the HTTP client alone.
        timeout_s: for one reply; all attempts for one request together may take (max_retries + 1) times that.
        max_retries: further attempts after transport errors, 429 and 5xx.
        concurrency: requests in flight at a time, per server.

    Raises:
        ConfigError: an address that is refused.
        PreflightError: no key in the variable.
    """

    def __init__(
        self,
        base_urls: Sequence[str],
        *,
        api_key_env: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 5,
        concurrency: int = 8,
    ) -> None:
        for problem in check_server_urls(("base_url",), base_urls, with_key=api_key_env is not None):
            if problem.level == "error":
                raise ConfigError(f"base_url[{problem.path[-1]}]: {problem.message}; {problem.hint}")
        self.urls = tuple(url.rstrip("/") for url in base_urls)
        self.counts = Counts()
        self.timeout_s, self.max_retries, self.concurrency = timeout_s, max_retries, concurrency
        self.verify: Callable[[str], Awaitable[None]] | None = None
        """Called with a server's address when a connection to it was opened anew, before a reply that came over it is
        used: the server may have been restarted with another model. Raises TeacherError. What it asks, it asks with
        `verified=False`."""
        self._api_key_env = api_key_env
        self._auth = None if api_key_env is None else Bearer.of(api_key_env)
        self._random = random.Random()  # its own: pauses must not move the generators that training draws from
        self._bound_to: asyncio.AbstractEventLoop | None = None
        self._bound: Pool
        self._events = EventLoop()
        self._finalizer = weakref.finalize(self, self._events.close)  # also when the interpreter ends

    # --- from any thread ---

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run in the event loop's thread; the caller goes on."""
        return self._events.start(coroutine)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run and wait; a signal that arrives meanwhile ends the waiting."""
        return self._events.run(coroutine)

    def close(self) -> None:
        """Cancel what is in flight and end the thread. May be called twice."""
        self._finalizer()

    def hide(self, text: str) -> str:
        """What a server sent, without the key; before anything is cut off from it, or a part of the key may be left."""
        return text if self._auth is None else self._auth.hide(text)

    # --- in the event loop ---

    async def post(
        self,
        path: str,
        payload: Mapping[str, Any],
        read: Callable[[Any], T],
        *,
        server: str | None = None,
        verified: bool = True,
        before: Callable[[], None] | None = None,
    ) -> T:
        """What `read` makes of the JSON reply to a request.

        Transport errors, 429 and 5xx: up to `max_retries` further attempts, after `Retry-After` or growing pauses, on
        another server where there is one. A reply that is no JSON, or that `read` refuses by a `ReplyError`: asked once
        more. Other statuses: never again.

        Args:
            path: below the base URL, such as `/completions`; `/../tokenize` stands beside it.
            server: ask this one alone.
            verified: False for the requests that `verify` itself sends.
            before: called before each attempt; what it raises ends the request.

        Raises:
            TeacherError: no usable reply; names the teacher's endpoint, the status or what is wrong, and never a key.
        """
        body = json.dumps(payload, allow_nan=False, separators=(",", ":")).encode()
        return await _Request(self, "POST", path, body, server, verified, before).answer(read)

    async def get(self, path: str, read: Callable[[Any], T], *, server: str | None = None, verified: bool = True) -> T:
        """As `post`."""
        return await _Request(self, "GET", path, None, server, verified).answer(read)

    def _pool(self) -> Pool:
        """The servers in the loop that runs: a forked process has connections of its own."""
        loop = asyncio.get_running_loop()
        if self._bound_to is not loop:
            self._bound_to, self._bound = loop, Pool(self.urls, self._auth, self.concurrency)
            self._events.at_close.append(self._bound.close)
        return self._bound


class _Request:
    """One request with its attempts."""

    def __init__(
        self,
        servers: Servers,
        method: str,
        path: str,
        body: bytes | None,
        url: str | None,
        verified: bool,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.servers, self.pool = servers, servers._pool()
        self.method, self.path, self.body = method, path, body
        self.url, self.verified, self.before = url, verified, before
        self.left_s = servers.timeout_s * (servers.max_retries + 1)
        self.failed = self.malformed = 0
        self.last: Server | None = None

    async def answer(self, read: Callable[[Any], T]) -> T:
        while True:
            async with self.pool.slot(self.url, self.last, self.verified) as server:
                self.last = server
                result = await self._attempt(server)
            if isinstance(result, Reply):
                checked = await self._check(server, result)
                if checked is None:
                    try:
                        return read(result.value)
                    except ReplyError as error:
                        checked = Failure("malformed", f"a reply in which {server.quote(str(error), limit=300)}")
                result = checked
            await self._before_the_next(server, result)

    async def _attempt(self, server: Server) -> Reply | Failure:
        loop = asyncio.get_running_loop()
        hold_s = server.held_until - loop.time()
        if hold_s > 0:
            await self._pause(server, hold_s, Failure("busy", "it asked to wait", 429))
        if self.before is not None:
            self.before()
        began = loop.time()
        timeout_s = min(self.servers.timeout_s, self.left_s)
        result = await server.ask(self.method, self.path, self.body, timeout_s)
        self.left_s -= loop.time() - began
        self.servers.counts.requests += 1
        if isinstance(result, Reply):
            count_tokens(self.servers.counts, result.value)
        self.pool.note(server, result)
        return result

    async def _check(self, server: Server, reply: Reply) -> Failure | None:
        """Whether the server still has the model that it had; outside of the slot, since this asks the server too."""
        if not self.verified or self.servers.verify is None:
            return None
        try:
            await self.pool.verified(server, reply.connection, self.servers.verify)
        except NoAnswerError:
            return Failure("failed", "its model could not be checked over the new connection, since no reply came")
        return None

    async def _before_the_next(self, server: Server, failure: Failure) -> None:
        """Return when it may be asked once more, else raise."""
        if failure.kind == "malformed":
            self.malformed += 1
        else:
            self.failed += 1
        if failure.kind == "refused" or self.malformed > 1 or self.failed > self.servers.max_retries:
            raise self._error(server, failure)
        # The first ones are said, the others counted: a server that limits its rate sends many.
        level = logging.INFO if self.servers.counts.retries < _SAID else logging.DEBUG
        logger.log(level, "Teacher server %s, %s: %s; asked again.", server.url, self._name(), failure.what)
        self.servers.counts.retries += 1
        if failure.kind != "malformed":
            await self._wait(server, failure)

    async def _wait(self, server: Server, failure: Failure) -> None:
        now = asyncio.get_running_loop().time()
        server.held_until = max(server.held_until, now + failure.retry_after_s if failure.retry_after_s else 0.0)
        alone = self.url is not None or not self.pool.has_healthy_beside(server)
        if failure.retry_after_s and alone and failure.retry_after_s > self.left_s:
            raise self._error(server, failure)
        if alone and not failure.retry_after_s:
            pause_s = min(_FIRST_PAUSE_S * 2 ** (self.failed - 1), _LONGEST_PAUSE_S)
            await self._pause(server, pause_s * self.servers._random.uniform(0.75, 1.25), failure)
        elif self.left_s <= 0:
            raise self._error(server, failure)

    async def _pause(self, server: Server, seconds: float, failure: Failure) -> None:
        self.left_s -= seconds
        if self.left_s <= 0:
            raise self._error(server, failure)
        await asyncio.sleep(seconds)

    def _name(self) -> str:
        return f"{self.method} {self.path.removeprefix('/..')}"

    def _error(self, server: Server, failure: Failure) -> TeacherError:
        attempts = self.failed + self.malformed
        asked = f"{self._name()}, asked {attempts} times" if attempts > 1 else self._name()
        wait = f" (it asks to wait {failure.retry_after_s:.0f} s)" if failure.retry_after_s else ""
        remedy = failure.remedy(self.servers._api_key_env)
        several = len(self.pool.servers)
        of = f" (the last one asked of {several} servers)" if several > 1 and self.url is None else ""
        message = f"The teacher at {server.url}{of} gave no usable answer to {asked}: {failure.what}{wait}. {remedy}"
        if failure.kind == "refused" and failure.status is not None:
            return StatusError(message, failure.status)
        return TeacherError(message) if failure.kind in ("refused", "malformed") else NoAnswerError(message)


def count_tokens(counts: Counts, reply: Any) -> None:
    """Add the tokens that a reply's `usage` says."""
    usage = reply.get("usage") if isinstance(reply, dict) else None
    if not isinstance(usage, dict):
        return
    for name in ("prompt_tokens", "completion_tokens"):
        tokens = usage.get(name)
        if type(tokens) is int and tokens >= 0:
            setattr(counts, name, getattr(counts, name) + tokens)
