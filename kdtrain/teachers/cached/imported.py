"""What a row of another tool's file holds, once it is read, and where in the row that may belong.

Shapes: n entries of a row, K tokens of an entry, L tokens of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdtrain.errors import DataError


class UnreadableRow(DataError):
    """One row that cannot be used; the message is the reason, the same for all rows like it.

    Args:
        detail: of this row alone.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.detail = detail

    def at(self, place: str) -> str:
        """A place with the detail."""
        return f"{place}: {self.detail}" if self.detail else place


@dataclass(frozen=True)
class Imported:
    """The targets of one row, wherever in it they belong."""

    tokens: np.ndarray | None
    """[L] int64, the ids that the teacher read; None where the row has a conversation instead."""
    ids: np.ndarray
    """[n, K] int64, tokens that an entry names; −1 where it names fewer, in all of them where it is empty."""
    logprobs: np.ndarray
    """[n, K] float32, natural logarithms; −inf where missing."""
    chat: Mapping[str, Any] | None = None
    """The other columns of a row without tokens."""


@dataclass(frozen=True)
class ImportedRow:
    """One row, or one document of a row that several were packed into."""

    place: str
    """For messages."""
    found: Imported | None
    problem: str = ""
    """Why there is nothing."""


@dataclass(frozen=True)
class Reader:
    """How the rows of a format are read."""

    format: str
    """Its name for people."""
    read: Callable[[Mapping[str, Any]], Sequence[Imported]]
    """The documents of a row; raises `UnreadableRow`."""
    places: Sequence[str]
    """Where entries may belong, of `PLACES`: several where the format does not say."""
    unknown: str
    """What its files do not say."""
    lossy: bool = False
    """Whether log-probabilities are approximations, whose probabilities may add up to a little more than 1."""


PLACES: Mapping[str, Callable[[int, int, int], int]] = {
    "entry j describes token j + 1, as a model's logits do": lambda tokens, entries, last: 1,
    "entry j describes token j": lambda tokens, entries, last: 0,
    "the last entry describes the last token of the row": lambda tokens, entries, last: tokens - entries,
    "the last entry describes the last supervised token": lambda tokens, entries, last: last + 1 - entries,
}
"""The number of the token that entry 0 describes, by a row's tokens, its entries, and its last supervised token."""
AS_LOGITS, AS_ECHO, AT_THE_END, AT_THE_LAST_SUPERVISED = PLACES


def side_by_side(parts: Sequence[tuple[Sequence[int], Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Entries of several lengths as two arrays [n, K]."""
    width = max((len(ids) for ids, _ in parts), default=0)
    ids, logprobs = np.full((len(parts), width), -1, np.int64), np.full((len(parts), width), -np.inf, np.float32)
    for row, (some_ids, some) in enumerate(parts):
        ids[row, : len(some_ids)], logprobs[row, : len(some)] = some_ids, some
    return ids, logprobs
