"""The files of a source that is streamed, and their rows from any place on.

A cursor says where a row ends, so that reading can go on behind it. Text (also packed): the byte and the line, which is
gone to at once, but packed files are unpacked up to there. Parquet: the row group and the row in it. A saved data set
and Arrow files are mapped into memory, where every row is at hand. CSV and the hub: the number of the row in its file,
whose rows before it are read once more.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import xxhash

from kdtrain.data.columns import row_columns, unread_media, wanted_columns
from kdtrain.data.csv_files import read_csv
from kdtrain.data.errors import show
from kdtrain.data.files import CSV, JSON, RawRow, cannot_read, check_ending, first_bytes, kind_of, lines_from
from kdtrain.data.folders import is_saved
from kdtrain.data.hub import stream_from_hub
from kdtrain.data.json_files import check_has_lines
from kdtrain.data.source import Source, check_source, check_table_columns, files_of
from kdtrain.data.splits import parse_split
from kdtrain.data.tables import is_empty, load_saved, portable, table_rows, without_nulls
from kdtrain.errors import DataError

Cursor = tuple[int, int]
START: Cursor = (0, 0)
_ROWS_AT_ONCE = 1000
_STREAMED_AT_ONCE = 100


@dataclass(frozen=True)
class Shard:
    """One file, or what is read like one."""

    source: Source
    name: str
    identity: str
    """By which it is told from another one: what it is called and its size, or its version."""

    def rows(self, cursor: Cursor = START) -> Iterator[tuple[RawRow, Cursor]]:
        """The rows behind a cursor, each with the cursor behind it."""
        raise NotImplementedError


def shards_of(source: Source) -> list[Shard]:
    """The files of a source in their order; nothing is read of them but their heads.

    Raises:
        DataError: there are none, or they cannot be streamed.
    """
    check_source(source)
    shards: list[Shard] = []
    for part in parse_split(source.split):
        if not part.whole:
            raise DataError(
                f"{show(source.path, 400)} is streamed, and {show(source.split)} is a slice, whose rows would have to "
                "be counted: use limit, or read it without streaming"
            )
        shards += _of_split(source, part.name)
    if not shards:
        raise DataError(f"{show(source.path, 400)} has no rows")
    return shards


def identity_of(shards: list[Shard]) -> str:
    """A hash of what would be read; wherever it lies."""
    return xxhash.xxh3_128("\0".join(shard.identity for shard in shards).encode(errors="replace")).hexdigest()


def _of_split(source: Source, split: str) -> Iterator[Shard]:
    path = Path(source.path)
    if not os.path.exists(path) and not glob.has_magic(source.path):
        yield from _of_hub(source, split)
    elif os.path.isdir(path) and is_saved(path):
        table = load_saved(source.path, split)
        yield _Mapped(source, source.path, f"{len(table)} rows, {table._fingerprint}", table)
    else:
        for file in files_of(source, split):
            yield from _of_file(source, file, split)


def _of_file(source: Source, path: Path, split: str) -> Iterator[Shard]:
    kind = kind_of(path)
    check_ending(path)
    about = (source, str(path), f"{path.name}, {path.stat().st_size} bytes")
    if kind in JSON:
        check_has_lines(path, row_columns(source.columns))
        yield _Lines(*about)
    elif kind in CSV:
        yield _Csv(*about, CSV[kind])
    elif not is_empty(path, kind):
        yield _Parquet(*about) if kind == ".parquet" else _Mapped(*about, _arrow(path))


def _of_hub(source: Source, split: str) -> Iterator[Shard]:
    stream, version = stream_from_hub(source.path, source.name, split)
    if stream.features is not None:
        check_table_columns(source, f"{source.path}[{split}]", list(stream.features))
    for number in range(stream.num_shards):
        name = f"{source.path}[{split}], file {number + 1} of {stream.num_shards}"
        yield _Streamed(source, name, f"{name}, {version}", stream.shard(num_shards=stream.num_shards, index=number))


@dataclass(frozen=True)
class _Lines(Shard):
    def rows(self, cursor: Cursor = START) -> Iterator[tuple[RawRow, Cursor]]:
        for row, end in lines_from(Path(self.name), *cursor):
            yield row, (end, row.line)


@dataclass(frozen=True)
class _Csv(Shard):
    delimiter: str

    def rows(self, cursor: Cursor = START) -> Iterator[tuple[RawRow, Cursor]]:
        read = enumerate(read_csv(Path(self.name), self.delimiter), start=1)
        for number, row in islice(read, cursor[0], None):
            yield row, (number, 0)


@dataclass(frozen=True)
class _Parquet(Shard):
    def rows(self, cursor: Cursor = START) -> Iterator[tuple[RawRow, Cursor]]:
        try:
            with pq.ParquetFile(self.name, memory_map=True, pre_buffer=False) as file:
                yield from self._groups(file, cursor)
        except (pa.ArrowException, OSError) as error:
            raise cannot_read(self.name, error, 400) from error

    def _groups(self, file: Any, cursor: Cursor) -> Iterator[tuple[RawRow, Cursor]]:
        schema = file.schema_arrow
        check_table_columns(self.source, self.name, schema.names)
        first = 1
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if group >= cursor[0]:
                skipped = cursor[1] if group == cursor[0] else 0
                batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=_columns(self.source, schema))
                done = 0
                for batch in batches:
                    own = batch.slice(max(skipped - done, 0))
                    number = done + len(batch) - len(own)
                    done += len(batch)
                    for row in _table_rows(self.source, self.name, pa.Table.from_batches([own]), schema, first, number):
                        number += 1
                        yield row, (group, number)
            first += rows


@dataclass(frozen=True)
class _Mapped(Shard):
    table: datasets.Dataset

    def rows(self, cursor: Cursor = START) -> Iterator[tuple[RawRow, Cursor]]:
        names = self.table.column_names
        check_table_columns(self.source, self.name, names)
        if cursor[0] >= len(self.table):
            return
        rest = self.table.select(range(cursor[0], len(self.table)))
        number = cursor[0]
        for row in table_rows(rest, self.name, *_found(self.source, names), first=number + 1):
            number += 1
            yield row, (number, 0)


@dataclass(frozen=True)
class _Streamed(Shard):
    """A file of a data set of the hub, as `datasets` streams it."""

    stream: Any

    def rows(self, cursor: Cursor = START) -> Iterator[tuple[RawRow, Cursor]]:
        number, features = cursor[0], self.stream.features
        wanted, named = (
            wanted_columns(self.source.columns) | {self.source.prefix_column},
            unread_media(self.source.columns),
        )
        rows = self.stream.decode(False) if features is not None else self.stream
        try:
            # By `iter`: in a worker of a data loader __iter__ would give a part of the rows.
            batches = (rows.skip(number) if number else rows).iter(_STREAMED_AT_ONCE)
            for row in (
                dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True)
            ):
                number += 1
                found = {name: value for name, value in row.items() if name in wanted}
                if features is not None:
                    found = {name: without_nulls(value, features[name]) for name, value in found.items()}
                found |= {name: "present" for name in named if row.get(name)}
                yield RawRow(self.name, number, json.dumps(found, default=portable)), (number, 0)
        except DataError:
            raise
        except Exception as error:  # each reader of `datasets` has its own errors
            raise cannot_read(self.name, error, 400) from error


def _table_rows(
    source: Source, name: str, table: pa.Table, schema: pa.Schema, first: int, number: int
) -> Iterator[RawRow]:
    """The rows of a part of a table, which begins at row `number` of those that begin at row `first` of the file."""
    names = table.column_names
    kept = pa.schema([schema.field(one) for one in names], metadata=_metadata_of(schema, names))
    part = datasets.Dataset(datasets.table.InMemoryTable(table.cast(kept).replace_schema_metadata(kept.metadata)))
    return table_rows(part, name, *_found(source, names), first=first + number)


def _metadata_of(schema: pa.Schema, names: list[str]) -> Mapping[bytes, bytes] | None:
    """What `datasets` has written about these columns: which of them are images, for one."""
    written = (schema.metadata or {}).get(b"huggingface")
    if written is None:
        return None
    info = json.loads(written)
    features = info.get("info", {}).get("features")
    if features is None:
        return None
    info["info"]["features"] = {name: features[name] for name in names if name in features}
    return {b"huggingface": json.dumps({"info": info["info"]}).encode()}


def _columns(source: Source, schema: pa.Schema) -> list[str]:
    """Of a table, those that are read."""
    found, named = _found(source, schema.names)
    return [*found, *named]


def _found(source: Source, names: list[str]) -> tuple[list[str], list[str]]:
    """Of the columns of a table those that are read, and those of which it is only said whether they hold something."""
    wanted = wanted_columns(source.columns) | {source.prefix_column}
    return [one for one in names if one in wanted], [one for one in unread_media(source.columns) if one in names]


def _arrow(path: Path) -> datasets.Dataset:
    """An Arrow file, mapped into memory."""
    opened = pa.ipc.open_file if first_bytes(path).startswith(b"ARROW1") else pa.ipc.open_stream
    try:
        return datasets.Dataset(datasets.table.InMemoryTable(opened(pa.memory_map(str(path))).read_all()))
    except (pa.ArrowException, OSError) as error:
        raise cannot_read(str(path), error, 400) from error
