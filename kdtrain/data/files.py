"""Reading files, whatever they are packed with, and text row by row, with the place of every row.

Rows stay JSON text until a worker encodes them. Arrow's type inference gives up on a column that is text in one row
and a list in the next, and one broken line of a JSONL file must cost that line only, with its real line number.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kdtrain.data.errors import said, show
from kdtrain.disk import FULL, failure_of, write_error
from kdtrain.errors import DataError, KdtrainError

JSON = (".json", ".jsonl", ".ndjson")
CSV = {".csv": ",", ".tsv": "\t"}
TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # and their readers in `datasets`
UNSAFE = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".py")
SUFFIXES = (*JSON, *CSV, *TABLES)
FORMATS = ".json, .jsonl (also packed, .gz), .parquet, .csv, .tsv, .arrow, a folder of these, or a saved Arrow data set"
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")  # endings behind the one that says the format
# What a broken file raises; a cut one an EOFError.
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
_UNPACK: tuple[tuple[bytes, Callable[[Path], Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
)
_UTF16 = "UTF-16, not UTF-8: save it as UTF-8, for example iconv -f UTF-16 -t UTF-8 OLD > NEW"
_NOT_TEXT: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the data: run git lfs pull in its folder"),
    (b"\x28\xb5\x2f\xfd", "packed by Zstandard, which is not read: unpack it, zstd -d FILE"),
    (b"PK\x03\x04", "a ZIP archive (or an Excel workbook): unpack it, or save the sheet as .csv"),
    (b"PAR1", "a Parquet file: name it .parquet"),
    (b"ARROW1", "an Arrow file: name it .arrow"),
    (b"<!DOCTYPE", "a web page, not the data: download the file itself"),
    (b"<html", "a web page, not the data: download the file itself"),
    (b"\xff\xfe", _UTF16),
    (b"\xfe\xff", _UTF16),
)


class RawRow(NamedTuple):
    """One row as JSON text, or `problem` when the file does not even hold text there. `line` counts from 1."""

    file: str
    line: int
    text: str = ""
    problem: str = ""


def cannot_read(name: str, error: Exception, most: int = 160) -> KdtrainError:
    """The error for data that cannot be read; where a disk is full that `datasets` writes a copy to, for that."""
    if (failure := failure_of(error)) and failure.code in FULL:
        return write_error(failure, Path(os.environ.get("HF_DATASETS_CACHE") or tempfile.gettempdir()))
    # `datasets` says only that something went wrong, and what it was in the error behind it.
    reason = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    return DataError(f"cannot read {show(name, 400)}: {said(reason, most)}")


def kind_of(path: Path) -> str:
    """The ending that says the format: the last, or the one before it of what is packed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in PACKED), "")


def check_ending(path: Path) -> None:
    """Refuse a file whose name says that nothing here reads it."""
    kind, name = kind_of(path), show(str(path), 400)
    if kind in UNSAFE:
        raise DataError(f"{name}: {kind} files can run code when they are read and are refused. Use {FORMATS}")
    if kind not in SUFFIXES:
        raise DataError(f"{name}: unknown format {kind or '(no suffix)'}. Use {FORMATS}")


def first_bytes(path: Path, opened: Callable[[Path], Any] | None = None) -> bytes:
    """The first bytes of a file, as they lie on the disk or unpacked."""
    try:
        with path.open("rb") if opened is None else opened(path) as file:
            return bytes(file.read(64))
    except READ_ERRORS as error:
        raise cannot_read(str(path), error) from error


def open_text(path: Path) -> Any:
    """The bytes of a text file, unpacked. Its first bytes tell what they are: the name may be another program's.

    Raises:
        DataError: it is no text in UTF-8.
    """
    packed = first_bytes(path)
    opened = next((opened for magic, opened in _UNPACK if packed.startswith(magic)), None)
    start = first_bytes(path, opened)
    check_content(path, start)
    if start[1:4:2] == b"\0\0" or start[0:3:2] == b"\0\0":  # without the mark that says so
        raise DataError(f"{show(str(path), 400)} is {_UTF16}")
    return path.open("rb") if opened is None else opened(path)


def check_content(path: Path, start: bytes) -> None:
    """Refuses what is plainly something else than its name says."""
    for magic, what in _NOT_TEXT:
        if start.startswith(magic):
            raise DataError(f"{show(str(path), 400)} is {what}")


def not_utf8(byte: int) -> str:
    """What is said of a byte that no text in UTF-8 has in its place."""
    return f"not UTF-8: byte {byte:#04x}; iconv -f latin1 -t utf-8 converts it, if that is what it is in"


def read_lines(path: Path) -> Iterator[RawRow]:
    """The rows of a file with one in each line."""
    return (row for row, _ in lines_from(path))


def lines_from(path: Path, offset: int = 0, line: int = 0) -> Iterator[tuple[RawRow, int]]:
    """The same from a place on, each with the place behind it: its byte, of the file unpacked.

    Bytes are split at newlines only: str.splitlines would also cut at U+2028, which JSON strings may hold.
    """
    name = str(path)
    try:
        with open_text(path) as file:
            if offset:
                file.seek(offset)
            for number, text in enumerate(file, start=line + 1):
                offset += len(text)
                if number == 1:
                    text = text.removeprefix(b"\xef\xbb\xbf")
                if not (text := text.strip()):
                    continue
                try:
                    yield RawRow(name, number, text.decode("utf-8").strip()), offset
                except UnicodeDecodeError as error:
                    yield RawRow(name, number, problem=not_utf8(error.object[error.start])), offset
    except READ_ERRORS as error:
        raise cannot_read(name, error) from error


def folder_of(file: str) -> str | None:
    """What the paths in a data file are relative to; None for a data set of the hub."""
    if os.path.isdir(file):
        return os.path.abspath(file)
    return os.path.dirname(os.path.abspath(file)) if os.path.exists(file) else None
