"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdtrain.errors import PreflightError


def require_new(folder: Path) -> None:
    """Refuse a folder that holds something, or that cannot be made."""
    if folder.exists() and not folder.is_dir():
        raise PreflightError(f"{folder} is a file. Name a new folder.")
    held = next(folder.iterdir(), None) if folder.is_dir() else None
    if held is not None:
        raise PreflightError(f"{folder} is not empty: it holds {held.name}. Name a new folder, or an empty one.")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise PreflightError(f"{folder} cannot be written: {existing} is read-only.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder, to be filled inside, that becomes `folder` at the end; after an error nothing of it is left.

    One that is there and empty is filled from a folder in it: it may be a mount, which nothing can take the place of.
    """
    folder = folder.absolute()
    is_there = folder.is_dir()
    temporary = (folder if is_there else folder.parent) / f".{folder.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if not is_there:
            temporary.rename(folder)
            return
        for child in temporary.iterdir():
            child.rename(folder / child.name)
        temporary.rmdir()
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
