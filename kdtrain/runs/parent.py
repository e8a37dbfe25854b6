"""A process of a run ends with the process that started it.

A launcher that is killed cannot end its ranks, and they would train on, without anybody who knows of them. Each process
below a launcher looks for its parent itself: where that has gone, it does what it does at SIGTERM (while training the
step is finished and the state saved), and is killed if it has not ended after a while, with all that it has started.
That is no signal of the kernel's at the parent's death (`PR_SET_PDEATHSIG`), which could not wait for a checkpoint, and
which only Linux has.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time

STARTED_BY = "KDTRAIN_STARTED_BY"
"""Variable with pid and host of the process of ours that has started this one."""

_LOOK_S = 1.0
GRACE_S = 20.0


def started_by_me() -> dict[str, str]:
    """The environment of a process that this one starts."""
    return {**os.environ, STARTED_BY: f"{os.getpid()} {socket.gethostname()}"}


def end_with_parent() -> None:
    """From now on, in a process that a launcher has started; in another one nothing."""
    parent = os.getppid()
    launched = STARTED_BY in os.environ or "TORCHELASTIC_RUN_ID" in os.environ or _is_accelerate(parent)
    if launched and parent:
        threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _is_accelerate(parent: int) -> bool:
    """Whether it is `accelerate launch` of one process; its variables alone may be left in a shell."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return False
    import psutil

    with contextlib.suppress(psutil.Error):
        return "launch" in psutil.Process(parent).cmdline()[1:4]
    return False


def _watch(parent: int) -> None:
    while os.getppid() == parent and _starter_lives():
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    import psutil

    # It hangs, in a collective for example: neither a handler nor an exception would be heard.
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def _starter_lives() -> bool:
    """Also where the parent went before this process has looked for it the first time."""
    import psutil

    pid, _, host = os.environ.get(STARTED_BY, "").partition(" ")
    return host != socket.gethostname() or psutil.pid_exists(int(pid))
