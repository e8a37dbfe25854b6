"""`run.lock`: one run at a time in a run folder.

Rank 0 holds it for all ranks, from before anything is built to the end, whatever the end is, and touches it every few
seconds. A process that is killed leaves its lock behind. On its own machine one sees whether it still lives; from
another machine, or from another container, one watches the lock: whoever does not touch it for two minutes is gone. No
clocks are compared, since those of a network's machines differ.

Who finds out that the lock was taken from it, because its machine was suspended for so long, stops without writing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from kdtrain.config.model_folder import read_map
from kdtrain.data.errors import show
from kdtrain.disk import writing
from kdtrain.errors import CheckpointError, PreflightError
from kdtrain.ranks import is_main
from kdtrain.runs.folder import ANOTHER_FOLDER, LOCK

logger = logging.getLogger(__name__)

_READINGS_DIFFER_S = 2.0  # of the time that a process began
_TOUCH_S = 10.0
_GONE_S = 120.0
"""Without a touch: many of them, for a file system may be away for a while."""


class TakenError(CheckpointError):
    """Another run has taken the folder: it is not this one's to write into any more, its status included."""


class Lock:
    """A lock that this process holds."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text
        self._ended, self._touched_at = threading.Event(), time.time()
        self._thread = threading.Thread(target=self._touch, name="run.lock", daemon=True)
        self._thread.start()

    def require_held(self) -> None:
        """Raise if another run has taken the folder meanwhile; called before each step's end.

        Raises:
            TakenError: nothing more may be written.
        """
        # By the time of day, which goes on while a machine is suspended.
        if abs(time.time() - self._touched_at) > 2 * _TOUCH_S and self._is_anothers():
            raise TakenError(
                f"{self._path} was taken by another run, {_named(read_map(self._path))}: this one gave no sign of life "
                f"for {_GONE_S:.0f} s, as where its machine was suspended. It stops here, and writes nothing more."
            )

    def release(self) -> bool:
        """Remove it, and say so; False where the folder, or the lock, is another's by now."""
        self._ended.set()
        self._thread.join(_TOUCH_S)
        with contextlib.suppress(OSError):  # somebody has moved or deleted the folder
            if self._path.read_text("utf-8") == self._text:
                self._path.unlink()
                return True
        return False

    def _touch(self) -> None:
        while not self._ended.wait(_TOUCH_S):
            with contextlib.suppress(OSError):  # away for a moment, or deleted
                if not self._is_anothers():
                    os.utime(self._path)
                    self._touched_at = time.time()

    def _is_anothers(self) -> bool:
        try:
            return self._path.read_text("utf-8") != self._text
        except OSError:
            return False


_held: dict[Path, Lock] = {}
"""By folder, of this process."""


def require_held(run_dir: Path) -> None:
    """Raise if another run has taken a folder from this process; see `Lock`."""
    lock = _held.get(run_dir.absolute())
    if lock is not None:
        lock.require_held()


def is_mine(run_dir: Path) -> bool:
    """Whether no other run has taken a folder from this process."""
    try:
        require_held(run_dir)
    except TakenError:
        return False
    return True


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder inside; the folder is made, and removed again if nothing else came into it.

    Raises:
        PreflightError: another run holds it.
        CheckpointError: it cannot be written.
    """
    if not is_main():
        yield
        return
    existed, path = run_dir.exists(), (run_dir / LOCK).absolute()
    # Time and number make it this process's among all that ever took a lock here.
    text = json.dumps({**_this_process(), "since": time.time()}) + "\n"
    with writing(path):
        run_dir.mkdir(parents=True, exist_ok=True)
        _take(path, text)
    lock = _held[path.parent] = Lock(path, text)
    try:
        yield
    finally:
        del _held[path.parent]
        if lock.release() and not existed:
            with contextlib.suppress(OSError):
                run_dir.rmdir()


def refuse_if_locked(run_dir: Path) -> None:
    """Raise if another run is going on in a folder; remove the lock of one that is over.

    Raises:
        PreflightError: with pid, host and since when.
    """
    path = run_dir / LOCK
    if not is_main() or not path.exists():
        return
    try:
        holder, text = read_map(path), path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if _goes_on(path, holder, patient=True):
        pid = show(holder.get("pid"))
        where = "" if _is_here(holder) else f"on {show(holder.get('host'))}: "
        raise PreflightError(
            f"A run is going on in {run_dir}: {_named(holder)}. Wait for it, stop it ({where}kill {pid}), or name "
            f"{ANOTHER_FOLDER}."
        )
    by = f" ({_named(holder)})" if holder else ""
    logger.warning("%s is left from a run that was killed%s; it is taken over.", path, by)
    _remove(path, text)


def goes_on(run_dir: Path) -> bool:
    """Whether a run holds a folder's lock at this moment, as far as one look can tell."""
    path = run_dir / LOCK
    return path.exists() and _goes_on(path, read_map(path), patient=False)


def _goes_on(path: Path, holder: Mapping[str, Any], *, patient: bool) -> bool:
    if not holder:
        return False  # torn or empty: it was never held
    return _lives(holder) if _is_here(holder) else _is_touched(path, holder, patient=patient)


def _is_touched(path: Path, holder: Mapping[str, Any], *, patient: bool) -> bool:
    """Whether a process that cannot be seen from here gives a sign of life; patient, it is waited for."""
    before = _touched(path)
    if not patient:
        return before is not None and time.time() - before / 1e9 < _GONE_S
    logger.warning(
        "%s is of %s, which cannot be seen from here: waiting up to %.0f s for a sign of life.",
        path,
        _named(holder),
        _GONE_S,
    )
    until = time.monotonic() + _GONE_S
    while time.monotonic() < until:
        time.sleep(min(1.0, _GONE_S / 10))
        now = _touched(path)
        if now is None:
            return False  # it has ended meanwhile
        if now != before:
            return True
    return False


def _touched(path: Path) -> int | None:
    """When it was touched, by the clock of whoever did; opened, for a network's client remembers what it has seen."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _take(path: Path, text: str) -> None:
    """Make the lock, of which the file system has one only, also where two machines try it at once."""
    own = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    own.write_text(text, "utf-8")
    try:
        for _ in range(3):  # it may be left from a run that was killed, and then be another's who saw that first
            refuse_if_locked(path.parent)
            try:
                _make(path, own, text)
                return
            except FileExistsError:
                continue
    finally:
        own.unlink(missing_ok=True)
    raise PreflightError(f"Another run has begun in {path.parent} at this moment. Name {ANOTHER_FOLDER}.")


def _make(path: Path, own: Path, text: str) -> None:
    try:
        os.link(own, path)  # there whole, or not at all
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("x", encoding="utf-8") as file:
            file.write(text)


def _remove(path: Path, text: str) -> None:
    """Remove a lock that is over, and not one that another process has made in its place."""
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.old")
    with contextlib.suppress(OSError):
        path.rename(aside)
        if aside.read_text("utf-8", errors="replace") != text and not path.exists():
            aside.rename(path)
        else:
            aside.unlink()


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "kernel": _kernel()}


def _kernel() -> str:
    """What sees the same processes: a machine since it was started, and in it a container. Names may be given twice."""
    found = []
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def _is_here(holder: Mapping[str, Any]) -> bool:
    """Whether the process that a lock names could be seen from here."""
    return holder.get("host") == socket.gethostname() and holder.get("kernel", _kernel()) == _kernel()


def _lives(holder: Mapping[str, Any]) -> bool:
    """Whether the process that a lock names is there; a later one with the same number is another."""
    pid, since = holder.get("pid"), holder.get("since")
    if not isinstance(pid, int):
        return False
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:  # it has ended, and in some containers nobody asks how
            return False
        began = process.create_time()
    except (psutil.NoSuchProcess, ValueError):
        return False
    except psutil.AccessDenied:
        return True
    return not isinstance(since, int | float) or began <= since + _READINGS_DIFFER_S


def _named(holder: Mapping[str, Any]) -> str:
    since = holder.get("since")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since)) if isinstance(since, int | float) else show(since)
    return f"pid {show(holder.get('pid'))} on {show(holder.get('host'))}, since {when}"
