"""What signals do that ask a process to end. Every handler is set here; none of this needs torch.

| signal | who sends it |
|---|---|
| SIGINT | Ctrl-C |
| SIGTERM | `kill`, a scheduler |
| SIGHUP | a terminal that is closed |
| SIGUSR1 | SLURM's `--signal=USR1@120`, before the time is up |
| SIGXCPU | the system, once a second from the limit of CPU time on (`ulimit -S -t`) |

| when the signal comes | what happens |
|---|---|
| `kdtrain fit` waits for a launcher | it goes on to the launcher, which sends it to the ranks: `passed_on_to` |
| another command; while a run is built, and after training | an error at once, so that its lock goes: `interrupting` |
| the teacher writes answers | the same; what it has written is kept |
| while training | the step is finished, a checkpoint saved, the run ends: `StopRequest`, which `callbacks.py` asks |
| evaluation while training | it is left after its batch, a checkpoint saved, the run ends |
| training, a second one 1 s later or more | an error at once |

Every error of these is `Interrupted`, with exit code 128 + the signal's number. A signal that is ignored when a process
begins stays ignored: `nohup` does that to SIGHUP, and a shell to SIGINT of what it runs in the background.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kdtrain.errors import Interrupted

logger = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], None]

ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGXCPU") if hasattr(signal, name)
)
"""Those that this system has."""

# They announce the end, and come again while the state is saved: SIGXCPU each second, SIGTERM some time after SIGUSR1.
_ANNOUNCING = frozenset(getattr(signal, name) for name in ("SIGUSR1", "SIGXCPU") if hasattr(signal, name))

# A terminal sends Ctrl-C to every process of the group, and a launcher passes its own copy on to the workers: signals
# this close together are one request.
_SAME_REQUEST_S = 1.0

OUTSIDE_OF_TRAINING = "Interrupted outside of training: nothing more was saved."


class _EndsAtOnce(KeyboardInterrupt):
    """What a handler raises, until `_handled_by` makes it an `Interrupted`.

    It comes up in the middle of any line, and an `except Exception` there must not take it for an error of that line,
    such as an image that cannot be read.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.message = message


def end_silently_at_interrupts() -> None:
    """Let Ctrl-C end this process as other signals do, while it imports and wherever nothing else is said here.

    Python would raise in the middle of an import, and print where. Of a process that is the command's own.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _handled_by(handler: Handler) -> Iterator[None]:
    """Handle the signals inside; the previous handlers come back on every way out.

    Only the main thread of a process may: in another one signals are left to it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [signum for signum in ENDING if signal.getsignal(signum) is not signal.SIG_IGN]
    previous = {signum: signal.signal(signum, handler) for signum in heard}
    try:
        yield
    except _EndsAtOnce as stop:
        raise Interrupted(stop.signum, stop.message) from None
    finally:
        for signum, before in previous.items():
            signal.signal(signum, signal.SIG_DFL if before is None else before)  # None: not set by Python


@contextmanager
def passed_on_to(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let a process that was started end first, and then this one; it must be in a session of its own.

    Else a terminal would send Ctrl-C to both, and it would come there twice.
    """
    with _handled_by(lambda signum, frame: process.send_signal(signum)):
        yield


@contextmanager
def interrupting(message: str) -> Iterator[None]:
    """Turn a signal into `Interrupted(message)` at once."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise _EndsAtOnce(signum, message)

    with _handled_by(stop):
        yield


@contextmanager
def every_signal_named() -> Iterator[None]:
    """What a command does about signals where nothing else is said: it ends at once, with the signal's exit code."""
    try:
        with interrupting(OUTSIDE_OF_TRAINING):
            yield
    except KeyboardInterrupt:  # of a library, or an interpreter that others have embedded
        raise Interrupted(signal.SIGINT, OUTSIDE_OF_TRAINING) from None


class StopRequest:
    """Notes that a signal came, for the end of the step; a second one is `Interrupted` at once."""

    def __init__(self) -> None:
        self.noted = 0
        """The signal that came to this process; 0 if none."""
        self._insisted_at = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals inside."""
        with _handled_by(self._note):
            yield

    def _note(self, signum: int, frame: FrameType | None) -> None:
        again = self._insisted_at and time.monotonic() - self._insisted_at > _SAME_REQUEST_S
        if signum not in _ANNOUNCING:
            if again:
                raise _EndsAtOnce(signum, "Second signal: stopped at once; what was saved before it is intact.")
            self._insisted_at = self._insisted_at or time.monotonic()
        if not self.noted:
            self.noted = signum
            logger.warning(
                "%s: finishing this step, then saving. Another one ends the run at once, without saving.",
                signal.Signals(signum).name,
            )


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` inside after so many seconds; where signals cannot be used, there is no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no answer within {seconds:,.0f} s")

    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # a timer of somebody else's goes on
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001), interval)
