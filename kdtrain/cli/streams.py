"""stdout and stderr that outlive whoever reads them: a pipe that closes, a terminal that goes away, a full disk.

What cannot be written is dropped, and the next line is tried again: a run is worth more than its lines. Beneath
`sys.stdout` and `sys.stderr`, so that it holds for libraries, progress bars and the interpreter's last flush too.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PATIENCE_S = 5.0
"""How long a pipe whose reader is slow, and which was opened so that nobody waits for it, is waited for."""
# Nobody reads any more, which is no fault of the output: `kdtrain schema | head`.
_NO_READER = (errno.EPIPE, errno.EBADF, errno.EIO)


class _Surviving(io.FileIO):
    """A file whose writing never fails."""

    error: OSError | None = None
    """Why something was dropped, the first time."""

    def write(self, data: Buffer) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                written = super().write(left)
                if written is None and not select.select([], [self], [], _PATIENCE_S)[1]:
                    break
                left = left[written or 0 :]
        except OSError as error:
            self.error = self.error or error
        return size


def survive() -> bool:
    """Put streams that survive in the place of this process's own; those that a test or a notebook has set stay.

    A stream that was closed before the process began leads nowhere from here on: else the next file that is opened gets
    its number, and what C code prints ends up in that file.

    Returns:
        whether both are this process's own.
    """
    own = []
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or _is_own(stream, number):
            setattr(sys, name, _surviving(number, stream))
            own.append(name)
    return len(own) == 2


def lost() -> OSError | None:
    """Why stdout lacks something that was written to it: a full disk, say. None where all is there, or nobody reads."""
    raw = _raw(sys.stdout)
    if not isinstance(raw, _Surviving):
        return None
    sys.stdout.flush()
    return raw.error if raw.error is not None and raw.error.errno not in _NO_READER else None


def _surviving(number: int, before: io.TextIOWrapper | None) -> io.TextIOWrapper:
    raw = _Surviving(number, "w", closefd=False)
    if before is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", errors="backslashreplace", line_buffering=number == 2)
    with contextlib.suppress(OSError):
        before.flush()
    return io.TextIOWrapper(
        raw if before.write_through else io.BufferedWriter(raw),  # as Python does, by -u
        before.encoding,
        errors="backslashreplace",
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )


def _is_own(stream: object, number: int) -> bool:
    """Whether a stream is the one that the interpreter has made of the process's own."""
    raw = _raw(stream)
    return isinstance(raw, io.FileIO) and not isinstance(raw, _Surviving) and raw.fileno() == number


def _raw(stream: object) -> object:
    """The file beneath a stream of text; between them is a buffer, or with PYTHONUNBUFFERED none."""
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)
