"""The name of an encoded row by what is in it: what is stored of a row is found again wherever the row stands."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from kdtrain.data.encoded_row import MASKS, EncodedRow, tokenised_row
from kdtrain.data.images import Image, stored_image

BYTES = 16
_COLUMNS = ("input_ids", "labels", "teacher_input_ids", "teacher_labels", "images")
_AT_ONCE = 10_000  # rows of tokens that are read at a time; images are read row by row


def row_key(row: Mapping[str, Any], *, chats: bool = False) -> bytes:
    """16 bytes that a teacher's targets for a row depend on, and nothing else.

    Its tokens and labels, those of the teacher where it reads others, and the content of its images; neither its
    place nor its source.

    Args:
        row: of a data set as `build_dataset` returns it: `input_ids`, `labels`, and where they are there
            `teacher_input_ids`, `teacher_labels` and `images`.
        chats: whether its conversation (`chat`) counts as well: of a teacher with another tokenizer, which reads that.
    """
    encoded, images = tokenised_row(row), tuple(stored_image(record) for record in row.get("images") or ())
    return encoded_row_key(encoded, images, row.get("chat") if chats else None)


def encoded_row_key(row: EncodedRow, images: Sequence[Image] | None = None, chat: str | None = None) -> bytes:
    """`row_key` of a row as the encoder gives it, or as it was cut to fit a batch; `images` in place of its own."""
    views = [(row.input_ids, row.labels)]
    if row.teacher is not None:
        views.append((row.teacher.input_ids, row.teacher.labels))
    parts = [_as_bytes(values) for view in views for values in view]
    return _key(parts, [_digest(image) for image in (row.images if images is None else images)], chat)


def row_keys(rows: datasets.Dataset, *, chats: bool = False) -> Iterator[bytes]:
    """`row_key` of every row, in order: for many rows, whose tokens become no Python lists."""
    if set(MASKS) & set(rows.column_names):  # of trl's rows, in place of labels
        yield from (row_key(row, chats=chats) for row in rows)
        return
    wanted = (*_COLUMNS, "chat") if chats else _COLUMNS
    columns = rows.select_columns([name for name in wanted if name in rows.column_names])
    for table in columns.with_format("arrow").iter(_AT_ONCE if "images" not in columns.column_names else 100):
        yield from _keys_of_table(table)


def _keys_of_table(table: pa.Table) -> Iterator[bytes]:
    tokens = [_lists(table, name) for name in _COLUMNS[:4] if name in table.column_names]
    images = table.column("images").to_pylist() if "images" in table.column_names else [None] * len(table)
    chats = table.column("chat").to_pylist() if "chat" in table.column_names else [None] * len(table)
    for *parts, records, chat in zip(*tokens, images, chats, strict=True):
        digests = [_digest(stored_image(record)) for record in records or ()]
        yield _key([part for part in parts if part], digests, chat)


def _lists(table: pa.Table, name: str) -> Iterator[bytes]:
    """The lists of a column as bytes; nothing where there is none."""
    for chunk in table.column(name).chunks:
        lists = chunk.cast(pa.list_(pa.int32()))
        values, ends = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_pylist()
        yield from (_as_bytes(values[start:end]) for start, end in itertools.pairwise(ends))


def _as_bytes(values: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(values, dtype="<i4").tobytes()


def _digest(image: Image) -> bytes:
    return hashlib.blake2b(image.content(), digest_size=BYTES).digest()


def _key(tokens: Sequence[bytes], images: Sequence[bytes], chat: str | None = None) -> bytes:
    """One hash of parts that cannot run into one another.

    Args:
        tokens: ids and labels, and those of the teacher; these do not count where it reads the same.
    """
    tokens = tokens[:2] if tokens[2:] == tokens[:2] else tokens
    hashed = hashlib.blake2b(digest_size=BYTES)
    of_chat = [] if chat is None else [[chat.encode()]]
    for parts in (tokens, images, *of_chat):
        hashed.update(f"{[len(part) for part in parts]}".encode())
        for part in parts:
            hashed.update(part)
    return hashed.digest()
