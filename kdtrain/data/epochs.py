"""Which rows make up an epoch. A weight of 2.5 gives all rows of a source twice, and a random half once more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mix(sizes: Sequence[int], weights: Sequence[float], sample_limit: int | None, seed: int) -> np.ndarray:
    """Row numbers of an epoch in order, where all epochs are the same: per source all copies, then the random rest.

    `sizes` are the rows of each source; the rows of all are numbered through. `sample_limit` keeps this many, the first
    of every source's part in proportion to its share of the epoch: the first n of all would be rows of one source.
    """
    random = np.random.default_rng(seed)
    plans, start = [], 0
    for size, weight in zip(sizes, weights, strict=True):
        copies, rest = _copies_and_rest(size, weight)
        parts = [np.arange(size)] * copies + [np.sort(random.choice(size, rest, replace=False))]
        plans.append(start + np.concatenate(parts))
        start += size
    if sample_limit is not None:
        shares = _shares([len(plan) for plan in plans], sample_limit)
        plans = [plan[:share] for plan, share in zip(plans, shares, strict=True)]
    return np.concatenate(plans)


def _copies_and_rest(size: int, weight: float) -> tuple[int, int]:
    copies = int(weight)
    rest = round((weight - copies) * size)
    # A source that was asked for gives at least one row.
    return copies, max(rest, 1) if copies == 0 and size else rest


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


class Epochs:
    """The rows of every epoch where the random rest is another one in each, as numbers of the data set's rows.

    The rests go through all of the source before a row comes again, so that two epochs of weight 0.5 are all its rows
    once. Every epoch has as many rows. A function of seed and epoch alone: all ranks draw the same, and so does a
    resumed run. `sizes` and `weights` are those of `mix`.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._weights, self._seed = list(weights), seed
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._sizes = list(sizes)
        self._copies, self._rests = [], []
        for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            copies, rest = _copies_and_rest(size, weight)
            self._copies.append(copies)
            self._rests.append(_Rest(size, rest, [seed, source]))

    def __len__(self) -> int:
        return sum(c * size + rest.rows for c, size, rest in zip(self._copies, self._sizes, self._rests, strict=True))

    def without(self, rows: Sequence[int]) -> Epochs:
        """The epochs of the data set without some of its rows."""
        sources = np.searchsorted(self._starts, rows, side="right") - 1
        gone = np.bincount(sources, minlength=len(self._sizes))
        return Epochs(
            [size - int(count) for size, count in zip(self._sizes, gone, strict=True)], self._weights, self._seed
        )

    def rows(self, epoch: int) -> np.ndarray:
        """Row numbers of an epoch, counted from 0; each source's copies first, then its rest."""
        found = [
            start + np.concatenate([np.tile(np.arange(size), copies), np.sort(rest.of(epoch))])
            for start, size, copies, rest in zip(self._starts, self._sizes, self._copies, self._rests, strict=True)
        ]
        return np.concatenate(found).astype(np.int64)


class _Rest:
    """`rows` of `size` rows for each epoch: consecutive pieces of one shuffled pass after the other."""

    def __init__(self, size: int, rows: int, seed: Sequence[int]) -> None:
        self.rows = rows
        self._size, self._seed = size, list(seed)
        # A pass depends on the one before it (see `_pass_of`), so the one last asked for is kept.
        self._number, self._pass = 0, self._shuffled(0)

    def of(self, epoch: int) -> np.ndarray:
        if not self.rows:
            return np.arange(0)
        number, start = divmod(epoch * self.rows, self._size)
        piece = self._pass_of(number)[start : start + self.rows]
        missing = self.rows - len(piece)
        return np.concatenate([piece, self._pass_of(number + 1)[:missing]]) if missing else piece

    def _pass_of(self, number: int) -> np.ndarray:
        if number < self._number:
            self._number, self._pass = 0, self._shuffled(0)
        while self._number < number:
            self._number += 1
            # The epoch in which the last pass ends takes its first rows from this one: rows that the end of the last
            # pass gave it already go to the back, or it would have them twice.
            begun = self._number * self._size % self.rows
            last, fresh = self._pass[self._size - begun :], self._shuffled(self._number)
            again = np.isin(fresh, last)
            self._pass = np.concatenate([fresh[~again], fresh[again]])
        return self._pass

    def _shuffled(self, number: int) -> np.ndarray:
        return np.random.default_rng([*self._seed, number]).permutation(self._size)
