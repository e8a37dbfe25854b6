"""`kdtrain_manifest.json` of a checkpoint: which files were saved, and what is in them.

It is written last, when everything else of a save is on the disk, so that a checkpoint that has one was complete. A
save begins with `UNFINISHED`, which tells one that was cut off from a checkpoint of another tool, which has no
manifest either.

| key | what |
|---|---|
| `version` | of this form: 2; of 1 there are some that have no `xxh3_128` |
| `step`, `world_size`, `time` | optimizer steps so far, processes, seconds since 1970 |
| `versions` | of the libraries that have written it |
| `files` | each file of the folder: `size` in bytes and `xxh3_128`, null where sizes alone are wanted |
| `finite` | whether trained weights and the optimizer's state were |
| `resumed_from` | the checkpoint that this run went on from: its name, a path where it is another run's, or null |
| `facts` | what a resumed run is compared with |
| `xxh3_128` | of all of that: a number that has changed on the disk would be believed otherwise |
"""

from __future__ import annotations

import errno
import json
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from kdtrain.config.model_folder import INDEX, read_map
from kdtrain.errors import ConfigError
from kdtrain.runs.folder import MANIFEST, replaced

UNFINISHED = "kdtrain_unfinished"
VERIFY = "KDTRAIN_VERIFY"
"""Environment variable: `hashes`, or `sizes` where reading a checkpoint once more would take too long: to save and
to resume."""

_LIBRARIES = ("kdtrain", "torch", "transformers", "trl", "accelerate", "peft", "datasets")
_BLOCK = 2**22
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # what some network file systems answer
_NAMED = 3  # of many files, in a message


def write_manifest(
    checkpoint: Path,
    *,
    step: int,
    world_size: int,
    finite: bool,
    resumed_from: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Bring all files of a checkpoint onto the disk, and write what they are; one process alone.

    Raises:
        OSError: reading or writing failed; there is then no manifest.
    """
    files, folders, sizes = {}, {checkpoint}, by_size()
    for path in _files(checkpoint):
        found = None if sizes else _hash(path)  # before it is synced: what was just written is read from memory
        files[path.relative_to(checkpoint).as_posix()] = {"size": path.stat().st_size, "xxh3_128": found}
        sync(path)
        folders.add(path.parent)
    manifest = {
        "version": 2,
        "step": step,
        "world_size": world_size,
        "time": time.time(),
        "versions": _versions(),
        "files": files,
        "finite": finite,
        "resumed_from": resumed_from,
        "facts": dict(facts or {}),
    }
    manifest["xxh3_128"] = _hash_of(manifest)
    with replaced(checkpoint / MANIFEST) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        _sync(file.fileno())
    for folder in {*folders, checkpoint.parent}:
        sync(folder)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; empty where there is none, or none that can be read and is as it was written."""
    found = read_map(checkpoint / MANIFEST)
    if not isinstance(found.get("files"), dict):
        return {}
    written = found.pop("xxh3_128", None)
    return found if found.get("version") == 1 or written == _hash_of(found) else {}


def why_damaged(checkpoint: Path, only: Callable[[str], bool] = lambda name: True) -> str | None:
    """What is not as it was saved, as the rest of a sentence about the checkpoint; None where all is well.

    Args:
        only: the names of the files to look at; the others need not be there.
    """
    if not (checkpoint / MANIFEST).exists():
        return _why_unreadable(checkpoint, only)
    manifest = read_manifest(checkpoint)
    if not manifest:
        return f"has a {MANIFEST} that cannot be read"
    wanted = {name: facts for name, facts in manifest["files"].items() if only(name)}
    missing = [name for name in wanted if not (checkpoint / name).is_file()]
    if missing:
        return f"lacks {_some(missing)}"
    sizes = by_size()
    found = (_difference(checkpoint / name, name, facts, sizes) for name, facts in wanted.items())
    return next((difference for difference in found if difference), None)


def is_of_the_model(name: str) -> bool:
    """Whether a file of a checkpoint makes the model: its weights, and what says how they are to be used.

    What lies in folders is a model in pieces (FSDP, DeepSpeed).
    """
    return name.endswith((".safetensors", INDEX, "config.json")) or "/" in name


def _difference(path: Path, name: str, facts: Mapping[str, Any], sizes: bool) -> str | None:
    size, saved, known = path.stat().st_size, facts["size"], facts["xxh3_128"]
    if size != saved:
        return f"has a damaged {name} ({size:,} bytes, and {saved:,} were saved)"
    try:
        changed = not sizes and known is not None and _hash(path) != known
    except OSError as error:
        return f"has a {name} that cannot be read ({error.strerror})"
    return f"has a damaged {name} (its content is not what was saved)" if changed else None


def _why_unreadable(checkpoint: Path, only: Callable[[str], bool]) -> str | None:
    """The same of a checkpoint without a manifest, as far as the files themselves say it."""
    if (checkpoint / UNFINISHED).exists():
        return "is not complete: the run ended while it was written"
    for path in _files(checkpoint):
        name = path.relative_to(checkpoint).as_posix()
        if only(name) and (reason := _unreadable(path)):
            return f"has a damaged {name} ({reason})"
    return None


def _unreadable(path: Path) -> str | None:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))
        elif path.suffix == ".safetensors":
            _check_safetensors(path)
        elif path.suffix in (".pt", ".pth", ".bin"):  # archives with a checksum of each entry
            with zipfile.ZipFile(path) as archive:
                if (entry := archive.testzip()) is not None:
                    return f"the checksum of its {entry} is wrong"
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return str(error)
    return None


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # compares the header with the size
            pass
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def by_size() -> bool:
    """Whether files are compared by their sizes alone.

    Raises:
        ConfigError: the environment says something else.
    """
    wanted = os.environ.get(VERIFY, "hashes")
    if wanted not in ("hashes", "sizes"):
        raise ConfigError(f"The environment variable {VERIFY} is {wanted!r}: it must be hashes or sizes.")
    return wanted == "sizes"


def _files(checkpoint: Path) -> list[Path]:
    ours = (checkpoint / MANIFEST, checkpoint / UNFINISHED)
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path not in ours)


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    found, block = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            found.update(block[:count])
    return found.hexdigest()


def sync(path: Path) -> None:
    """Bring a file onto the disk, or the names in a folder: a rename could else be lost with the power."""
    number = os.open(path, os.O_RDONLY)
    try:
        _sync(number)
    finally:
        os.close(number)


def _sync(number: int) -> None:
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # sources that were never installed
            continue
    return found


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
