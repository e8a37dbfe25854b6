"""All sources in one table, and which of its rows make up an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from kdtrain.data.sources import RawRow, Source, read_source

_RAW = pa.schema(
    [
        ("file", pa.string()),
        ("line", pa.int64()),
        ("text", pa.large_string()),
        ("problem", pa.string()),
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
                writer.write_batch(_batch(batch, index, size))
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


def _batch(rows: list[RawRow], source: int, first: int) -> pa.RecordBatch:
    columns = {
        "file": [row.file for row in rows],
        "line": [row.line for row in rows],
        "text": [row.text for row in rows],
        "problem": [row.problem for row in rows],
        "source": [source] * len(rows),
        "row": list(range(first, first + len(rows))),
    }
    return pa.RecordBatch.from_pydict(columns, schema=_RAW)


def mix(sources: Sequence[Source], sizes: Sequence[int], sample_limit: int | None, seed: int) -> np.ndarray:
    """Row numbers of an epoch in order, where all are the same: per source whole copies, then the random rest.

    Args:
        sizes: rows of each source.
        sample_limit: keeps this many, the first of every source's part in proportion to its share of the epoch. (The
            first n of all would be rows of the first source only.)
        seed: of the random rest of fractional weights.
    """
    random = np.random.default_rng(seed)
    plans, start = [], 0
    for source, size in zip(sources, sizes, strict=True):
        copies = int(source.weight)
        rest = round((source.weight - copies) * size)
        rest = max(rest, 1) if copies == 0 else rest  # a source that was asked for is never empty
        parts = [np.arange(size)] * copies + [np.sort(random.choice(size, rest, replace=False))]
        plans.append(start + np.concatenate(parts))
        start += size
    if sample_limit is not None:
        shares = _shares([len(plan) for plan in plans], sample_limit)
        plans = [plan[:share] for plan, share in zip(plans, shares, strict=True)]
    return np.concatenate(plans)


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    """Splits `limit` in proportion to `sizes`, by largest remainder."""
    total = sum(sizes)
    if limit >= total:
        return list(sizes)
    shares = [limit * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(limit * sizes[i] % total))
    for i in by_remainder[: limit - sum(shares)]:
        shares[i] += 1
    return shares
