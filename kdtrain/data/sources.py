"""Where rows come from: files, folders, saved data sets, the hub; in order, as JSON text with their place.

Nothing that could run code is read: no pickles, no dataset scripts.
"""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import xxhash

from kdtrain.data.columns import (
    row_columns,
    unread_media,
    wanted_columns,
)
from kdtrain.data.csv_files import read_csv
from kdtrain.data.errors import show
from kdtrain.data.files import CSV, JSON, TABLES, RawRow, cannot_read, check_ending, kind_of
from kdtrain.data.folders import is_saved, unread_files
from kdtrain.data.heap import frozen_heap
from kdtrain.data.held_out import HeldOut
from kdtrain.data.hub import load_from_hub
from kdtrain.data.json_files import read_json
from kdtrain.data.source import (
    Source,
    check_columns,
    check_name,
    check_source,
    check_table_columns,
    files_of,
)
from kdtrain.data.splits import parse_split
from kdtrain.data.stream.shards import shards_of
from kdtrain.data.tables import is_empty, load_saved, load_table, portable, table_rows, table_size
from kdtrain.errors import DataError

_RAW = pa.schema(
    [
        # The fields of RawRow,
        ("file", pa.string()),
        ("line", pa.int64()),
        ("text", pa.large_string()),
        ("problem", pa.string()),
        # the number of its source, and its own in that source.
        ("source", pa.int32()),
        ("row", pa.int64()),
    ]
)


@dataclass(frozen=True)
class SourceContent:
    """What was read from a source, to be told from what is read another time."""

    path: str
    rows: int
    content: str
    """A hash of their text in their order: whatever the file is called, and wherever it lies."""


def read_all(
    sources: Sequence[Source], path: Path, held_out: HeldOut | None = None
) -> tuple[datasets.Dataset, list[SourceContent]]:
    """All rows in one Arrow file, so that data larger than memory can be encoded; and what each source has.

    With `held_out` only those of its side, with the numbers that they have among all.
    """
    contents, total = [], 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _RAW) as writer, frozen_heap():
        for index, source in enumerate(sources):
            size, digest = 0, xxhash.xxh3_128()
            for batch in _batches(enumerate(_read(source))):
                total += len(batch)
                about = (source.columns, source.answers, source.prefix_column)
                kept = [(i, row) for i, row in batch if held_out is None or held_out.has(row, *about)]
                writer.write_batch(_table_of(kept, index))
                digest.update("".join(f"{row.text}\0{row.problem}\0" for _, row in kept).encode(errors="replace"))
                size += len(kept)
            contents.append(SourceContent(source.path, size, digest.hexdigest()))
    if held_out is not None and not sum(content.rows for content in contents):
        raise held_out.refuse_empty(total)
    return datasets.Dataset.from_file(str(path)), contents


def _table_of(rows: Sequence[tuple[int, RawRow]], source: int) -> pa.RecordBatch:
    numbers, raw = zip(*rows, strict=True) if rows else ((), ())
    columns = [*(zip(*raw, strict=True) if raw else [()] * len(RawRow._fields)), [source] * len(rows), numbers]
    return pa.RecordBatch.from_arrays(
        [pa.array(values, field.type) for values, field in zip(columns, _RAW, strict=True)], schema=_RAW
    )


def _batches(rows: Iterator[tuple[int, RawRow]]) -> Iterator[list[tuple[int, RawRow]]]:
    """1000 rows at a time, fewer where they carry images."""
    batch: list[tuple[int, RawRow]] = []
    length = 0
    for number, row in rows:
        batch.append((number, row))
        length += len(row.text)
        if len(batch) == 1000 or length > 2**25:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _read(source: Source) -> Iterator[RawRow]:
    check_source(source)
    rows = islice(_rows(source), source.limit)
    first = list(islice(rows, 100))
    if not first:
        where = "" if all(part.whole for part in parse_split(source.split)) else f" in {source.split}"
        raise DataError(f"{show(source.path, 400)} has no rows{where}")
    check_columns(source, first)
    yield from first
    yield from rows


def _rows(source: Source) -> Iterator[RawRow]:
    if source.streaming and source.rows is None:
        yield from (row for shard in shards_of(source) for row, _ in shard.rows())
        return
    parts = parse_split(source.split)
    if source.rows is None and not os.path.exists(source.path) and not glob.has_magic(source.path):
        split = "+".join(part.text for part in parts)  # `datasets` slices itself
        load = partial(load_from_hub, source.path, source.name, split)
        yield from _table(source, f"{source.path}[{split}]", load)
        return
    for part in parts:
        if part.whole:
            yield from _rows_of(source, part.name)
        else:
            # Counted first where the number of rows decides: they need not fit into memory.
            size = _count(source, part.name) if part.needs_size else sys.maxsize
            yield from islice(_rows_of(source, part.name), *part.bounds(size))


def _count(source: Source, split: str) -> int:
    path = Path(source.path)
    if source.rows is not None:
        return len(source.rows)
    if os.path.isdir(path) and is_saved(path):
        return len(load_saved(source.path, split))
    tables = [file for file in files_of(source, split) if kind_of(file) in TABLES]
    if tables != files_of(source, split):
        return sum(1 for _ in _rows_of(source, split))
    return sum(table_size(file, kind_of(file)) for file in tables)  # their images are not decoded for it


def _rows_of(source: Source, split: str) -> Iterator[RawRow]:
    """The rows of a split, where there are splits: it was checked that rows at hand need none."""
    path = Path(source.path)
    if isinstance(source.rows, datasets.Dataset):
        yield from _table(source, source.path, lambda: source.rows)
    elif source.rows is not None:
        for number in range(len(source.rows)):
            yield RawRow(source.path, number + 1, json.dumps(dict(source.rows[number]), default=portable))
    elif os.path.isdir(path) and is_saved(path):
        check_name(source, "a saved data set")
        yield from _table(source, source.path, lambda: load_saved(source.path, split))
    else:
        for file in files_of(source, split):
            yield from _file(source, file, split)


def unread_of(source: Source) -> list[Path]:
    """Files of a source's folder that its split leaves out though they are not of another one."""
    path, parts = Path(source.path), parse_split(source.split)
    if source.rows is not None or not os.path.isdir(path) or is_saved(path) or len(parts) > 1:
        return []
    return unread_files(path, source.name, parts[0].name)


def _file(source: Source, path: Path, split: str) -> Iterator[RawRow]:
    kind = kind_of(path)
    check_ending(path)
    if kind in JSON:
        yield from read_json(path, row_columns(source.columns), split)
    elif kind in CSV:
        yield from read_csv(path, CSV[kind])
    elif not is_empty(path, kind):
        yield from _table(source, str(path), partial(load_table, path, kind))


def _table(source: Source, name: str, load: Any) -> Iterator[RawRow]:
    """Rows of anything that `datasets` reads. Only the columns that are used are turned into Python objects."""
    try:
        table = load()
    except DataError:
        raise
    except Exception as error:  # each reader of `datasets` has its own errors
        raise cannot_read(name, error, 400) from error
    check_table_columns(source, name, table.column_names)
    wanted = wanted_columns(source.columns) | {source.prefix_column}
    found = [column for column in table.column_names if column in wanted]
    if source.limit is not None and all(part.whole for part in parse_split(source.split)):
        table = table.select(range(min(source.limit, len(table))))
    # Videos and sounds are named, never decoded: that a row has one is all the checks need (parts.py, media.py).
    named = [column for column in unread_media(source.columns) if column in table.column_names]
    yield from table_rows(table, name, found, named)
