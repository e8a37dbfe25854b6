"""Which rows make up each epoch where a source's weight is no whole number: other rows in every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Epochs:
    """The rows of every epoch, as numbers of the data set's rows, in the order of the sources.

    A source of weight 2.5 gives all its rows twice and a random half once more. The halves go through the whole source
    before a row comes again, so that two epochs of weight 0.5 are all its rows once. Every epoch has as many rows. A
    function of seed and epoch: all ranks draw the same, and so does a resumed run.

    Args:
        sizes: rows of each source in the data set, which has them behind each other.
        weights: of each source.
        seed: of the random parts.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._sizes, self._copies = list(sizes), [int(weight) for weight in weights]
        self._parts = []
        for source, (size, weight, copies) in enumerate(zip(sizes, weights, self._copies, strict=True)):
            rest = round((weight - copies) * size)
            # A source that was asked for is never empty.
            self._parts.append(_Part(size, max(rest, 1) if copies == 0 and size else rest, [seed, source]))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return sum(c * size + part.rows for c, size, part in zip(self._copies, self._sizes, self._parts, strict=True))

    def rows(self, epoch: int) -> np.ndarray:
        """Row numbers of an epoch, counted from 0; each source's copies first, then its part."""
        found = [
            start + np.concatenate([np.tile(np.arange(size), copies), np.sort(part.of(epoch))])
            for start, size, copies, part in zip(self._starts, self._sizes, self._copies, self._parts, strict=True)
        ]
        return np.concatenate(found).astype(np.int64)


class _Part:
    """`rows` of `size` rows for each epoch: consecutive pieces of one shuffled pass after the other."""

    def __init__(self, size: int, rows: int, seed: Sequence[int]) -> None:
        self.rows = rows
        self._size, self._seed = size, list(seed)
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
            # The epoch that the last pass ends in goes on here, and must not meet its rows again.
            begun = self._number * self._size % self.rows
            last, fresh = self._pass[self._size - begun :], self._shuffled(self._number)
            again = np.isin(fresh, last)
            self._pass = np.concatenate([fresh[~again], fresh[again]])
        return self._pass

    def _shuffled(self, number: int) -> np.ndarray:
        return np.random.default_rng([*self._seed, number]).permutation(self._size)
