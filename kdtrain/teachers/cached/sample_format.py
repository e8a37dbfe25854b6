"""How tokens that were drawn from a teacher's distribution are stored: a row as some streams of bits.

Per token the different ids that were drawn, the most frequent one first, and how often each was: of the others, for the
first one has what is left of the draws. A count c has ⌊log2 c⌋ bits behind its highest one; how many, is in unary.

    bytes of the unary stream, uint32
    unique        per token: different ids, less one
    ids           per id, in as many bits as the vocabulary needs
    unary         per id but the first: ⌊log2 c⌋
    rest          per id but the first: c − 2^⌊log2 c⌋

Shapes: N tokens, S of a row, U different ids of a token at most, I ids of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdtrain.losses.sampled import SampledTargets
from kdtrain.teachers.cached import bits
from kdtrain.teachers.cached.shard_file import Encoded


def encode(rows: Sequence[SampledTargets], vocab_size: int, draws: int) -> Encoded:
    """Some rows as bytes.

    Raises:
        ValueError: ids outside the vocabulary, or weights that are not shares of the draws.
    """
    return Encoded({}, [_row(row, vocab_size, draws) for row in rows])


def _row(row: SampledTargets, vocab_size: int, draws: int) -> np.ndarray:
    ids = row.indices.cpu().numpy()
    counts = _counts(ids, row.weights.detach().double().cpu().numpy(), draws)
    if ids.size and int(ids.max()) >= vocab_size:
        raise ValueError(f"a token id is {ids.max()}, and the vocabulary has {vocab_size}")
    order = np.lexsort((ids, -counts), axis=1)
    ids, counts = np.take_along_axis(ids, order, 1), np.take_along_axis(counts, order, 1)
    drawn = counts > 0
    others = counts[:, 1:][drawn[:, 1:]]
    widths = np.frexp(others)[1].astype(np.int64) - 1
    unary = bits.pack_unary(widths)
    return np.concatenate([
        np.array([len(unary)], "<u4").view(np.uint8),
        bits.pack(drawn.sum(1) - 1, _unique_bits(draws)),
        bits.pack(ids[drawn], _id_bits(vocab_size)),
        unary,
        bits.pack_each(others - (1 << widths), widths),
    ])  # fmt: skip


def _counts(ids: np.ndarray, weights: np.ndarray, draws: int) -> np.ndarray:
    """[S, ·] int64: how often each was drawn."""
    counts = np.rint(np.where(ids < 0, 0, weights) * draws).astype(np.int64)
    shares = (counts >= 0).all() and (np.abs(counts - weights * draws) < 1e-3 * draws).all()
    if not shares or (counts.sum(1) != draws).any():
        raise ValueError(f"the weights of a token are not shares of {draws} draws")
    return counts


def _unique_bits(draws: int) -> int:
    return (draws - 1).bit_length()


def _id_bits(vocab_size: int) -> int:
    return max((vocab_size - 1).bit_length(), 1)


def decode(
    blobs: Sequence[np.ndarray], counts: np.ndarray, vocab_size: int, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [N, U] int64 and weights [N, U] float32 of some rows; −1 and 0 behind the ids of a token."""
    buffer = np.concatenate([*blobs, bits.SPARE])
    begin = np.cumsum([0, *map(len, blobs)])[:-1]
    at, width = begin + 4, _unique_bits(draws)
    unique = bits.read(buffer, bits.places(at, counts, width), width) + 1
    of_row = _sums(unique, counts)
    at, width = at + bits.bytes_of(counts * width), _id_bits(vocab_size)
    ids = bits.read(buffer, bits.places(at, of_row, width), width)
    at = at + bits.bytes_of(of_row * width)
    behind = at + bits.read(buffer, 8 * begin, 32)
    others = of_row - counts
    widths = bits.read_unary([buffer[i:j] for i, j in zip(at, behind, strict=True)], others)
    drawn = (1 << widths) + bits.read(buffer, bits.places_of_each(behind, others, widths), widths)
    return _table(unique, ids, drawn, draws)


def _sums(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums of some values that follow each other, `counts[i]` in the i-th sum."""
    totals = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(counts)
    return totals[ends] - totals[ends - counts]


def _table(unique: np.ndarray, ids: np.ndarray, others: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids [I] and the counts of those that are not their token's first, by token."""
    column = np.arange(unique.max(initial=0))
    indices = np.full((len(unique), len(column)), -1, np.int64)
    drawn = np.zeros(indices.shape, np.int64)
    there = column < unique[:, None]
    indices[there] = ids
    drawn[there & (column > 0)] = others
    if len(column):
        drawn[:, 0] = draws - drawn.sum(1)
    return indices, drawn.astype(np.float32) / np.float32(draws)
