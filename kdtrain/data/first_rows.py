"""The first row of a source, looked at before torch is imported: is the file there, and does it hold rows?

What is found here is what reading all rows would find minutes later, by the same functions. Files that would take long
are looked at as far as their first bytes reach.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from glob import has_magic
from itertools import islice
from pathlib import Path

from kdtrain.data.columns import ROUTE_COLUMN, parse_json, row_columns
from kdtrain.data.csv_files import read_csv
from kdtrain.data.errors import RowError, show
from kdtrain.data.files import (
    CSV,
    JSON,
    READ_ERRORS,
    TABLES,
    RawRow,
    cannot_read,
    check_content,
    check_ending,
    first_bytes,
    folder_of,
    kind_of,
    open_text,
)
from kdtrain.data.folders import is_saved
from kdtrain.data.json_files import check_has_lines, read_json
from kdtrain.data.media import parse_media_row
from kdtrain.data.route import teacher_of
from kdtrain.data.rows import Chat, Pair, PlainText, answered, prompt_of
from kdtrain.data.source import ColumnsError, Source, check_columns, check_source, check_table_columns, files_of
from kdtrain.data.splits import parse_split
from kdtrain.errors import DataError

_BYTES = 1 << 20
_ROWS = 100
_NO_ROWS = (".schema.json", ".yaml", ".yml")


def wrong_with(
    source: Source, *, prompts: bool, root: str | None, tolerant: bool, teachers: Sequence[str] = ()
) -> tuple[str, str] | None:
    """Message and hint about a local source that no run could read; None where nothing is seen to be wrong.

    Args:
        prompts: rows without an answer can be used.
        root: what the paths of images are relative to, instead of the file's folder.
        tolerant: bad rows are left out, so that a bad first one is no reason to stop.
        teachers: names of several, of which each row has one.
    """
    try:
        check_source(source)
        if missing := _missing(source):
            return missing
        rows, are_all = _first_rows(source)
        if rows and (are_all or len(rows) == _ROWS or not source.columns):  # a later row may have a mapped column
            check_columns(source, rows)
        if rows and not tolerant:
            _check_row(source, rows[0], prompts, root, teachers)
    except ColumnsError as error:
        return error.message, error.hint
    except DataError as error:
        return str(error), ""
    return None


def is_chat(source: Source) -> bool:
    """Whether the first row of a source that can be read is a conversation, which needs a chat template."""
    rows, _ = _first_rows(source)
    try:
        return bool(rows) and isinstance(_parsed(source, rows[0], None), Chat)
    except RowError:
        return False


def _missing(source: Source) -> tuple[str, str] | None:
    path = Path(source.path)
    if path.exists() or has_magic(source.path):
        return None
    above = next(parent for parent in path.parents if parent.is_dir())
    wanted = path.relative_to(above).parts[0]
    others = sorted(name for name in os.listdir(above) if not name.endswith(_NO_ROWS))
    near = difflib.get_close_matches(wanted, others, n=1)
    what = f": {show(str(above), 400)} has no {show(wanted, 80)}" if above != path.parent else ""
    hint = f"did you mean {show(near[0], 80)}?" if near else "a relative path begins at the folder of the config file"
    return f"no such file or folder: {show(source.path, 400)}{what}", hint


def _first_rows(source: Source) -> tuple[list[RawRow], bool]:
    """Up to a hundred, and whether there are no others.

    None of tables, whose columns are checked here, of slices, and where that would take long.
    """
    part = parse_split(source.split)[0]
    path = Path(source.path)
    if path.is_dir() and is_saved(path):
        return [], False
    file, *others = files_of(source, part.name)
    kind = kind_of(file)
    check_ending(file)
    if kind in TABLES:
        _check_table(source, file, kind)
        return [], False
    if source.streaming and kind in JSON:
        check_has_lines(file, row_columns(source.columns))
    rows = list(islice(read_csv(file, CSV[kind]), _ROWS)) if kind in CSV else _json_rows(source, file, part.name)
    are_all = not others and (kind in CSV or file.stat().st_size < _BYTES)
    if not rows and are_all:
        raise DataError(f"{show(str(file), 400)} has no rows")
    return (rows, are_all) if part.whole else ([], False)


def _json_rows(source: Source, file: Path, split: str) -> list[RawRow]:
    """The first rows of a small file; of a large one those that its first bytes hold."""
    try:
        with open_text(file) as opened:
            start = opened.read(_BYTES)
    except READ_ERRORS as error:
        raise cannot_read(str(file), error) from error
    if len(start) < _BYTES:
        return list(islice(read_json(file, row_columns(source.columns), split), _ROWS))
    lines = [line.removeprefix(b"\xef\xbb\xbf").strip() for line in start.split(b"\n")[:-1][:_ROWS]]
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line]
    if numbered and _is_object(numbered[0][1]):
        return [RawRow(str(file), number, line.decode("utf-8", "replace")) for number, line in numbered]
    return _first_of_list(file, start.decode("utf-8-sig", "replace"))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _first_of_list(file: Path, text: str) -> list[RawRow]:
    """The first of a list of rows, as far as it has been read."""
    inner = text.lstrip().removeprefix("[").lstrip()
    try:
        row, _ = json.JSONDecoder().raw_decode(inner)
    except (ValueError, RecursionError):
        return []
    return [RawRow(str(file), 1, json.dumps(row))] if inner != text.lstrip() else []


def _check_table(source: Source, file: Path, kind: str) -> None:
    """The columns of a Parquet or Arrow file, from its head or foot."""
    import pyarrow as pa  # type: ignore[import-untyped]

    if kind == ".parquet" and first_bytes(file)[:4] != b"PAR1":
        check_content(file, first_bytes(file))
    try:
        if kind == ".parquet":
            from pyarrow import parquet

            schema = parquet.read_schema(file)
        else:
            with pa.OSFile(str(file)) as opened:
                opener = pa.ipc.open_file if first_bytes(file).startswith(b"ARROW1") else pa.ipc.open_stream
                schema = opener(opened).schema
    except (pa.ArrowException, OSError) as error:
        raise cannot_read(str(file), error) from error
    check_table_columns(source, str(file), schema.names)


def _check_row(source: Source, raw: RawRow, prompts: bool, root: str | None, teachers: Sequence[str]) -> None:
    """Refuse a first row that is a bad one."""
    where = f"{show(raw.file, 400)}:{raw.line}"
    if raw.problem:
        raise DataError(f"{where}: {raw.problem}")
    try:
        parsed = _parsed(source, raw, root)
        if source.answers == "teacher":
            prompt_of(parsed)
        elif not prompts:
            answered(parsed)
        if teachers:
            row = parse_json(raw.text, source.columns, source.prefix_column)
            teacher_of(row.get(ROUTE_COLUMN), source.teacher, teachers)
    except RowError as error:
        raise DataError(f"{where}: {error}") from None


def _parsed(source: Source, raw: RawRow, root: str | None) -> Chat | Pair | PlainText:
    row = parse_json(raw.text, source.columns, source.prefix_column)
    row = {name: value for name, value in row.items() if name != source.prefix_column}
    return parse_media_row(row, root or folder_of(raw.file), False)
