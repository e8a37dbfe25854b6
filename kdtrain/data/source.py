"""A source of rows: what it is, which files it means, and whether their columns are those of rows.

Nothing here imports `datasets` or torch, so that a config can be checked in a moment (`first_rows.py`).
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdtrain.data.columns import (
    ANSWER_COLUMN,
    KNOWN_COLUMNS,
    NAMED_COLUMNS,
    PATH_COLUMNS,
    ROUTE_COLUMN,
    ROW_COLUMNS,
    UNREAD_MEDIA,
    renamed,
    row_columns,
)
from kdtrain.data.errors import show, suggestion
from kdtrain.data.files import RawRow, cannot_read
from kdtrain.data.folders import files_in, files_matching
from kdtrain.data.kd_weights import WEIGHT
from kdtrain.data.prefix import OPTION as PREFIX
from kdtrain.data.splits import DEFAULT_SPLIT, EVERY_SPLIT, names_split, same_split
from kdtrain.errors import DataError

ANSWERS = ("data", "teacher")


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
    teacher: str | None = None  # which of several teachers answers for rows that do not name one themselves
    divergence: str | None = None  # how the rows are compared with their teacher; None is as the run says
    beta: float | None = None  # as `divergence`
    answers: str = "data"  # `teacher`: the rows' own answers are left out, for the teacher to write
    prefix_column: str | None = None  # of the messages that the teacher alone reads, see prefix.py
    prefix_default: bool = False  # rows without a value there have others
    streaming: bool = False  # read by `kdtrain.data.stream`, without a copy of what is read
    rows: Any = None  # the rows themselves, a `datasets.Dataset` or a sequence; `path` is then their name in messages


LOSS_COLUMNS = ("kd_divergence", "kd_beta")
"""Columns of encoded rows: what their source says of how they are compared with the teacher."""


def source_loss(source: Source) -> dict[str, Any]:
    """A source's values of `LOSS_COLUMNS`, without those that it leaves to the run."""
    own = dict(zip(LOSS_COLUMNS, (source.divergence, source.beta), strict=True))
    return {name: value for name, value in own.items() if value is not None}


def check_source(source: Source) -> None:
    if source.limit is not None and source.limit < 1:
        raise DataError(f"{show(source.path)}: limit must be at least 1, not {source.limit}")
    if not 0 < source.weight < float("inf"):
        raise DataError(f"{show(source.path)}: weight must be a positive number, not {source.weight}")
    if source.answers not in ANSWERS:
        known = ", ".join(ANSWERS)
        raise DataError(f"{show(source.path)}: answers must be one of {known}, not {show(source.answers, 40)}")
    for column, name in (source.columns or {}).items():
        allowed = (
            (*KNOWN_COLUMNS, ANSWER_COLUMN, WEIGHT, ROUTE_COLUMN)
            if name is not None
            else (*NAMED_COLUMNS, *PATH_COLUMNS, *UNREAD_MEDIA)
        )
        if column not in allowed:
            raise DataError(
                f"{show(source.path)}: columns maps to {show(column)!r}, which is not one of {', '.join(allowed)}"
                f"{suggestion(column, allowed)}. It reads canonical: column in the file"
            )
    mapped = renamed(source.columns)
    if source.prefix_column in {*mapped, *mapped.values()}:
        raise DataError(
            f"{show(source.path)}: the column {show(source.prefix_column)} is that of {PREFIX} and stands in columns: "
            "it is read as the teacher's prefix and as nothing else. Take it out of one of them"
        )


def files_of(source: Source, split: str) -> list[Path]:
    """The files of a split, where the source is a file, a folder or a pattern."""
    path = Path(source.path)
    try:
        if os.path.isdir(path):
            return files_in(path, source.name, split)
        if not os.path.exists(path):
            check_name(source, "a pattern")
            return files_matching(source.path, split)
    except OSError as error:
        raise cannot_read(source.path, error) from error
    _check_single(source, path, split)
    return [path]


def check_name(source: Source, what: str) -> None:
    if source.name is not None:
        raise DataError(
            f"{show(source.path, 400)} is {what} and has no configuration {show(source.name)}: remove name, which is "
            "for data sets of the hub, and folders that are clones of them"
        )


def _check_single(source: Source, path: Path, split: str) -> None:
    """A file is one split, and has no configurations: what asks for another would be ignored."""
    check_name(source, "a file")
    if not os.path.isfile(path):
        raise DataError(f"{show(source.path, 400)} is neither a file nor a folder: a pipe can be read once only")
    known = split in (DEFAULT_SPLIT, EVERY_SPLIT) or same_split(path.parent.name, split)
    if not known and not names_split(path, split, path.parent):
        raise DataError(
            f"{show(source.path, 400)} is a file without the splits of a data set, there is no {show(split)}: remove "
            "split, name the file that holds it, or take rows by their number, split: train[90%:]"
        )


def check_columns(source: Source, rows: list[RawRow]) -> None:
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
        raise no_columns(source, rows[0].file, list(seen))
    if seen:
        check_prefix_column(source, rows[0].file, list(seen))


def check_table_columns(source: Source, name: str, found: Sequence[str]) -> None:
    """As `check_columns`, of a table, whose columns are known before its rows."""
    read = set(renamed(source.columns).values()) or set(KNOWN_COLUMNS)
    if not read & ({*found} - {source.prefix_column}):
        raise no_columns(source, name, found)
    check_prefix_column(source, name, found)


def check_prefix_column(source: Source, name: str, found: Sequence[str]) -> None:
    """Refuses a source without the teacher's prefix, once; where there is a default a source may do without."""
    if source.prefix_column is not None and not source.prefix_default and source.prefix_column not in found:
        listed = ", ".join(show(column, 60) for column in found)
        raise DataError(
            f"{show(name, 400)} has no column {show(source.prefix_column)}, which {PREFIX} names, but {listed}"
            f"{suggestion(source.prefix_column, found)} (with {{column: …, default: …}} a source may be without it)"
        )


class ColumnsError(DataError):
    """A source without the columns of rows; `message` and `hint` apart, for who shows them in two lines."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}. {hint[0].upper()}{hint[1:]}")
        self.message, self.hint = message, hint


def no_columns(source: Source, name: str, found: Sequence[str]) -> ColumnsError:
    """What to say of a source that has the columns `found` and no others."""
    listed = ", ".join(show(column, 60) for column in found)
    if renaming := renamed(source.columns):
        mapped = ", ".join(f"{c}: {show(f, 60)}" for c, f in renaming.items())
        wrong = next((f for f in renaming.values() if f not in found), "")
        near = difflib.get_close_matches(wrong, found, n=1)
        hint = f"did you mean {show(near[0], 60)}?" if near else "write into columns what the file has"
        return ColumnsError(f"{show(name, 400)} has the columns {listed}, not those of columns ({mapped})", hint)
    message = f"{show(name, 400)} has none of the columns {', '.join(ROW_COLUMNS)} but {listed}"
    mapping = _mapping(found)
    text = mapping.replace("instruction:", "prompt:").replace("output:", "completion:")
    plainly = "" if text == mapping else f", or with {text}, which gets no chat template"
    return ColumnsError(message, f"write the source as {{path: {show(source.path, 400)}, columns: {mapping}}}{plainly}")


# Names that columns have elsewhere, for what kdtrain calls `instruction`, `output` and `messages`.
_QUESTIONS = ("question", "problem", "query", "input", "user", "human", "request", "task", "title", "q")
_REPLIES = (
    "output", "answer", "response", "solution", "completion", "target", "assistant", "reply", "label", "summary", "a",
)  # fmt: skip
_CHATS = ("chat", "chats", "conversation", "dialog", "dialogue", "turns", "message")


def _mapping(found: Sequence[str]) -> str:
    """A mapping as it would be written for columns of these names, as far as they can be guessed."""
    by_name = {column.lower(): show(column, 60) for column in reversed(found)}
    chat, asked, reply = (
        next((by_name[name] for name in names if name in by_name), None) for names in (_CHATS, _QUESTIONS, _REPLIES)
    )
    if chat:
        return f"{{messages: {chat}}}"
    return f"{{instruction: {asked or '…'}, output: {reply or '…'}}}"
