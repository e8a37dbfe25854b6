"""The rows of files with targets, one after the other: nested lists of numbers as arrays, the rest as Python has it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from kdtrain.data.errors import show
from kdtrain.data.folders import is_saved
from kdtrain.data.tables import load_saved
from kdtrain.errors import DataError
from kdtrain.teachers.cached.manifest import MANIFEST

_ROWS_AT_ONCE = 16  # a row of 8,192 tokens with 128 entries each is some ten megabytes
_TABLES, _LINES = (".parquet",), (".jsonl", ".json", ".ndjson")


def read_tables(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The place and the columns of every row.

    Raises:
        DataError: a file that cannot be read, or of another kind.
    """
    if (path / MANIFEST).is_file() and any(path.glob("shard-*.safetensors")):
        raise DataError(
            f"--from {show(str(path), 400)} is a cache that kdtrain wrote. Train from it as it is: "
            "rlhf.teacher.backend=cache rlhf.teacher.path=DIR."
        )
    if path.is_dir() and is_saved(path):
        yield from _of_tables(str(path), load_saved(str(path), "train").with_format("arrow").iter(_ROWS_AT_ONCE))
        return
    for file in _files(path):
        try:
            if file.suffix in _TABLES:
                batches = pq.ParquetFile(file).iter_batches(_ROWS_AT_ONCE)
                yield from _of_tables(str(file), (pa.Table.from_batches([batch]) for batch in batches))
            else:
                yield from _of_lines(file)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"--from: {show(str(file), 400)} cannot be read: {show(str(error))}.") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        files = [path]
    else:
        found = [file for file in path.rglob("*") if file.suffix in (*_TABLES, *_LINES) and file.is_file()]
        files = sorted(
            file for file in found if not any(part.startswith(".") for part in file.parts[len(path.parts) :])
        )
    if not files or files[0].suffix not in (*_TABLES, *_LINES):
        raise DataError(
            f"--from {show(str(path), 400)} is neither a .parquet or .jsonl file, nor a folder of these, nor a data "
            "set that save_to_disk wrote."
        )
    return files


def _of_tables(name: str, tables: Iterator[pa.Table]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    for table in tables:
        for row in range(len(table)):
            number += 1
            yield (
                f"{show(name, 400)}, row {number}",
                {column: _value(table.column(column)[row]) for column in table.column_names},
            )


def _of_lines(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise DataError(
                        f"--from: {show(str(file), 400)}:{number} is no JSON object: one in each line is read."
                    )
                yield f"{show(str(file), 400)}:{number}", row


def _value(scalar: pa.Scalar) -> Any:
    """Numbers in lists, or in lists of one length, as an array; anything else as Python's own."""
    kind = scalar.type
    if scalar.is_valid and _is_list(kind):
        inner = scalar.values
        if _is_number(kind.value_type) and not inner.null_count:
            return inner.to_numpy(zero_copy_only=False)
        if _is_list(kind.value_type) and _is_number(kind.value_type.value_type) and not inner.null_count:
            lengths = inner.value_lengths().to_numpy(zero_copy_only=False)
            flat = inner.flatten()
            if len(lengths) and not flat.null_count and (lengths == lengths[0]).all():
                return flat.to_numpy(zero_copy_only=False).reshape(len(lengths), -1)
    return scalar.as_py()


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def as_array(row: Mapping[str, Any], column: str, dimensions: int, dtype: type[np.generic]) -> np.ndarray | None:
    """A column as an array, if it is one of so many dimensions; None otherwise."""
    try:
        array = np.asarray(row[column])
        return array.astype(dtype) if array.ndim == dimensions and array.dtype != object else None
    except (ValueError, TypeError):  # lists of several lengths
        return None
