"""Which rows a cache holds, in which order, and how they are cut into shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]

from kdtrain.data.row_key import row_keys
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.teachers.cached.writing import Shard

_ROWS_AT_ONCE = 10_000
# A shard is what a kill loses and what one process writes at a time: small for that, and with batches enough that rows
# of one length meet.
_SHARD_BYTES = 64 * 2**20
_FEWEST_SHARDS, _FEWEST_BATCHES = 64, 8


@dataclass(frozen=True)
class CachePlan:
    """The different rows of some data sets, in their order. Lists have an entry for each row of the plan."""

    data: Sequence[datasets.Dataset]
    places: Sequence[tuple[int, int]]
    """Which data set a row is of, and its number there."""
    keys: Sequence[bytes]
    lengths: Sequence[int]
    """Tokens that the teacher reads."""
    supervised: Sequence[int]
    left_out: int
    """Rows without a supervised token: prompts alone, and those cut at `max_length` within their prompt."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        """Supervised ones."""
        return sum(self.supervised)

    @property
    def identity(self) -> str:
        return hashlib.sha256(b"".join(self.keys)).hexdigest()[:32]

    def row(self, number: int) -> dict[str, Any]:
        """A row of the plan, as of its data set."""
        of, place = self.places[number]
        found: dict[str, Any] = self.data[of][place]
        return found

    def rows_per_shard(self, bytes_per_token: float, batch_size: int) -> int:
        """By what is to be written alone, so that it is the same for any number of processes."""
        a_row = max(self.tokens * bytes_per_token / max(len(self), 1), 1)
        wanted = min(_SHARD_BYTES / a_row, max(len(self) / _FEWEST_SHARDS, _FEWEST_BATCHES * batch_size))
        return max(int(wanted) // batch_size, 1) * batch_size

    def shards(self, rows_per_shard: int) -> list[Shard]:
        """All of them, the last one perhaps with fewer rows."""
        return [self._shard(number, rows_per_shard) for number in range(-(-len(self) // rows_per_shard))]

    def _shard(self, number: int, size: int) -> Shard:
        rows = range(number * size, min((number + 1) * size, len(self)))
        within = slice(rows.start, rows.stop)
        return Shard(number, rows, self.keys[within], self.lengths[within])


def plan_rows(data: Sequence[datasets.Dataset], *, chats: bool = False) -> CachePlan:
    """The rows of encoded data sets, each content once, but for those that supervise nothing.

    Args:
        chats: see `row_key`.
    """
    places, keys, lengths, supervised = [], dict[bytes, None](), [], []
    left_out = 0
    for of, dataset in enumerate(data):
        columns = zip(row_keys(dataset, chats=chats), _lengths(dataset), _supervised(dataset), strict=True)
        for place, (key, length, count) in enumerate(columns):
            left_out += not count
            if count and key not in keys:
                keys[key] = None
                places.append((of, place))
                lengths.append(length)
                supervised.append(count)
    return CachePlan(data, places, list(keys), lengths, supervised, left_out)


def _lengths(dataset: datasets.Dataset) -> Iterator[int]:
    """Tokens of each row as the teacher reads it: null means as the student does."""
    names = ["input_ids", *({"teacher_input_ids"} & set(dataset.column_names))]
    for columns in _lists(dataset, names):
        sizes = [[None if entry is None else len(entry) for entry in column] for column in columns]
        yield from (next(size for size in reversed(of_row) if size is not None) for of_row in zip(*sizes, strict=True))


def _supervised(dataset: datasets.Dataset) -> Iterator[int]:
    """Tokens of each row that are predicted: nothing predicts the first."""
    for (column,) in _lists(dataset, ["labels"]):
        yield from (int((labels[1:] != IGNORE_INDEX).sum()) for labels in column)


def _lists(dataset: datasets.Dataset, names: list[str]) -> Iterator[list[list[Any]]]:
    """Columns of lists as numpy arrays, some thousand rows at a time."""
    for table in dataset.select_columns(names).with_format("arrow").iter(_ROWS_AT_ONCE):
        yield [_arrays(table.column(name)) for name in names]


def _arrays(column: pa.ChunkedArray) -> list[Any]:
    """An array for each row, or None."""
    return [row.values.to_numpy(zero_copy_only=False) if row.is_valid else None for row in column]
