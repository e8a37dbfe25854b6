"""Reading text files row by row, with the place of every row.

Rows stay JSON text until a worker encodes them. Arrow's type inference gives up on a column that is text in one row
and a list in the next, and one broken line of a JSONL file must cost that line only, with its real line number.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtrain.data.errors import show
from kdtrain.errors import DataError


@dataclass(frozen=True)
class RawRow:
    """One row as JSON text, or `problem` when the file does not even hold text there. `line` counts from 1."""

    file: str
    line: int
    text: str = ""
    problem: str = ""


def cannot_read(name: str, error: Exception, most: int = 160) -> DataError:
    return DataError(f"cannot read {show(name, 400)}: {show(str(error) or type(error).__name__, most)}")


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def is_array(path: Path) -> bool:
    with _open(path) as file:
        return bool(file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[")


def read_lines(path: Path) -> Iterator[RawRow]:
    """Bytes are split at newlines only: str.splitlines would also cut at U+2028, which JSON strings may hold."""
    name = str(path)
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if not line.strip():
                    continue
                try:
                    yield RawRow(name, number, line.decode("utf-8").strip())
                except UnicodeDecodeError as error:
                    yield RawRow(name, number, problem=f"not UTF-8: byte {error.object[error.start]:#04x}")
    except (OSError, EOFError) as error:  # a truncated .gz is an EOFError
        raise cannot_read(name, error) from error


def read_array(path: Path) -> Iterator[RawRow]:
    try:
        with _open(path) as file:
            rows = json.loads(file.read())
    except (OSError, EOFError, ValueError, RecursionError) as error:
        raise DataError(f"{show(str(path), 400)} is not valid JSON: {show(str(error))}") from error
    for number, row in enumerate(rows, start=1):
        yield RawRow(str(path), number, json.dumps(row))


def read_csv(path: Path, delimiter: str) -> Iterator[RawRow]:
    """Everything stays text: type inference makes numbers of answers such as 42, and nothing of those that say NA."""
    csv.field_size_limit(2**31 - 1)
    try:
        with _open(path) as file:
            reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter)
            for row in reader:
                cells = {column: cell or None for column, cell in row.items() if column is not None}
                yield RawRow(str(path), reader.line_num, json.dumps(cells))
    except (OSError, EOFError, ValueError, csv.Error) as error:
        raise cannot_read(str(path), error) from error


def folder_of(file: str) -> str | None:
    """What the paths in a data file are relative to; None for a data set of the hub."""
    if os.path.isdir(file):
        return os.path.abspath(file)
    return os.path.dirname(os.path.abspath(file)) if os.path.exists(file) else None
