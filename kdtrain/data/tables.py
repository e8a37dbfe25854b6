"""Tables of `datasets`: what is in them row by row, empty ones, and those that it saved."""

from __future__ import annotations

import base64
import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
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


def table_rows(table: Any, name: str, columns: Sequence[str], beside: Mapping[str, str]) -> Iterator[RawRow]:
    """The rows of a table with these columns and what stands beside them in each. No other is made an object."""
    features = _undecoded(table.select_columns(columns).features)
    batches = table.select_columns(columns).with_format("arrow").iter(batch_size=rows_at_once(table, 1000))
    for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
        yield RawRow(name, number, json.dumps({**features.decode_example(row), **beside}, default=portable))


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
