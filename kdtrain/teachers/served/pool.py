"""Several servers of one model: which one is asked next, which one is left out, and which connections are trusted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from kdtrain.errors import PreflightError
from kdtrain.teachers.served.server import Bearer, Failure, Reply, Server

logger = logging.getLogger(__name__)

Verify = Callable[[str], Awaitable[None]]

_LEFT_OUT_S = 15.0
_FAILURES_TO_LEAVE_OUT = 3


class Pool:
    """The servers, as one event loop knows them.

    Args:
        urls: their addresses.
        auth: the key, if there is one.
        concurrency: requests in flight at a time, per server.
    """

    def __init__(self, urls: Sequence[str], auth: Bearer | None, concurrency: int) -> None:
        self.servers: list[Server] = []
        refused = ""
        try:
            self.servers += [Server(url, auth, concurrency) for url in urls]
        except (ImportError, ValueError) as error:
            refused = type(error).__name__  # no more of it: its text and its frames have the proxy's password
        if refused:
            raise PreflightError(
                f"The proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names cannot be used ({refused}). "
                "Repair the variable, or except the teacher's host with NO_PROXY."
            )
        self._concurrency = concurrency
        self._waiting: list[asyncio.Future[None]] = []

    @asynccontextmanager
    async def slot(self, url: str | None, avoid: Server | None, limited: bool) -> AsyncIterator[Server]:
        """A server that may be asked now; others wait for their turn.

        Args:
            url: this one alone.
            avoid: another one than this, where there is one.
            limited: whether `concurrency` holds.
        """
        while (chosen := self._pick(url, avoid, limited)) is None:
            self._waiting.append(asyncio.get_running_loop().create_future())
            await self._waiting[-1]
        chosen.in_flight += 1
        try:
            yield chosen
        finally:
            chosen.in_flight -= 1
            waiting, self._waiting = self._waiting, []
            for waiter in waiting:  # in their order; those for whom there is no place yet wait again
                if not waiter.done():
                    waiter.set_result(None)

    def _pick(self, url: str | None, avoid: Server | None, limited: bool) -> Server | None:
        now = _now()
        servers = [server for server in self.servers if url in (None, server.url)]
        assert servers, f"{url} is none of the teacher's servers"
        servers = [s for s in servers if s.left_out_until is None or s.left_out_until <= now] or servers
        servers = [server for server in servers if server is not avoid] or servers
        free = [server for server in servers if server.in_flight < self._concurrency or not limited]
        if not free:
            return None
        chosen = min(free, key=lambda server: (server.held_until > now, server.in_flight))
        if chosen.left_out_until is not None:
            chosen.left_out_until = now + _LEFT_OUT_S  # this one request tries it
        return chosen

    def has_healthy_beside(self, server: Server) -> bool:
        """Whether another one can be asked at once."""
        return any(
            other.left_out_until is None and not other.failures and other.held_until <= _now()
            for other in self.servers
            if other is not server
        )

    def note(self, server: Server, result: Reply | Failure) -> None:
        """Leave a server out that does not answer, until it does."""
        if isinstance(result, Reply) or result.kind not in ("unreachable", "failed"):
            if server.left_out_until is not None:
                logger.warning("Teacher server %s answers again.", server.url)
            server.failures, server.left_out_until = 0, None
            return
        server.failures += 1
        dead = result.kind == "unreachable" or server.failures >= _FAILURES_TO_LEAVE_OUT
        if dead and len(self.servers) > 1:
            if server.left_out_until is None:
                text = "Teacher server %s is left out, and tried again every %.0f s: %s."
                logger.warning(text, server.url, _LEFT_OUT_S, result.what)
            server.left_out_until = _now() + _LEFT_OUT_S

    async def verified(self, server: Server, connection: int, verify: Verify) -> None:
        """Wait until a check of the server has succeeded that began after the connection was opened.

        Requests that need one at the same time share it.
        """
        while server.verified < connection:
            if server.verifying is None:
                server.verifying = asyncio.create_task(_verify_once(server, verify))
            await asyncio.shield(server.verifying)

    async def close(self) -> None:
        """Close all connections."""
        for server in self.servers:
            await server.client.aclose()


async def _verify_once(server: Server, verify: Verify) -> None:
    opened = server.opened
    try:
        await verify(server.url)
        server.verified = opened
    finally:
        server.verifying = None


def _now() -> float:
    return asyncio.get_running_loop().time()
