"""Encodes raw rows in parallel, once: the result is stored under a key made of everything that it depends on."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from kdtrain.data.columns import parse_json
from kdtrain.data.encoded_row import EncodedRow, Limits, truncate
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.errors import RowError
from kdtrain.data.files import folder_of
from kdtrain.data.heap import frozen_heap
from kdtrain.data.images import Image, ImageError
from kdtrain.data.media import parse_media_row
from kdtrain.data.multimodal import image_content, tokenizer_content
from kdtrain.data.rows import Chat
from kdtrain.data.scratch import alone_in, scratch_folder
from kdtrain.data.sources import Source
from kdtrain.data.tables import rows_at_once

# Raise it with every change that makes the same row come out differently.
VERSION = 8

_FEATURES = datasets.Features(
    {
        "raw": datasets.Value("int64"),  # the number of the raw row that it is made of
        # Fields of EncodedRow, and what is known of a row beside them.
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "labels": datasets.Sequence(datasets.Value("int32")),
        "prompt_length": datasets.Value("int32"),
        "kd_weight": datasets.Value("float32"),
        "kd_weights": datasets.Sequence(datasets.Value("float32")),
        "status": datasets.Value("string"),  # ok | bad | long (over max_length, an error) | dropped
        "problem": datasets.Value("string"),
        "again": datasets.Value("bool"),  # an image could not be read: next time it may be
        "length": datasets.Value("int32"),  # before truncation
        "supervised": datasets.Value("int32"),
        "kind": datasets.Value("string"),
        "prompt_only": datasets.Value("bool"),
        "extended": datasets.Value("bool"),
        "unterminated": datasets.Value("bool"),
        "notes": datasets.List(datasets.Value("string")),
        # Of rows with images: the conversation before its images are expanded, and where the images are.
        "text": datasets.Value("large_string"),
        "sizes": datasets.List(datasets.Value("int32")),
        "images": datasets.List({"path": datasets.Value("string"), "bytes": datasets.Value("large_binary")}),
        # The row as the teacher reads it, null where that is as the student does.
        "teacher_input_ids": datasets.Sequence(datasets.Value("int32")),
        "teacher_labels": datasets.Sequence(datasets.Value("int32")),
        "teacher_prompt_length": datasets.Value("int32"),
        "chat": datasets.Value("large_string"),  # null unless the encoder keeps it, as the next
        "answer": datasets.Value("large_string"),
        "route": datasets.Value("string"),  # null where there are not several teachers
    }
)
_SCHEMA = _FEATURES.arrow_schema
_OF_TEACHER = ("input_ids", "labels", "prompt_length")
_FOUND = ("images", "supervised", "length", "status", "problem", "again")  # other than as fields of EncodedRow
_OF_ROW = tuple(one.name for one in dataclasses.fields(EncodedRow) if one.name in _FEATURES and one.name not in _FOUND)
_of_row, _of_teacher = attrgetter(*_OF_ROW), attrgetter(*_OF_TEACHER)
_COLUMNS = ("raw", *_OF_ROW, *(f"teacher_{name}" for name in _OF_TEACHER), *_FOUND)


def encode_cached(
    raw: datasets.Dataset,
    encoder: RowEncoder,
    sources: Sequence[Source],
    limits: Limits,
    content: Sequence[str],
    num_proc: int | None,
    cache_dir: Path,
) -> datasets.Dataset:
    """Encodes the rows of `read_all`, or reads what an earlier call stored.

    Args:
        content: hashes that say what the rows are, see `SourceContent.content`: they are not read again for it.

    Entries are folders in `cache_dir`, complete as soon as they are visible; a damaged one is made again. Processes
    that encode the same rows at once do not wait for each other: the first entry counts. Returned is every row in the
    same order, as one row or several, with the columns of `_FEATURES`; bad rows have a `problem` and no tokens.
    """
    entry = cache_dir / f"encoded-{_key(raw, encoder, sources, limits, content)}"

    def current() -> datasets.Dataset | None:
        stored = _stored(entry, len(raw))
        return None if stored is None or _is_repaired(stored, raw, encoder, sources, limits) else stored

    if (stored := current()) is not None:
        return stored
    at_once = rows_at_once(raw, 500)
    with scratch_folder(cache_dir, "encoding-") as scratch:
        work = scratch / "new"
        work.mkdir()
        raw.map(
            _encoded_table,
            batched=True,
            with_indices=True,
            batch_size=at_once,
            writer_batch_size=at_once,
            remove_columns=raw.column_names,
            features=_FEATURES,
            fn_kwargs={"encoder": encoder, "sources": sources, "limits": limits},
            num_proc=_workers(len(raw), num_proc),
            cache_file_name=str(work / "rows.arrow"),
            new_fingerprint=entry.name.removeprefix("encoded-")[:32],
            desc="Encoding rows",
        )
        with alone_in(cache_dir):
            # Another process may have stored the same rows meanwhile, and reads them: they stay.
            if (stored := current()) is None:
                _put(work, entry, scratch / "damaged")
                stored = _stored(entry, len(raw))
    assert stored is not None
    return stored


def _put(work: Path, entry: Path, aside: Path) -> None:
    """Make a folder an entry, in the place of a damaged one: at no time is a part of one there."""
    with contextlib.suppress(FileNotFoundError):
        entry.rename(aside)
    try:
        work.rename(entry)
    except OSError:
        if not entry.is_dir():  # else, where the file system knows no locks, another process was faster
            raise


def _stored(entry: Path, rows: int) -> datasets.Dataset | None:
    files = sorted(entry.glob("rows*.arrow"))  # datasets leaves files of its own beside them
    try:
        parts = [datasets.Dataset.from_file(str(file)) for file in files]
    except (OSError, pa.ArrowException):
        return None
    if not parts:
        return None
    stored = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    return stored if distinct(stored.data.column("raw").to_numpy()) == rows else None


def distinct(ordered: np.ndarray) -> int:
    """How many different numbers there are in an ordered array."""
    return int((np.diff(ordered) != 0).sum()) + bool(len(ordered))


def _is_repaired(
    stored: datasets.Dataset, raw: datasets.Dataset, encoder: RowEncoder, sources: Sequence[Source], limits: Limits
) -> bool:
    """Whether an image that could not be read can be read now: rights, limits and libraries change."""
    rows = stored.data.column("raw").to_numpy()[stored.data.column("again").to_numpy()]
    for start in range(0, len(rows), 100):
        some = rows[start : start + 100]
        if set(encode_batch(raw[some], list(some), encoder, sources, limits)["status"]) != {"bad"}:
            return True
    return False


def _key(
    raw: datasets.Dataset, encoder: RowEncoder, sources: Sequence[Source], limits: Limits, content: Sequence[str]
) -> str:
    """A hash of all that the encoded rows depend on.

    Not the place of a row: the same data under another path is the same data. Images count with theirs.
    """
    tokenizer = encoder.tokenizer
    options = {
        "version": [VERSION, *_FEATURES],
        **tokenizer_content(tokenizer),
        "images": image_content(encoder.processing_class),
        "own_template": encoder.chat_template or encoder.processing_class.chat_template or tokenizer.chat_template,
        "template": vars(encoder.options),
        "prompts": encoder.prompts,
        "chats": encoder.keep_chats,
        "generated": encoder.generated,
        "checked": "where there is one" if encoder.optional_answers else encoder.keep_answers,
        "limits": [limits.max_length, limits.on_overlength],
        "columns": [dict(source.columns) if source.columns else None for source in sources],
        "answers": [source.answers for source in sources],
        "routes": [list(encoder.teachers), [source.teacher for source in sources] if encoder.teachers else None],
        "libraries": [datasets.__version__, version("transformers")],
        "rows": list(content),
    }
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    if encoder.multimodal is not None:
        for batch in raw.select_columns(["source", "text", "file"]).iter(batch_size=rows_at_once(raw, 1000)):
            for image in _image_files(batch, sources, encoder.image_root):
                digest.update(image.identity)
    return digest.hexdigest()[:40]


def _image_files(batch: dict[str, list[Any]], sources: Sequence[Source], root: str | None) -> Iterator[Image]:
    """The images that stand in files of their own; the bytes of the others are in the rows' text."""
    for text, file, number in zip(batch["text"], batch["file"], batch["source"], strict=True):
        columns, prefix = sources[number].columns, sources[number].prefix_column
        # Image columns and parts are called image…, or file_name; only a mapping can give them other names.
        # Parsing every row of a text data set twice would take longer.
        if "image" not in text and "file_name" not in text and not columns:
            continue
        try:
            row = {name: value for name, value in parse_json(text, columns, prefix).items() if name != prefix}
            parsed = parse_media_row(row, root or folder_of(file), True)
        except RowError:
            continue  # counted when it is encoded
        if isinstance(parsed, Chat):
            yield from (image for image in parsed.images if image.data is None)


def _workers(rows: int, num_proc: int | None) -> int | None:
    """None is this process alone. Starting others costs about a second: more than 2000 short rows do."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = (min(cores, 8) if rows > 2000 else 1) if num_proc is None else num_proc
    return chosen if chosen > 1 else None


def _encoded_table(
    batch: dict[str, list[Any]], indices: list[int], encoder: RowEncoder, sources: Sequence[Source], limits: Limits
) -> pa.Table:
    """`encode_batch` in Arrow: `datasets` takes several times as long to make it of lists."""
    with frozen_heap():
        columns = encode_batch(batch, indices, encoder, sources, limits)
        return pa.table([pa.array(columns[field.name], field.type) for field in _SCHEMA], schema=_SCHEMA)


def encode_batch(
    batch: dict[str, list[Any]], indices: list[int], encoder: RowEncoder, sources: Sequence[Source], limits: Limits
) -> dict[str, list[Any]]:
    """Raw rows encoded, in the columns of `_FEATURES`.

    Args:
        batch: by column `problem`, `text` and `file` of a RawRow, and `source`, the number of its source.
        indices: the numbers of the rows, which become their `raw`.
    """
    problems, parsed = list(batch["problem"]), {}
    for i, text in enumerate(batch["text"]):
        if not problems[i]:
            try:
                source = sources[batch["source"][i]]
                parsed[i] = parse_json(text, source.columns, source.prefix_column)
            except RowError as error:
                problems[i] = str(error)
    folders = {file: folder_of(file) for file in set(batch["file"])}
    of_rows = [folders[batch["file"][i]] for i in parsed]
    teacher_answers = [sources[batch["source"][i]].answers == "teacher" for i in parsed]
    of_sources = [sources[batch["source"][i]].teacher for i in parsed]
    results = encoder.encode(list(parsed.values()), of_rows, teacher_answers, of_sources)
    encoded = dict(zip(parsed, results, strict=True))
    records: list[tuple[Any, ...]] = []
    for i, problem in enumerate(problems):
        result = encoded.get(i) or RowError(problem)
        rows = [_bad(result)] if isinstance(result, RowError) else [_fitted(row, limits) for row in result]
        records += [(indices[i], *row) for row in rows]
    return {name: list(column) for name, column in zip(_COLUMNS, zip(*records, strict=True), strict=True)}


_NOTHING = EncodedRow([], [], 0)


def _bad(error: RowError) -> tuple[Any, ...]:
    return _record(_NOTHING, "bad", 0, str(error), again=isinstance(error, ImageError))


def _fitted(row: EncodedRow, limits: Limits) -> tuple[Any, ...]:
    if limits.max_length is None or row.longest <= limits.max_length:
        return _record(row, "ok", len(row.input_ids))
    if limits.on_overlength == "truncate" and (cut := truncate(row, limits.max_length)):
        return _record(cut, "ok", row.longest)
    by_teacher = " (as the teacher reads it)" if len(row.input_ids) < row.longest else ""
    return _record(_NOTHING, "long" if limits.on_overlength == "error" else "dropped", row.longest, by_teacher)


def _record(row: EncodedRow, status: str, length: int, problem: str = "", again: bool = False) -> tuple[Any, ...]:
    """A row in the order of `_COLUMNS`, behind its number."""
    images, teacher = [image.record for image in row.images], row.teacher
    of_teacher = (None,) * len(_OF_TEACHER) if teacher is None else _of_teacher(teacher)
    return (*_of_row(row), *of_teacher, images, row.supervised, length, status, problem, again)
