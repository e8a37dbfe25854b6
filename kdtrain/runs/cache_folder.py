"""The folder of a cache while it is written: whether it may be used, what is there already, what it will take."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdtrain.data.errors import show
from kdtrain.disk import writing
from kdtrain.errors import PreflightError
from kdtrain.runs.folder import ANSWERS
from kdtrain.teachers.cached.manifest import MANIFEST, Manifest, differences
from kdtrain.teachers.cached.store import CacheWriter

_BEGUN = f"{MANIFEST}.part"  # that was being written when the process was killed


def shown(folder: Path) -> str:
    return show(str(folder), 400)


def manifest_in(folder: Path) -> Manifest | None:
    """That of a cache that was begun or finished in a folder; None where one can begin.

    Raises:
        PreflightError: something else is there.
    """
    if folder.exists() and not folder.is_dir():
        raise PreflightError(f"--out {shown(folder)} is a file. Name a folder.")
    if not folder.exists():
        place = next(parent for parent in folder.absolute().parents if parent.exists())
        if not place.is_dir():
            raise PreflightError(f"--out {shown(folder)} lies in {shown(place)}, which is a file. Name another folder.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PreflightError(f"--out {shown(folder)}: {shown(place)} cannot be written to. Name another folder.")
        return None
    if (folder / MANIFEST).exists():
        return Manifest.read(folder)
    if any(path.name not in (_BEGUN, ANSWERS) for path in folder.iterdir()):
        raise PreflightError(f"--out {shown(folder)} is not empty, and holds no cache. Name another folder.")
    return None


def lock(folder: Path, at_the_end: ExitStack) -> None:
    """Make the folder this process's own: two that write at a time would mix up their files.

    The lock is on the folder itself, so that it is no file in it and ends with the process, however that ends. It is a
    no-op on a disk that has no locks.

    Raises:
        PreflightError: another process has it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    at_the_end.callback(_unlock, folder, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PreflightError(
            f"Another kdtrain cache is writing into --out {shown(folder)} now. Wait until it has ended, or name "
            "another folder."
        ) from None
    except OSError:
        return


def _unlock(folder: Path, handle: int) -> None:
    with suppress(OSError):  # something is in it
        folder.rmdir()
    os.close(handle)


def require_same(folder: Path, manifest: Manifest, made_from: dict[str, Any]) -> None:
    """Refuse to go on with a cache that another config has begun."""
    found = differences(manifest.made_from, made_from)
    if found:
        raise PreflightError("\n".join([f"--out {shown(folder)} holds another cache. Name another folder.", *found]))


def reopened(folder: Path, manifest: Manifest, shards: Sequence[int]) -> Manifest:
    """The manifest, which says that the cache is incomplete if a file was deleted or damaged since."""
    writer = CacheWriter(folder, manifest.form)
    whole = all(map(writer.has_shard, shards)) and (manifest.form.mode != "hidden" or writer.has_head())
    return manifest if whole else replace(manifest, complete=False)


def begin(folder: Path, manifest: Manifest, writer: CacheWriter, shards: Sequence[int]) -> list[int]:
    """Write the manifest where there is none, and return the shards that are missing; for one process."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.part"):  # of a process that was killed
            path.unlink(missing_ok=True)
        if not (folder / MANIFEST).exists():
            manifest.write(folder)
        return [number for number in shards if not writer.has_shard(number)]


def finish(folder: Path, manifest: Manifest) -> None:
    """Say in the manifest that nothing is missing; for one process."""
    with disk_errors(folder):
        replace(manifest, complete=True).write(folder)


def require_space(folder: Path, wanted: float) -> None:
    """Refuse what will not fit on the disk."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if wanted > free:
        raise PreflightError(
            f"The cache will take about {in_bytes(wanted)}, and {shown(existing)} has {in_bytes(free)} left. Make "
            "room, name a folder on another disk (--out), or store less (--top-k, --mode sample, --hidden-dtype int8)."
        )


def size_of(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A disk that is full or read-only, as an error of the cache."""
    with writing(folder, "What is whole stays there, and then the same command goes on."):
        yield


def in_bytes(count: float) -> str:
    """2.4 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
