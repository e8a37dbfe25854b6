"""Folders for files in the making, in a cache that several processes use at once.

Whoever makes one holds a lock on it, which ends with the process: so what a process that was killed has left behind is
told from what another one is still writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAMES = ("reading-", "encoding-")
_LEFT_BY_OTHERS_S = 24 * 3600  # of a machine whose locks may not be seen here


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent`, removed at the end with what is in it; and what killed processes have left is removed.

    Args:
        name: one of `_NAMES`, which says what for.
    """
    assert name in _NAMES
    with alone_in(parent):  # else another process could take it for left behind before it is locked
        _remove_left(parent)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}{_host()}-", dir=parent))
        number = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # not every file system can: then nobody removes it either
            fcntl.flock(number, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(number)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One process at a time; where the file system knows no locks, nobody waits."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def _remove_left(parent: Path) -> None:
    for folder in [path for name in _NAMES for path in parent.glob(f"{name}*")]:
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where its process lives
                if _host() in folder.name or time.time() - _last_written(folder) > _LEFT_BY_OTHERS_S:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(number)


def _last_written(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "", socket.gethostname())[:32]
