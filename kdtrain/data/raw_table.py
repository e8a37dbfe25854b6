"""The raw rows of all sources in one Arrow file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from kdtrain.data.files import RawRow
from kdtrain.data.sources import Source, read_source

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


def read_all(sources: Sequence[Source], path: Path) -> tuple[datasets.Dataset, list[int]]:
    """All rows in one Arrow file, so that data larger than memory can be encoded; and the number from each source."""
    sizes = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, _RAW) as writer:
        for index, source in enumerate(sources):
            size = 0
            for batch in _batches(read_source(source)):
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
