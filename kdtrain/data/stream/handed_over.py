"""A stream of the caller's, as a data set whose rows have numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from kdtrain.errors import DataError

_LOOKED_AT = 64


class IteratedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows of an iterable data set by their number; behind its last one it begins again.

    It must give the same rows each time, and on every process: each reads all of them, and takes its own. A run that
    goes on reads those before its next row once more.
    """

    def __init__(self, name: str, data: Any) -> None:
        self._name, self._data = name, data
        self.first = list(islice(iter(data), _LOOKED_AT))
        if not self.first:
            raise DataError(f"{name} has no rows.")
        if not isinstance(self.first[0], Mapping):
            found = type(self.first[0]).__name__
            raise DataError(f"{name}: a row must be a mapping such as {{'messages': […]}}; the first is a {found}.")
        self.length = len(self.first)
        """Rows that a run takes; set by who knows how many."""
        self._rows: Iterator[Any] = iter(())
        self._next = -1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self._next < 0 or index < self._next:
            self._rows, self._next = self._read(), 0
        row = next(islice(self._rows, index - self._next, None))
        self._next = index + 1
        return dict(row)

    def _read(self) -> Iterator[Any]:
        while True:
            is_empty = True
            for row in self._data:
                is_empty = False
                yield row
            if is_empty:
                raise DataError(f"{self._name} gave rows once, and none the second time: give it an __iter__.")
