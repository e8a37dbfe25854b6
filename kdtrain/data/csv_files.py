"""CSV and TSV files, strictly: a line that does not fit the header, or whose quotes are broken, is no row of the data.

`csv` alone would drop the surplus cells of a line, and make one cell of all that follows a quote that is never closed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdtrain.data.errors import show
from kdtrain.data.files import READ_ERRORS, RawRow, cannot_read, not_utf8, open_text
from kdtrain.errors import DataError

_DELIMITERS = {",": "a comma", "\t": "a tab"}


def read_csv(path: Path, delimiter: str) -> Iterator[RawRow]:
    """Everything stays text: type inference makes numbers of answers such as 42, and nothing of those that say NA."""
    csv.field_size_limit(2**31 - 1)
    try:
        with open_text(path) as file:
            # A byte that is no UTF-8 becomes half a surrogate pair, which costs its row only.
            records = _Records(path, io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline=""), delimiter)
            header: list[str] | None = None
            for line, fields, problem in records:
                if header is None:
                    header = _header(path, fields, problem, delimiter)
                elif not problem:
                    yield _row(path, line, fields, header, delimiter)
                else:
                    yield RawRow(str(path), line, problem=problem)
    except READ_ERRORS as error:
        raise cannot_read(str(path), error) from error


class _Records:
    """The rows of a file as (line, cells, problem); the line is the last one of the row, or the first of a broken one.

    Blank lines are left out.
    """

    def __init__(self, path: Path, file: Any, delimiter: str) -> None:
        self._path, self._file = path, file
        self._lines: list[str] = []  # of the row that is being read
        self._broken_line = 0  # of the last row whose quotes are broken
        self._reader = csv.reader(self._read_lines(), delimiter=delimiter, strict=True)

    def _read_lines(self) -> Iterator[str]:
        for line in self._file:
            self._lines.append(line)
            yield line

    def __iter__(self) -> Iterator[tuple[int, list[str], str]]:
        while True:
            self._lines.clear()
            first = self._reader.line_num + 1
            try:
                fields = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield first, [], self._broken(first, error)
                continue
            if self._broken_line and self._quotes % 2:
                raise self._unclear(self._broken_line, f"closed in line {first} or before")
            if problem := _not_utf8(fields):
                yield first, [], problem
            elif any(line.strip() for line in self._lines):
                yield self._reader.line_num, fields, ""

    @property
    def _quotes(self) -> int:
        return sum(line.count('"') for line in self._lines)

    def _broken(self, first: int, error: csv.Error) -> str:
        """Why a row cannot be read.

        Raises:
            DataError: with an odd number of quotes it does not end with its line, and what of the file follows is
                unclear.
        """
        if "unexpected end of data" in str(error):
            raise self._unclear(first, "never closed")
        if self._quotes % 2:
            raise self._unclear(first, f"followed by text in line {self._reader.line_num}")
        self._broken_line = first
        if "expected after" in str(error):
            return 'text follows a closing quote: write quotes inside of quotes twice ("")'
        return f"not a row of a CSV file: {show(str(error))}"

    def _unclear(self, line: int, what: str) -> DataError:
        return DataError(
            f"{show(str(self._path), 400)}:{line}: a quote is opened here and {what}, so that it is unclear where this "
            'row ends. Close it, and write quotes inside of quotes twice ("")'
        )


def _not_utf8(fields: list[str]) -> str:
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError as error:
        return not_utf8(ord(error.object[error.start]) - 0xDC00)
    return ""


def _header(path: Path, fields: list[str], problem: str, delimiter: str) -> list[str]:
    """The names of the columns, without blanks around them and without unnamed ones at the end."""
    name = show(str(path), 400)
    if problem:
        raise DataError(f"{name}: the header cannot be read: {problem}")
    names = _without_blanks_behind([field.strip() for field in fields], 0)
    if twice := [column for i, column in enumerate(names) if column and column in names[:i]]:
        raise DataError(f"{name}: the header has {show(twice[0], 60)} twice: rename one of the columns")
    if len(names) == 1 and (found := [other for other in ",;\t|" if other in names[0]]):
        raise DataError(
            f"{name}: the header is one column, {show(names[0])}: its fields seem to be separated by {found[0]!r}, and "
            f"this ending means {_DELIMITERS[delimiter]}. Save it with commas (.csv) or tabs (.tsv)"
        )
    return names


def _row(path: Path, line: int, fields: list[str], header: list[str], delimiter: str) -> RawRow:
    fields = _without_blanks_behind(fields, len(header))  # spreadsheets fill lines up
    if len(fields) != len(header):
        count = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
        hint = f": put cells that hold {_DELIMITERS[delimiter]} in quotes" if len(fields) > len(header) else ""
        return RawRow(str(path), line, problem=f"{count}, the header has {len(header)}{hint}")
    cells = {column: field or None for column, field in zip(header, fields, strict=True) if column}
    return RawRow(str(path), line, json.dumps(cells))


def _without_blanks_behind(fields: list[str], least: int) -> list[str]:
    """Without empty cells at the end, as long as more than `least` are left."""
    end = len(fields)
    while end > least and not fields[end - 1].strip():
        end -= 1
    return fields[:end]
