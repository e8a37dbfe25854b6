"""A file of a cache as bytes: safetensors, written here so that no version of a library changes a byte of it.

    8 bytes       length of the header
    header        JSON: the tensors, and under `__metadata__` one text, JSON again: version, what the data are, checksum
    index         ends [R] uint64, sums [R] uint64, keys [R, 16] uint8, counts [R] uint32, shared [·] uint8
    data          [·] uint8: row i's are data[ends[i − 1] : ends[i]]

Checksums are in two layers. `sums` are xxh3_64 of each row's data, and the header has an xxh3_128 of itself and the
index with these sums in it, so that together they are one checksum of the file. The index is checked when a cache is
opened, a row whenever it is read: to check whole files would be to read the whole cache before the first step.

Shapes: R rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from kdtrain.data.errors import show
from kdtrain.errors import DataError

VERSION = 1
_AGAIN = "Delete it and run the same `kdtrain cache` again: it writes what is missing."
_LARGEST_HEADER = 1 << 20


@dataclass(frozen=True)
class Encoded:
    """The targets of a shard's rows as bytes, and what is needed to read them."""

    about: dict[str, Any]
    """Numbers that all rows are decoded with."""
    rows: list[np.ndarray]
    shared: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    """Bytes that all rows are decoded with."""


@dataclass(frozen=True)
class Index:
    """What a shard says of its rows."""

    about: Mapping[str, Any]
    """What the writer said of the data: the same text for the same data."""
    keys: np.ndarray
    counts: np.ndarray
    ends: np.ndarray
    sums: np.ndarray
    shared: np.ndarray
    """Bytes that all rows are decoded with."""
    start: int
    """Where the data begin in the file."""

    way: tuple[str, bytes]
    """Rows of shards that are equal in it are decoded together."""

    def place(self, row: int) -> tuple[int, int]:
        """First byte of a row in the file, and the one behind its last."""
        begin = int(self.ends[row - 1]) if row else 0
        return self.start + begin, self.start + int(self.ends[row])


def write_shard_file(
    path: Path,
    about: Mapping[str, Any],
    keys: Sequence[bytes],
    counts: Sequence[int],
    rows: Sequence[np.ndarray],
    shared: np.ndarray,
) -> None:
    """Write a shard: it appears as a whole, or not at all."""
    ends = np.cumsum([len(row.data) for row in rows], dtype="<u8")
    sums = np.array([xxhash.xxh3_64_intdigest(row.data) for row in rows], dtype="<u8")
    index = b"".join(
        [
            ends.tobytes(),
            sums.tobytes(),
            b"".join(keys),
            np.array(counts, dtype="<u4").tobytes(),
            shared.tobytes(),
        ]
    )
    size = int(ends[-1]) if len(ends) else 0
    header = _header(about, len(keys), shared.nbytes, size, index)
    replace_file(path, [header, index, *(row.data for row in rows)])


def replace_file(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file under another name beside it, then move it to its own; nothing is left of it after an error."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """A rename survives a power cut once its folder is on the disk as well."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(about: Mapping[str, Any], rows: int, shared: int, data: int, index: bytes) -> bytes:
    """The first bytes of a shard, which follow from what is in it."""
    said = {"version": VERSION, "about": about, "rows": rows, "shared": shared, "data": data}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    checksum = xxhash.xxh3_128_hexdigest(text.encode() + index)
    tensors = {
        "ends": ("U64", [rows], 8 * rows),
        "sums": ("U64", [rows], 8 * rows),
        "keys": ("U8", [rows, 16], 16 * rows),
        "counts": ("U32", [rows], 4 * rows),
        "shared": ("U8", [shared], shared),
        "data": ("U8", [data], data),
    }
    return safetensors_header({"kdtrain": text, "xxh3_128": checksum}, tensors)


def safetensors_header(said: Mapping[str, str], tensors: Mapping[str, tuple[str, list[int], int]]) -> bytes:
    """The length and the JSON of a safetensors file: tensors in this order, by dtype, shape and bytes."""
    header: dict[str, Any] = {"__metadata__": dict(said)}
    begin = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def header_bytes(path: Path) -> int:
    """Bytes in front of the index of a shard, which do not grow with its rows."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def read_index(path: Path) -> Index:
    """The header and the index of a shard, checked.

    Raises:
        DataError: it is missing, damaged, cut off, or none of ours.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, _LARGEST_HEADER))
            said = _said(path, header)
            rows, shared = said["rows"], said["shared"]
            index = file.read(36 * rows + shared)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    start = 8 + length + len(index)
    if size != start + said["data"] or len(index) != 36 * rows + shared:
        raise damaged(path, f"it has {size:,} bytes and not {8 + length + 36 * rows + shared + said['data']:,}")
    expected = _header(said["about"], rows, shared, said["data"], index)
    if expected[8:] != header:
        raise damaged(path, "its checksum is another")
    ends, sums = (np.frombuffer(index, "<u8", rows, offset) for offset in (0, 8 * rows))
    keys = np.frombuffer(index, "V16", rows, 16 * rows)
    counts = np.frombuffer(index, "<u4", rows, 32 * rows)
    decoding = np.frombuffer(index, "u1", shared, 36 * rows)
    way = json.dumps(said["about"], sort_keys=True), decoding.tobytes()
    return Index(said["about"], keys, counts, ends, sums, decoding, start, way)


def _said(path: Path, header: bytes) -> dict[str, Any]:
    """What a header says, as far as it can be read at all; whether it is true is seen by the checksum."""
    try:
        said = json.loads(json.loads(header)["__metadata__"]["kdtrain"])
        version = said["version"]
        numbers = [said["rows"], said["shared"], said["data"]]
        readable = isinstance(said["about"], dict) and all(type(n) is int and n >= 0 for n in numbers)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged(path, "its header cannot be read") from None
    if version != VERSION:
        raise DataError(
            f"{path} is of version {show(version, 20)} of the format and this kdtrain reads version {VERSION}: "
            "write the cache again."
        )
    if not readable:
        raise damaged(path, "its header cannot be read")
    return said


def damaged(path: Path, reason: str) -> DataError:
    """The error for a file that is not as it was written."""
    return DataError(f"{path} is damaged or no file of a cache: {reason}. {_AGAIN}")
