"""Where rows come from: files, folders, saved data sets, the hub; in order, as JSON text with their place.

Nothing that could run code is read: no pickles, no dataset scripts.
"""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from kdtrain.data.columns import (
    KNOWN_COLUMNS,
    NAMED_COLUMNS,
    PATH_COLUMNS,
    ROW_COLUMNS,
    UNREAD_MEDIA,
    renamed,
    row_columns,
    unread_media,
    wanted_columns,
)
from kdtrain.data.csv_files import read_csv
from kdtrain.data.errors import show, suggestion
from kdtrain.data.files import CSV, FORMATS, JSON, TABLES, UNSAFE, RawRow, cannot_read, kind_of
from kdtrain.data.folders import files_in, files_matching, is_saved, unread_files
from kdtrain.data.held_out import HeldOut
from kdtrain.data.hub import load_from_hub
from kdtrain.data.json_files import read_json
from kdtrain.data.splits import DEFAULT_SPLIT, EVERY_SPLIT, names_split, parse_split, same_split
from kdtrain.data.tables import is_empty, load_saved, load_table, portable, table_rows, table_size
from kdtrain.errors import DataError

ANSWERS = ("data", "teacher")
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
class Source:
    """Where rows come from: a file, a folder, the hub, or rows at hand."""

    path: str  # absolute local path, or the id of a data set on the hub
    name: str | None = None  # configuration: of a data set on the hub, or a folder in the one that `path` names
    split: str = DEFAULT_SPLIT  # with slices: train[:90%]
    # Canonical -> in the file, {"prompt": "question"}; others are ignored. A name -> None: not read.
    columns: Mapping[str, str | None] | None = None
    limit: int | None = None  # only the first n rows
    weight: float = 1.0  # how many times each row appears per epoch, see `kdtrain.data.epochs`
    ce: bool = True  # False: the rows contribute no cross-entropy, the teacher alone supervises
    answers: str = "data"  # `teacher`: the rows' own answers are left out, for the teacher to write
    rows: Any = None  # the rows themselves, a `datasets.Dataset` or a sequence; `path` is then their name in messages


def read_all(
    sources: Sequence[Source], path: Path, held_out: HeldOut | None = None
) -> tuple[datasets.Dataset, list[int]]:
    """All rows in one Arrow file, so that data larger than memory can be encoded; and the number from each source.

    With `held_out` only those of its side, with the numbers that they have among all.
    """
    sizes, total = [], 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _RAW) as writer:
        for index, source in enumerate(sources):
            size = 0
            for batch in _batches(enumerate(_read(source))):
                total += len(batch)
                columns, answers = source.columns, source.answers
                kept = [(i, row) for i, row in batch if held_out is None or held_out.has(row, columns, answers)]
                numbered = [{**vars(row), "source": index, "row": i} for i, row in kept]
                writer.write_batch(pa.RecordBatch.from_pylist(numbered, schema=_RAW))
                size += len(kept)
            sizes.append(size)
    if held_out is not None and not sum(sizes):
        raise held_out.refuse_empty(total)
    return datasets.Dataset.from_file(str(path)), sizes


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
    _check_source(source)
    rows = islice(_rows(source), source.limit)
    first = list(islice(rows, 100))
    if not first:
        where = "" if all(part.whole for part in parse_split(source.split)) else f" in {source.split}"
        raise DataError(f"{show(source.path, 400)} has no rows{where}")
    _check_columns(source, first)
    yield from first
    yield from rows


def _check_source(source: Source) -> None:
    if source.limit is not None and source.limit < 1:
        raise DataError(f"{show(source.path)}: limit must be at least 1, not {source.limit}")
    if not 0 < source.weight < float("inf"):
        raise DataError(f"{show(source.path)}: weight must be a positive number, not {source.weight}")
    if source.answers not in ANSWERS:
        known = ", ".join(ANSWERS)
        raise DataError(f"{show(source.path)}: answers must be one of {known}, not {show(source.answers, 40)}")
    for column, name in (source.columns or {}).items():
        allowed = KNOWN_COLUMNS if name is not None else (*NAMED_COLUMNS, *PATH_COLUMNS, *UNREAD_MEDIA)
        if column not in allowed:
            raise DataError(
                f"{show(source.path)}: columns maps to {show(column)!r}, which is not one of {', '.join(allowed)}"
                f"{suggestion(column, allowed)}. It reads canonical: column in the file"
            )


def _rows(source: Source) -> Iterator[RawRow]:
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
    tables = [file for file in _files(source, split) if kind_of(file) in TABLES]
    if tables != _files(source, split):
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
        _check_name(source, "a saved data set")
        yield from _table(source, source.path, lambda: load_saved(source.path, split))
    else:
        for file in _files(source, split):
            yield from _file(source, file, split)


def _files(source: Source, split: str) -> list[Path]:
    """The files of a split, where the source is a file, a folder or a pattern."""
    path = Path(source.path)
    try:
        if os.path.isdir(path):
            return files_in(path, source.name, split)
        if not os.path.exists(path):
            _check_name(source, "a pattern")
            return files_matching(source.path, split)
    except OSError as error:
        raise cannot_read(source.path, error) from error
    _check_single(source, path, split)
    return [path]


def unread_of(source: Source) -> list[Path]:
    """Files of a source's folder that its split leaves out though they are not of another one."""
    path, parts = Path(source.path), parse_split(source.split)
    if source.rows is not None or not os.path.isdir(path) or is_saved(path) or len(parts) > 1:
        return []
    return unread_files(path, source.name, parts[0].name)


def _check_name(source: Source, what: str) -> None:
    if source.name is not None:
        raise DataError(
            f"{show(source.path, 400)} is {what} and has no configuration {show(source.name)}: remove name, which is "
            "for data sets of the hub, and folders that are clones of them"
        )


def _check_single(source: Source, path: Path, split: str) -> None:
    """A file is one split, and has no configurations: what asks for another would be ignored."""
    _check_name(source, "a file")
    if not os.path.isfile(path):
        raise DataError(f"{show(source.path, 400)} is neither a file nor a folder: a pipe can be read once only")
    known = split in (DEFAULT_SPLIT, EVERY_SPLIT) or same_split(path.parent.name, split)
    if not known and not names_split(path, split, path.parent):
        raise DataError(
            f"{show(source.path, 400)} is a file without the splits of a data set, there is no {show(split)}: remove "
            "split, name the file that holds it, or take rows by their number, split: train[90%:]"
        )


def _file(source: Source, path: Path, split: str) -> Iterator[RawRow]:
    kind, name = kind_of(path), show(str(path), 400)
    if kind in UNSAFE:
        raise DataError(f"{name}: {kind} files can run code when they are read and are refused. Use {FORMATS}")
    if kind in JSON:
        yield from read_json(path, row_columns(source.columns), split)
    elif kind in CSV:
        yield from read_csv(path, CSV[kind])
    elif kind in TABLES:
        if not is_empty(path, kind):
            yield from _table(source, str(path), partial(load_table, path, kind))
    else:
        raise DataError(f"{name}: unknown format {kind or '(no suffix)'}. Use {FORMATS}")


def _table(source: Source, name: str, load: Any) -> Iterator[RawRow]:
    """Rows of anything that `datasets` reads. Only the columns that are used are turned into Python objects."""
    try:
        table = load()
    except DataError:
        raise
    except Exception as error:  # each reader of `datasets` has its own errors
        raise cannot_read(name, error, 400) from error
    mapped = set(renamed(source.columns).values())
    wanted = wanted_columns(source.columns)
    found = [column for column in table.column_names if column in wanted]
    if not (mapped or set(KNOWN_COLUMNS)) & set(found):
        raise _no_columns(source, name, table.column_names)
    if source.limit is not None and all(part.whole for part in parse_split(source.split)):
        table = table.select(range(min(source.limit, len(table))))
    # Videos and sounds are named, never decoded: that a row has one is all the checks need (parts.py, media.py).
    named = [column for column in unread_media(source.columns) if column in table.column_names]
    yield from table_rows(table, name, found, named)


def _check_columns(source: Source, rows: list[RawRow]) -> None:
    """Refuses a source of which none of the first rows has a usable column; a single one without is a bad row."""
    wanted = row_columns(source.columns)
    seen: dict[str, None] = {}
    for raw in rows:
        try:
            row = json.loads(raw.text)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            seen.update(dict.fromkeys(row))
    never = set(renamed(source.columns).values()) - set(seen)
    if seen and (never or not wanted & set(seen)):
        raise _no_columns(source, rows[0].file, list(seen))


def _no_columns(source: Source, name: str, found: list[str]) -> DataError:
    listed = ", ".join(show(column, 60) for column in found)
    if renaming := renamed(source.columns):
        mapped = ", ".join(f"{c}: {show(f, 60)}" for c, f in renaming.items())
        wrong = next((f for f in renaming.values() if f not in found), "")
        hint = suggestion(wrong, found)
        return DataError(f"{show(name, 400)} has the columns {listed}, not those of columns ({mapped}){hint}")
    return DataError(
        f"{show(name, 400)} has none of the columns {', '.join(ROW_COLUMNS)} but {listed}. Map them, for example "
        "columns: {instruction: question, output: answer} with the chat template, or {prompt: question, completion: "
        "answer} without it"
    )
