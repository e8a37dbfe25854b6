"""Tables of `datasets`: what is in them row by row, empty ones, and those that it saved."""

from __future__ import annotations

import base64
import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from kdtrain.data.cache_folder import default_cache_folder
from kdtrain.data.errors import show
from kdtrain.data.files import TABLES, RawRow, check_content, first_bytes
from kdtrain.data.images import is_pil, png
from kdtrain.data.splits import DEFAULT_SPLIT, EVERY_SPLIT, same_split
from kdtrain.errors import DataError

_MEDIA = (datasets.Image, datasets.Audio, datasets.Video)


def load_table(path: Path, kind: str) -> Any:
    """A Parquet or Arrow file; `datasets` keeps a copy in its cache."""
    folder, moved = default_cache_folder()
    cache = str(folder / "tables") if moved else None
    return datasets.load_dataset(TABLES[kind], data_files=glob.escape(str(path)), split="train", cache_dir=cache)


def table_size(path: Path, kind: str) -> int:
    """The number of rows of a Parquet or Arrow file."""
    return 0 if is_empty(path, kind) else len(load_table(path, kind))


def table_rows(table: Any, name: str, columns: Sequence[str], named: Sequence[str], first: int = 1) -> Iterator[RawRow]:
    """The rows of a table with these columns, numbered from `first` on; of those of `named` it is only said whether
    they hold something."""
    features = _undecoded(table.select_columns(columns).features)
    batches = table.select_columns([*columns, *named]).with_format("arrow").iter(batch_size=rows_at_once(table, 1000))
    rows = (
        pair for batch in batches for pair in zip(batch.select(columns).to_pylist(), _has(batch, named), strict=True)
    )
    for number, (row, has) in enumerate(rows, start=first):
        decoded = features.decode_example(row)
        given = {column: without_nulls(decoded[column], features[column]) for column in decoded}
        yield RawRow(name, number, json.dumps({**given, **dict.fromkeys(has, "present")}, default=portable))


def _has(batch: pa.Table, columns: Sequence[str]) -> Iterator[list[str]]:
    """For each row of a batch, those of the columns in which it has more than null or an empty list."""
    full = []
    for column in columns:
        values = batch[column]
        is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
        there = pc.greater(pc.list_value_length(values), 0) if is_list else values.is_valid()
        full.append(pc.fill_null(there, False).to_pylist())
    for row in range(len(batch)):
        yield [column for column, there in zip(columns, full, strict=True) if there[row]]


def without_nulls(value: Any, feature: Any) -> Any:
    """Arrow gives every mapping the keys of all others, those of other tools and calls. JSON text keeps its nulls."""
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: without_nulls(inner, feature[key]) for key, inner in value.items() if inner is not None}
    if isinstance(feature, (datasets.List, datasets.LargeList)) and isinstance(value, list):
        return [without_nulls(inner, feature.feature) for inner in value]
    return value


def has_mappings(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return isinstance(feature, dict) or (inner is not None and has_mappings(inner))


def rows_at_once(table: datasets.Dataset, most: int) -> int:
    """As many rows as 32 MiB of memory hold on average, at most `most`: rows may carry images."""
    return int(max(1, min(most, 2**25 * len(table.data) // max(table.data.nbytes, 1))))


def _undecoded(feature: Any) -> Any:
    """The same features with images, sounds and the like as they are stored: bytes and path."""
    if isinstance(feature, dict):
        return type(feature)({name: _undecoded(inner) for name, inner in feature.items()})
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, (list, tuple)):
        return [_undecoded(inner) for inner in feature]
    return replace(feature, decode=False) if isinstance(feature, _MEDIA) else feature


def portable(value: object) -> dict[str, str]:
    """Bytes travel as base64; dates and the like become something that is no text, which is refused with its type."""
    if is_pil(value):
        value = png(value)
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    return {"unsupported": type(value).__name__}


def is_empty(path: Path, kind: str) -> bool:
    """Whether a table has no rows, as some of those that Spark writes: the readers of `datasets` stumble over it."""
    start = first_bytes(path)
    if not start.startswith((b"PAR1", b"ARROW1")):
        check_content(path, start)
    try:
        if kind == ".parquet":
            return not start or pq.read_metadata(path).num_rows == 0
        with pa.memory_map(str(path)) as file:
            opened = pa.ipc.open_file(file) if start.startswith(b"ARROW1") else pa.ipc.open_stream(file)
            batches = map(opened.get_batch, range(opened.num_record_batches)) if start.startswith(b"ARROW1") else opened
            return not any(batch.num_rows for batch in batches)
    except (pa.ArrowException, OSError):
        return not start  # else what is wrong with it is said when it is read


def load_saved(path: str, split: str) -> Any:
    """A split of what `save_to_disk` wrote: a data set, or a dict of them."""
    saved = datasets.load_from_disk(path)
    if not isinstance(saved, datasets.DatasetDict):
        named = str(saved.split) if saved.split else DEFAULT_SPLIT
        if split in (DEFAULT_SPLIT, EVERY_SPLIT) or any(same_split(split, n) for n in (named, Path(path).name)):
            return saved
        raise DataError(f"{show(path, 400)} has no split {show(split)}: it is one data set, saved as {named}")
    if split == EVERY_SPLIT:
        return datasets.concatenate_datasets(list(saved.values()))
    found = [name for name in saved if same_split(name, split)]
    if split not in saved and len(found) != 1:
        raise DataError(f"{show(path, 400)} has no split {show(split)}: it has {', '.join(saved)}")
    return saved[split if split in saved else found[0]]
