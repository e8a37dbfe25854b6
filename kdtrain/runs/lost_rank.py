"""What a process says when another one of its run has ended: what gloo, NCCL and torch's store make of that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from kdtrain.errors import LostRankError, TeacherError
from kdtrain.ranks import rank, world_size

_CONNECTION = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|remote process exited|pair closure"
    r"|failed to (recv|send)|Connection was likely closed|NCCL communicator was aborted|ncclRemoteError"
    r"|[Tt]imed out (after|waiting)|[Ss]ocket Timeout|Watchdog caught collective operation timeout"
)


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Turn what a broken connection between ranks raises into `LostRankError`."""
    try:
        yield
    except Exception as error:  # also one that says so of something that a broken connection led to
        if world_size() == 1 or isinstance(error, LostRankError | TeacherError) or not _is_of_ranks(error):
            raise
        raise LostRankError(
            f"Rank {rank()} cannot go on: another process of this run has ended, and its own message, or that of the "
            "launcher, says why. Saved checkpoints are intact."
        ) from error


def _is_of_ranks(error: BaseException | None) -> bool:
    """By its text, since gloo has no class of its own; also where it was the cause of another error."""
    while error is not None:
        of_torch = type(error).__module__.startswith("torch") or type(error) is RuntimeError
        if of_torch and _CONNECTION.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
