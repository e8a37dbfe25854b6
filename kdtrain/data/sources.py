"""Where rows come from: files, folders, saved data sets, the hub; in order, as JSON text with their place.

Nothing that could run code is read: no pickles, no dataset scripts.
"""

from __future__ import annotations

import base64
import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from kdtrain.data.csv_files import read_csv
from kdtrain.data.errors import show
from kdtrain.data.files import PACKED, RawRow, cannot_read, check_content, first_bytes
from kdtrain.data.images import is_pil, png
from kdtrain.data.json_files import read_json
from kdtrain.data.parts import VIDEO_COLUMNS
from kdtrain.data.rows import IMAGE_COLUMNS, KNOWN_COLUMNS, ROW_COLUMNS
from kdtrain.data.splits import DEFAULT_SPLIT, EVERY_SPLIT, Part, choose, names_split, parse_split, same_split
from kdtrain.errors import DataError

_JSON = (".json", ".jsonl", ".ndjson")
_CSV = {".csv": ",", ".tsv": "\t"}
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_SUFFIXES = (*_JSON, *_CSV, *_TABLES)
_UNSAFE = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".py")
_FORMATS = (
    ".json, .jsonl (also packed, .gz), .parquet, .csv, .tsv, .arrow, a folder of these, or a saved Arrow data set"
)
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
    name: str | None = None  # configuration: of a data set on the hub, or a folder in the one that `path` names
    split: str = DEFAULT_SPLIT  # with slices: train[:90%]
    columns: Mapping[str, str] | None = None  # canonical -> in the file, {"prompt": "question"}; others are ignored
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
    for column in source.columns or ():
        if column not in KNOWN_COLUMNS:
            raise DataError(
                f"{show(source.path)}: columns maps to {show(column)!r}, which is not one of {', '.join(KNOWN_COLUMNS)}"
                f"{_suggestion(column, KNOWN_COLUMNS)}. It reads canonical: column in the file"
            )


def _rows(source: Source) -> Iterator[RawRow]:
    parts, path = parse_split(source.split), Path(source.path)
    if source.rows is None and not path.exists():
        yield from _hub(source, parts)  # `datasets` slices itself
        return
    for part in parts:
        if part.whole:
            yield from _rows_of(source, part.name)
            continue
        # Read twice where the number of rows decides: they need not fit into memory.
        size = sum(1 for _ in _rows_of(source, part.name)) if part.needs_size else sys.maxsize
        yield from islice(_rows_of(source, part.name), *part.bounds(size))


def _rows_of(source: Source, split: str) -> Iterator[RawRow]:
    """The rows of a split, where there are splits: it was checked that rows at hand need none."""
    path = Path(source.path)
    if isinstance(source.rows, datasets.Dataset):
        yield from _table(source, source.path, lambda: source.rows)
    elif source.rows is not None:
        for number in range(len(source.rows)):
            yield RawRow(source.path, number + 1, json.dumps(dict(source.rows[number]), default=_portable))
    elif path.is_dir():
        if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            yield from _table(source, source.path, lambda: _from_disk(source, split))
            return
        for file in choose(_files_in(path), split, path):
            yield from _file(source, file, split)
    else:
        _check_single(source, path, split)
        yield from _file(source, path, split)


def _check_single(source: Source, path: Path, split: str) -> None:
    """A file is one split, and has no configurations: what asks for another would be ignored."""
    if source.name is not None:
        raise DataError(
            f"{show(source.path, 400)} is a file and has no configuration {show(source.name)}: remove name, which is "
            "for data sets of the hub and folders"
        )
    known = split in (DEFAULT_SPLIT, EVERY_SPLIT) or same_split(path.parent.name, split)
    if not known and not names_split(path, split, path.parent):
        raise DataError(
            f"{show(source.path, 400)} is a file without the splits of a data set, there is no {show(split)}: remove "
            "split, name the file that holds it, or take rows by their number, split: train[90%:]"
        )


def _file(source: Source, path: Path, split: str) -> Iterator[RawRow]:
    kind, name = _kind(path), show(str(path), 400)
    if kind in _UNSAFE:
        raise DataError(f"{name}: {kind} files can run code when they are read and are refused. Use {_FORMATS}")
    if kind in _JSON:
        yield from read_json(path, _wanted(source), split)
    elif kind in _CSV:
        yield from read_csv(path, _CSV[kind])
    elif kind in _TABLES:
        if not _is_empty(path, kind):
            load = partial(datasets.load_dataset, _TABLES[kind], data_files=str(path), split="train")
            yield from _table(source, str(path), load)
    else:
        raise DataError(f"{name}: unknown format {kind or '(no suffix)'}. Use {_FORMATS}")


def _kind(path: Path) -> str:
    """The ending that says the format: the last, or the one before it of what is packed."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in PACKED), "")


def _is_empty(path: Path, kind: str) -> bool:
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


def _wanted(source: Source) -> set[str]:
    """The columns that a row may have, by their names in the file."""
    mapped = set((source.columns or {}).values())
    return {*mapped, *IMAGE_COLUMNS} if mapped else set(KNOWN_COLUMNS)


def _table(source: Source, name: str, load: Any) -> Iterator[RawRow]:
    """Rows of anything that `datasets` reads. Only the columns that are used are turned into Python objects."""
    try:
        table = load()
    except DataError:
        raise
    except Exception as error:  # each reader of `datasets` has its own errors
        raise cannot_read(name, error, 400) from error
    mapped = set((source.columns or {}).values())
    found = [column for column in table.column_names if column in _wanted(source)]
    if not found or (mapped and not mapped & set(found)):
        raise _no_columns(source, name, table.column_names)
    if source.limit is not None and all(part.whole for part in parse_split(source.split)):
        table = table.select(range(min(source.limit, len(table))))
    # Videos are named, never decoded: that a row has one is all the check in parts.py needs.
    extra = {column: "present" for column in VIDEO_COLUMNS if column in table.column_names and not source.columns}
    features = _undecoded(table.select_columns(found).features)
    batches = table.select_columns(found).with_format("arrow").iter(batch_size=rows_at_once(table, 1000))
    for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
        yield RawRow(name, number, json.dumps({**features.decode_example(row), **extra}, default=_portable))


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


def _portable(value: object) -> dict[str, str]:
    """Bytes travel as base64; dates and the like become something that is no text, which is refused with its type."""
    if is_pil(value):
        value = png(value)
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    return {"unsupported": type(value).__name__}


def _from_disk(source: Source, split: str) -> Any:
    saved = datasets.load_from_disk(source.path)
    if not isinstance(saved, datasets.DatasetDict):
        named = str(saved.split) if saved.split else DEFAULT_SPLIT
        if split in (DEFAULT_SPLIT, EVERY_SPLIT) or any(same_split(split, n) for n in (named, Path(source.path).name)):
            return saved
        raise DataError(f"{show(source.path, 400)} has no split {show(split)}: it is one data set, saved as {named}")
    if split == EVERY_SPLIT:
        return datasets.concatenate_datasets(list(saved.values()))
    found = [name for name in saved if same_split(name, split)]
    if split not in saved and len(found) != 1:
        raise DataError(f"{show(source.path, 400)} has no split {show(split)}: it has {', '.join(saved)}")
    return saved[split if split in saved else found[0]]


def _files_in(folder: Path) -> list[Path]:
    files = sorted(f for f in folder.iterdir() if f.is_file() and _kind(f) in _SUFFIXES)
    if not files:
        raise DataError(f"{show(str(folder), 400)} has no data files. Use {_FORMATS}")
    return files


def _hub(source: Source, parts: Sequence[Part]) -> Iterator[RawRow]:
    path = Path(source.path)
    file_like = path.suffix in (*PACKED, *_SUFFIXES, *_UNSAFE)
    # The hub's ids are `name` or `organisation/name`.
    if path.is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") > 1 or file_like:
        siblings = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no such file or folder: {show(source.path, 400)}{_suggestion(path.name, siblings)}")

    split = "+".join(part.text for part in parts)

    def load() -> Any:
        config = datasets.DownloadConfig(max_retries=1)
        try:
            return datasets.load_dataset(source.path, source.name, split=split, download_config=config)
        except Exception as error:
            reason = show(str(error) or type(error).__name__, 400)
            raise DataError(
                f"cannot load the data set {show(source.path)} from the hub: {reason}. If it should be a local file, "
                "give its path. Without a network, put it into the cache first and set HF_HUB_OFFLINE=1; behind a "
                "mirror set HF_ENDPOINT"
            ) from error

    yield from _table(source, f"{source.path}[{split}]", load)


def _check_columns(source: Source, rows: list[RawRow]) -> None:
    """Refuses a source of which none of the first rows has a usable column; a single one without is a bad row."""
    wanted = {source.columns.get(c) for c in ROW_COLUMNS} - {None} if source.columns else set(ROW_COLUMNS)
    seen: dict[str, None] = {}
    for raw in rows:
        try:
            row = json.loads(raw.text)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            seen.update(dict.fromkeys(row))
    if seen and not wanted & set(seen):
        raise _no_columns(source, rows[0].file, list(seen))


def _no_columns(source: Source, name: str, found: list[str]) -> DataError:
    listed = ", ".join(show(column, 60) for column in found)
    if source.columns:
        mapped = ", ".join(f"{c}: {show(f, 60)}" for c, f in source.columns.items())
        wrong = next((f for f in source.columns.values() if f not in found), "")
        hint = _suggestion(wrong, found)
        return DataError(f"{show(name, 400)} has the columns {listed}, not those of columns ({mapped}){hint}")
    return DataError(
        f"{show(name, 400)} has none of the columns {', '.join(ROW_COLUMNS)} but {listed}. Map them, for example "
        "columns: {prompt: question, completion: answer}"
    )


def _suggestion(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {show(close[0])}?" if close else ""
