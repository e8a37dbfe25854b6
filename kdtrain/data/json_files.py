"""JSON files of every form that people have: an object per line, a list of rows, objects over several lines, a list
below a key. The form is told by the content: endings do not say it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kdtrain.data.errors import show
from kdtrain.data.files import READ_ERRORS, RawRow, cannot_read, not_utf8, open_text, read_lines
from kdtrain.data.splits import same_split
from kdtrain.errors import DataError

_BOM = b"\xef\xbb\xbf"


def read_json(path: Path, columns: Collection[str], split: str) -> Iterator[RawRow]:
    """The rows of a .json or .jsonl file; `columns` are those that a row may have.

    Rows of a list are counted from 1; those that are objects of their own have the line that they begin in.
    """
    first, second = _first_lines(path)
    if first[:1] not in (b"[", b"{") or (first[:1] == b"{" and _has_lines(first, second, columns)):
        yield from read_lines(path)
        return
    try:
        values = list(_values(_text(path)))
    except (DataError, ValueError, RecursionError) as error:
        if _holds_rows_in_lines(path, first, columns):
            yield from read_lines(path)
            return
        if isinstance(error, DataError):
            raise
        raise DataError(f"{show(str(path), 400)} is not valid JSON: {show(str(error))}") from error
    if len(values) > 1:
        if first[:1] == b"[":  # lists one below the other: each is a bad row of its own
            yield from read_lines(path)
        else:
            yield from (RawRow(str(path), line, json.dumps(value)) for line, value in values)
        return
    for number, row in enumerate(_rows_of(path, values[0][1], columns, split), start=1):
        yield RawRow(str(path), number, json.dumps(row))


def check_has_lines(path: Path, columns: Collection[str]) -> None:
    """Refuse a file that is to be streamed and has no row in each line.

    Raises:
        DataError: what to make of it.
    """
    first, second = _first_lines(path)
    if first[:1] == b"[" or (first[:1] == b"{" and not _has_lines(first, second, columns)):
        raise DataError(
            f"{show(str(path), 400)} has not one row in each line, and would have to be read as a whole: streaming is "
            "for JSON lines, Parquet, Arrow and CSV. Remove streaming: true, or write a row into each line, jq -c "
            "'.[]' OLD > NEW"
        )


def _first_lines(path: Path) -> list[bytes]:
    """The first two lines that are not blank, or less."""
    try:
        with open_text(path) as file:
            stripped = (line.removeprefix(_BOM).strip() for line in file)
            lines = list(islice((line for line in stripped if line), 2))
    except READ_ERRORS as error:
        raise cannot_read(str(path), error) from error
    return [*lines, b"", b""][:2]


def _has_lines(first: bytes, second: bytes, columns: Collection[str]) -> bool:
    """Whether a file that begins with an object has one in each line, as far as its first two show."""
    row = _object(first)
    if row is None:
        return not second or _object(second) is not None
    return bool(second) or (_list_below_a_key(row, columns) is None and not _in_columns(row, columns))


def _holds_rows_in_lines(path: Path, first: bytes, columns: Collection[str]) -> bool:
    """Whether what is not valid as a whole has lines that are: then those that are not are bad rows."""
    if first[:1] == b"[":
        return _parsed(first) is not None
    rows = (_object(raw.text.encode()) for raw in read_lines(path))
    return any(row and not row.keys().isdisjoint(columns) for row in rows)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _object(text: bytes) -> dict[str, Any] | None:
    row = _parsed(text) if text[:1] == b"{" else None
    return row if isinstance(row, dict) else None


def _text(path: Path) -> str:
    try:
        with open_text(path) as file:
            data: bytes = file.read()
    except READ_ERRORS as error:
        raise cannot_read(str(path), error) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise DataError(f"{show(str(path), 400)}:{line}: {not_utf8(byte)}") from error


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """The values that stand one behind the other, and the line that each begins in."""
    decoder, position, line, counted = json.JSONDecoder(), 0, 1, 0
    while position < len(text):
        if text[position] in " \t\r\n":
            position += 1
            continue
        line += text.count("\n", counted, position)
        counted = position
        value, position = decoder.raw_decode(text, position)
        yield line, value


def _rows_of(path: Path, value: Any, columns: Collection[str], split: str) -> list[Any]:
    """The rows of a file that is one JSON value."""
    if isinstance(value, list):
        return value
    if _in_columns(value, columns):
        raise DataError(
            f"{show(str(path), 400)} holds its columns as lists, one value a row: write one object per row, in pandas "
            'df.to_json(path, orient="records", lines=True)'
        )
    lists = _list_below_a_key(value, columns)
    if lists is None:
        return [value]
    if len(lists) == 1:
        return next(iter(lists.values()))
    chosen = [rows for key, rows in lists.items() if same_split(key, split)]
    if len(chosen) != 1:
        keys = ", ".join(show(key, 40) for key in lists)
        raise DataError(f"{show(str(path), 400)} has lists of rows below {keys}: set split to one of them")
    return chosen[0]


def _list_below_a_key(row: dict[str, Any], columns: Collection[str]) -> dict[str, list[Any]] | None:
    """The lists of objects in what is no row itself, such as `{"version": 1, "data": [...]}`."""
    if not row.keys().isdisjoint(columns):
        return None
    lists = {key: value for key, value in row.items() if isinstance(value, list) and value}
    return {key: value for key, value in lists.items() if isinstance(value[0], dict)} or None


def _in_columns(row: dict[str, Any], columns: Collection[str]) -> bool:
    """Whether this is a table by columns, as `DataFrame.to_json` and `Dataset.to_dict` give it."""
    values = [value for key, value in row.items() if key in columns]
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], (str, list))]
    maps = [value for value in values if isinstance(value, dict) and value and all(map(str.isdigit, value))]
    same_length = len({len(value) for value in values if isinstance(value, (list, dict))}) == 1
    return bool(values) and same_length and len(values) in (len(lists), len(maps))
