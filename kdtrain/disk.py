"""Files that cannot be written: one error for it, with the path, the reason, the bytes that are free, and a way out.

Who writes something puts `with writing(path):` around it. Libraries say it in many ways: by an OSError, a
SafetensorError with the number in its text, a RuntimeError of torch's zip writer without one, or an error of `datasets`
around any of them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdtrain.errors import CheckpointError, KdtrainError

if TYPE_CHECKING:
    import torch

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)
# Of connections, which are OSErrors as well, and no fault of a disk.
_NO_DISK = (ConnectionError, TimeoutError, InterruptedError, BlockingIOError, ChildProcessError, ProcessLookupError)
_TORCH = re.compile(r"PytorchStreamWriter|inline_container|basic_ios")
_RUST = re.compile(r"I/O error.*\(os error (\d+)\)|I/O error", re.DOTALL)
_BROKEN = (errno.EIO, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO)
_WAYS_OUT = {
    (errno.ENOSPC, errno.EDQUOT): "Make room there.",
    (errno.EFBIG,): "The limit is this process's, or the file system's: see ulimit -f.",
    _BROKEN: "The disk, or the way to it, is at fault: look at it (dmesg), or name a folder on another one.",
    _REFUSED: "Let this user write there.",
    _GONE: "It, or a folder that it lies in, was moved or deleted. Put that back.",
    _TOO_MANY: "Let a process open more of them: ulimit -n 4096.",
}


_UMASK = os.umask(0o077)  # it cannot be asked for but by setting it
os.umask(_UMASK)
_NEW_FILE = 0o666 & ~_UMASK


@dataclass(frozen=True)
class WriteFailure:
    """What a library's error says of a file that could not be written."""

    code: int | None
    """As in `errno`; None where the library does not say it."""
    reason: str
    path: str | None

    @property
    def is_full(self) -> bool:
        """Whether there is no room; torch does not say why it failed, and it is the likely reason."""
        return self.code is None or self.code in FULL


def failure_of(error: BaseException) -> WriteFailure | None:
    """What an error says of a disk, or one that it was raised from; None where it is about something else."""
    seen: BaseException | None = error
    while seen is not None:
        if found := _failure(seen):
            return found
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def _failure(error: BaseException) -> WriteFailure | None:
    if isinstance(error, KdtrainError):
        return None
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and not isinstance(error, _NO_DISK):
        if error.errno not in (None, errno.ENOMEM):
            path = error.filename2 or error.filename
            return WriteFailure(error.errno, error.strerror or text, None if path is None else os.fsdecode(path))
        return WriteFailure(errno.ENOSPC, text, None) if "disk space" in text else None
    if type(error).__name__ == "SafetensorError" and (found := _RUST.search(text)):
        code = int(found[1]) if found[1] else None
        return WriteFailure(code, os.strerror(code) if code else text, None)
    if isinstance(error, RuntimeError) and _TORCH.search(text):
        return WriteFailure(None, "the file could not be written whole", None)
    return None


@contextmanager
def writing(path: Path, then: str = "", wanted: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn what is raised inside for a disk that cannot be written to into `write_error`.

    Args:
        path: what is written; where the library names another file, that is said.
        then: what to do once the reason is gone.
        wanted: says how many bytes are needed; asked after a failure.
    """
    try:
        yield
    except KdtrainError:
        raise
    except Exception as error:
        if (failure := failure_of(error)) is None:
            raise
        raise write_error(failure, path, then, wanted and wanted()) from error


def write_error(failure: WriteFailure, path: Path, then: str = "", wanted: str | None = None) -> CheckpointError:
    """The error for a file or folder that could not be written."""
    named = Path(failure.path) if failure.path and path.is_dir() else path  # else it may be a temporary name beside it
    parts = [f"Writing {named} failed: {failure.reason.rstrip('.')}."]
    if failure.is_full and (free := free_bytes(named)) is not None:
        parts.append(f"{in_units(free)} are free there{f', and {wanted}' if wanted else ''}.")
    parts += [way for codes, way in _WAYS_OUT.items() if (failure.code or errno.ENOSPC) in codes]
    parts.append(then)
    return CheckpointError(" ".join(part for part in parts if part))


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """`safetensors.torch.save_file`, with the mode of any other new file."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path)
    path.chmod(_NEW_FILE)


def as_other_files(folder: Path) -> None:
    """Give the safetensors files in a folder the mode of any other new file.

    safetensors writes into a temporary file, which this user alone may read whatever the umask says.
    """
    for path in folder.glob("*.safetensors"):
        path.chmod(_NEW_FILE)


def free_bytes(path: Path) -> int | None:
    """Bytes that can be written at a path, which need not be there; None where nobody says."""
    try:
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        return shutil.disk_usage(existing).free
    except (OSError, ValueError):
        return None


def in_units(size: float) -> str:
    """Bytes as a person reads them."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}" if size < 100 * unit else f"{size / unit:,.0f} {name}"
    return f"{size / 2**20:.1f} MiB"
