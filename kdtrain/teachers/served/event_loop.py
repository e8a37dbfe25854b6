"""An event loop in a daemon thread, for what goes on while the main thread trains."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future, TimeoutError
from typing import Any, TypeVar

from trl.trainer.utils import shutdown_event_loop_in_daemon, start_event_loop_in_daemon

T = TypeVar("T")

_CLOSING_S = 5.0


class EventLoop:
    """Made when it is first used.

    A forked process, such as a worker of the data loader, has no thread of its parent's: there the first use makes
    another loop, and closing does nothing, for what is open belongs to the parent.
    """

    def __init__(self) -> None:
        self.at_close: list[Callable[[], Awaitable[None]]] = []
        """Awaited in the loop before it ends."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._of_parents: list[Any] = []
        self._closed = False

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the loop's thread. Cancelling the future cancels it."""
        if self._closed:
            coroutine.close()
            raise RuntimeError("the connections to the teacher's servers are closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._running())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and wait. What a signal's handler raises meanwhile ends the waiting and cancels it."""
        future = self.start(coroutine)
        assert threading.current_thread() is not self._thread, "this would wait for itself"
        try:
            return future.result()  # on POSIX a signal's handler runs, and may raise, while a lock is waited for
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what runs and end the thread. May be called twice, and from any thread."""
        self._closed = True
        if self._loop is None or self._pid != os.getpid():
            return
        loop, self._loop = self._loop, None
        if threading.current_thread() is self._thread:  # the last reference to its owner was dropped here
            loop.stop()
            return
        # What does not let itself be cancelled is left behind: the thread is a daemon.
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._wind_up(), loop).result(_CLOSING_S)
        shutdown_event_loop_in_daemon(self._thread, loop)
        if not loop.is_running():
            loop.close()

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is not None and self._pid != os.getpid():
            # Kept, so that they are never finalised here: the parent's loop and sockets are shared with this process.
            self._of_parents += [self._loop, self._thread, self.at_close]
            self._loop, self.at_close = None, []
        if self._loop is None:
            self._thread, self._loop, ready = start_event_loop_in_daemon("teacher-http")
            self._pid = os.getpid()
            ready.wait()
        return self._loop

    async def _wind_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for close in self.at_close:
            await close()
        await asyncio.get_running_loop().shutdown_asyncgens()
