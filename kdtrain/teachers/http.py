"""Requests to the servers that a teacher runs on: concurrent, checked, retried, and never to another host.

One event loop in a daemon thread serves all of them. What is retried, and how often, is in `Servers.post`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class ReplyError(ValueError):
    """A reply that came with status 200 and cannot be used; its text says what is wrong with it, and where."""


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

    Args:
        base_urls: such as `http://127.0.0.1:8000/v1`; checked (see `config/server_urls.py`).
        api_key_env: name of the variable with the key; read here and kept by the HTTP client alone.
        timeout_s: for one reply; all attempts for one request together may take (max_retries + 1) times that.
        max_retries: further attempts after transport errors, 429 and 5xx.
        concurrency: requests in flight at a time, per server.
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
        raise NotImplementedError

    urls: tuple[str, ...]
    concurrency: int
    counts: Counts
    verify: Callable[[str], Awaitable[None]] | None = None
    """Called with a server's address when a connection to it was opened anew, before a reply that came over it is
    used: the server may have been restarted with another model. Raises TeacherError."""

    async def post(
        self,
        path: str,
        payload: Mapping[str, Any],
        read: Callable[[Any], T],
        *,
        server: str | None = None,
        verified: bool = True,
    ) -> T:
        """What `read` makes of the JSON reply to a request.

        Transport errors, 429 and 5xx: up to `max_retries` further attempts, after `Retry-After` or growing pauses, on
        another server where there is one. A reply that is no JSON, or that `read` refuses by a `ReplyError`: asked once
        more. Other statuses: never again.

        Args:
            path: below the base URL, such as `/completions`; `/../tokenize` stands beside it.
            server: ask this one alone.
            verified: False for the requests that `verify` itself sends.

        Raises:
            TeacherError: no usable reply; names the teacher's endpoint, the status or what is wrong, and never a key.
        """
        raise NotImplementedError

    async def get(self, path: str, read: Callable[[Any], T], *, server: str | None = None) -> T:
        """As `post`."""
        raise NotImplementedError

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run in the event loop's thread; the caller goes on."""
        raise NotImplementedError

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run and wait; a signal that arrives meanwhile ends the waiting."""
        raise NotImplementedError

    def close(self) -> None:
        """Cancel what is in flight and end the thread. May be called twice."""
        raise NotImplementedError
