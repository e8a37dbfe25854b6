"""`run.lock`: one run at a time in a run folder.

Rank 0 holds it for all ranks, from before anything is built to the end, whatever the end is. A process that is killed
leaves its lock behind: whether that process still lives can be seen on its own machine only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from kdtrain.config.model_folder import read_map
from kdtrain.data.errors import show
from kdtrain.disk import writing
from kdtrain.errors import PreflightError
from kdtrain.ranks import is_main
from kdtrain.runs.folder import ANOTHER_FOLDER, LOCK, LOG, write_atomically

logger = logging.getLogger(__name__)

_READINGS_DIFFER_S = 2.0  # of the time that a process began


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run folder inside; the folder is made, and removed again if nothing else came into it.

    Raises:
        PreflightError: another run holds it, or may do so on another machine.
        CheckpointError: it cannot be written.
    """
    if not is_main():
        yield
        return
    existed, path = run_dir.exists(), run_dir / LOCK
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}) + "\n"
    with writing(path):
        run_dir.mkdir(parents=True, exist_ok=True)
        with _alone_in(run_dir):
            _take(path, text)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # somebody has moved or deleted the folder
            if path.read_text("utf-8") == text:
                path.unlink()
            if not existed:
                run_dir.rmdir()


def refuse_if_locked(run_dir: Path) -> None:
    """Raise if another run is going on in a folder, as far as this process can see.

    Raises:
        PreflightError: with pid, host and since when.
    """
    path = run_dir / LOCK
    holder = read_map(path)  # of a torn or empty file nothing can be said
    if not is_main() or not holder:
        return
    here, pid = socket.gethostname(), show(holder.get("pid"))
    if holder.get("host") == here:
        if _lives(holder):
            raise PreflightError(
                f"A run is going on in {run_dir}: {_named(holder)}. Wait for it, stop it (kill {pid}), or name "
                f"{ANOTHER_FOLDER}."
            )
        return
    raise PreflightError(
        f"{path} says that a run is going on in this folder on another machine: {_named(holder)}. {_last_sign(run_dir)}"
        f"Whether it still lives cannot be seen from {here}: look there (ps -p {pid}). If it is over, delete "
        f"{path} and start again; or name {ANOTHER_FOLDER}."
    )


def _take(path: Path, text: str) -> None:
    refuse_if_locked(path.parent)
    if path.exists():
        logger.warning("%s is left from a run that was killed (%s); it is taken over.", path, _named(read_map(path)))
    write_atomically(path, text)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two processes of this machine that start at once look for the lock one after the other."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system can
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


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


def _last_sign(run_dir: Path) -> str:
    with contextlib.suppress(OSError):
        minutes = (time.time() - (run_dir / LOG).stat().st_mtime) / 60
        return f"Its last record is {minutes:,.0f} minutes old. "
    return ""
