"""Where rows come from: files, folders, saved data sets, the hub; in order, as JSON text with their place.

Nothing that could run code is read: no pickles, no dataset scripts.
"""

from __future__ import annotations

import base64
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from kdtrain.data.columns import KNOWN_COLUMNS, NAMED_COLUMNS, ROW_COLUMNS, renamed, row_columns, wanted_columns
from kdtrain.data.errors import show
from kdtrain.data.files import RawRow, cannot_read, is_array, read_array, read_csv, read_lines
from kdtrain.data.images import is_pil, png
from kdtrain.data.media import BOX_COLUMN, PATH_COLUMNS
from kdtrain.data.parts import AUDIO_COLUMNS, VIDEO_COLUMNS
from kdtrain.errors import DataError

_LINES = (".jsonl", ".ndjson")
_CSV = {".csv": ",", ".tsv": "\t"}
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_SUFFIXES = (".json", *_LINES, *_CSV, *_TABLES)
_UNSAFE = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".py")
_FORMATS = ".json, .jsonl (also .gz), .parquet, .csv, .tsv, .arrow, a folder of these, or a saved Arrow data set"
_MEDIA = (datasets.Image, datasets.Audio, datasets.Video)
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
    name: str | None = None  # configuration, on the hub only
    split: str = "train"
    # Canonical -> in the file, {"prompt": "question"}; others are ignored. A name -> None: not read.
    columns: Mapping[str, str | None] | None = None
    limit: int | None = None  # only the first n rows
    weight: float = 1.0  # how many times each row appears per epoch, see `kdtrain.data.epochs`
    ce: bool = True  # False: the rows contribute no cross-entropy, the teacher alone supervises
    answers: str = "data"  # `teacher`: the rows' own answers are left out, for the teacher to write
    rows: Any = None  # the rows themselves, a `datasets.Dataset` or a sequence; `path` is then their name in messages


def read_all(sources: Sequence[Source], path: Path) -> tuple[datasets.Dataset, list[int]]:
    """All rows in one Arrow file, so that data larger than memory can be encoded; and the number from each source."""
    sizes = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _RAW) as writer:
        for index, source in enumerate(sources):
            size = 0
            for batch in _batches(_read(source)):
                numbered = [{**vars(row), "source": index, "row": size + i} for i, row in enumerate(batch)]
                writer.write_batch(pa.RecordBatch.from_pylist(numbered, schema=_RAW))
                size += len(batch)
            sizes.append(size)
    return datasets.Dataset.from_file(str(path)), sizes


def _batches(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    """1000 rows at a time, fewer where they carry images."""
    batch: list[RawRow] = []
    length = 0
    for row in rows:
        batch.append(row)
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
        raise DataError(f"{show(source.path, 400)} has no rows")
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
        allowed = KNOWN_COLUMNS if name is not None else NAMED_COLUMNS
        if column not in allowed:
            raise DataError(
                f"{show(source.path)}: columns maps to {show(column)!r}, which is not one of {', '.join(allowed)}"
                f"{_suggestion(column, allowed)}. It reads canonical: column in the file"
            )


def _rows(source: Source) -> Iterator[RawRow]:
    path = Path(source.path)
    if isinstance(source.rows, datasets.Dataset):
        yield from _table(source, source.path, lambda: source.rows)
    elif source.rows is not None:
        for number in range(len(source.rows)):
            yield RawRow(source.path, number + 1, json.dumps(dict(source.rows[number]), default=_portable))
    elif path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            yield from _table(source, source.path, lambda: _from_disk(source))
            return
        for file in _files_in(path, source.split):
            yield from _file(source, file)
    elif path.is_file():
        yield from _file(source, path)
    else:
        yield from _hub(source)


def _file(source: Source, path: Path) -> Iterator[RawRow]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".gz":
        kind = suffixes[-2] if len(suffixes) > 1 else ""
    if kind in _UNSAFE:
        raise DataError(
            f"{show(str(path), 400)}: {kind} files can run code when they are read and are refused. Use {_FORMATS}"
        )
    if kind in _LINES or (kind == ".json" and not is_array(path)):
        yield from read_lines(path)
    elif kind == ".json":
        yield from read_array(path)
    elif kind in _CSV:
        yield from read_csv(path, _CSV[kind])
    elif kind in _TABLES:
        load = partial(datasets.load_dataset, _TABLES[kind], data_files=str(path), split="train")
        yield from _table(source, str(path), load)
    else:
        raise DataError(f"{show(str(path), 400)}: unknown format {kind or '(no suffix)'}. Use {_FORMATS}")


def _table(source: Source, name: str, load: Any) -> Iterator[RawRow]:
    """Rows of anything that `datasets` reads. Only the columns that are used are turned into Python objects."""
    try:
        table = load()
    except DataError:
        raise
    except Exception as error:  # each reader of `datasets` has its own errors
        raise cannot_read(name, error, 400) from error
    mapped = set(renamed(source.columns).values())
    wanted = wanted_columns(source.columns) if mapped else {*wanted_columns(source.columns), *PATH_COLUMNS}
    found = [column for column in table.column_names if column in wanted]
    if not (mapped or set(KNOWN_COLUMNS)) & set(found):
        raise _no_columns(source, name, table.column_names)
    if source.limit is not None:
        table = table.select(range(min(source.limit, len(table))))
    # Videos and sounds are named, never decoded: that a row has one is all the checks need (parts.py, media.py).
    unread = () if source.columns else (*VIDEO_COLUMNS, *AUDIO_COLUMNS, BOX_COLUMN)
    named = [column for column in unread if column in table.column_names and column not in found]
    features = _undecoded(table.select_columns(found).features)
    batches = table.select_columns([*found, *named]).with_format("arrow").iter(batch_size=rows_at_once(table, 1000))
    rows = (pair for batch in batches for pair in zip(batch.select(found).to_pylist(), _has(batch, named), strict=True))
    for number, (row, has) in enumerate(rows, start=1):
        decoded = features.decode_example(row)
        given = {column: without_nulls(decoded[column], features[column]) for column in decoded}
        yield RawRow(name, number, json.dumps({**given, **dict.fromkeys(has, "present")}, default=_portable))


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


def rows_at_once(table: datasets.Dataset, most: int) -> int:
    """As many rows as 32 MiB of memory hold on average, at most `most`: rows may carry images."""
    return int(max(1, min(most, 2**25 * len(table.data) // max(table.data.nbytes, 1))))


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


def _undecoded(feature: Any) -> Any:
    """The same features with images, sounds and the like as they are stored: bytes and path."""
    if isinstance(feature, dict):
        return type(feature)({name: _undecoded(inner) for name, inner in feature.items()})
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, (list, tuple)):
        return [_undecoded(inner) for inner in feature]
    return replace(feature, decode=False) if isinstance(feature, _MEDIA) else feature


def _portable(value: object) -> dict[str, str]:
    """Bytes travel as base64; dates and the like become something that is no text, which is refused with its type."""
    if is_pil(value):
        value = png(value)
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    return {"unsupported": type(value).__name__}


def _from_disk(source: Source) -> Any:
    saved = datasets.load_from_disk(source.path)
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if source.split not in saved:
        raise DataError(f"{show(source.path, 400)} has no split {show(source.split)}: it has {', '.join(saved)}")
    return saved[source.split]


def _files_in(folder: Path, split: str) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name.removesuffix(".gz").endswith(_SUFFIXES))
    if not files:
        raise DataError(f"{show(str(folder), 400)} has no data files. Use {_FORMATS}")
    # Published folders hold train-00000-of-00002.parquet beside test-…; without such names all files are one split.
    return [f for f in files if re.split(r"[-_.]", f.name)[0] == split] or files


def _hub(source: Source) -> Iterator[RawRow]:
    path = Path(source.path)
    file_like = path.suffix in (".gz", *_SUFFIXES, *_UNSAFE)
    # The hub's ids are `name` or `organisation/name`.
    if path.is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") > 1 or file_like:
        siblings = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no such file or folder: {show(source.path, 400)}{_suggestion(path.name, siblings)}")

    def load() -> Any:
        config = datasets.DownloadConfig(max_retries=1)
        try:
            return datasets.load_dataset(source.path, source.name, split=source.split, download_config=config)
        except Exception as error:
            reason = show(str(error) or type(error).__name__, 400)
            raise DataError(
                f"cannot load the data set {show(source.path)} from the hub: {reason}. If it should be a local file, "
                "give its path. Without a network, put it into the cache first and set HF_HUB_OFFLINE=1; behind a "
                "mirror set HF_ENDPOINT"
            ) from error

    yield from _table(source, f"{source.path}[{source.split}]", load)


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
        hint = _suggestion(wrong, found)
        return DataError(f"{show(name, 400)} has the columns {listed}, not those of columns ({mapped}){hint}")
    return DataError(
        f"{show(name, 400)} has none of the columns {', '.join(ROW_COLUMNS)} but {listed}. Map them, for example "
        "columns: {prompt: question, completion: answer}"
    )


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {show(close[0])}?" if close else ""
