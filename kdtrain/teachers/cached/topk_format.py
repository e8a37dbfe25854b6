"""How the most likely tokens of a teacher are stored: a row as some streams of bits.

Entries are sorted by falling probability, missing ones last, and the log-probabilities made levels (levels.py), which
rise within a token. Their differences are stored in Rice's code: so many lower bits as is shortest for the shard, and
the rest in unary.

    bytes of the unary stream, uint32
    masses        per token
    known         per token: entries with a probability; only where some of a shard have fewer than K
    ids           per entry, in as many bits as the vocabulary needs
    lows          per entry: lower bits of the differences
    unary         the rest of the differences
    fine          finer bits of the large log-probabilities

`exact` has the log-probabilities as float32 and the ids, in the order that they came in.

Shapes: N tokens, K entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.cached import bits
from kdtrain.teachers.cached.levels import MASS_BITS, Levels, fine_bits, quantise
from kdtrain.teachers.cached.shard_file import Encoded


def encode(rows: Sequence[TopKLogprobs], vocab_size: int, entries: int, exact: bool) -> Encoded:
    """Some rows as bytes.

    Raises:
        ValueError: ids outside the vocabulary, or more than K entries.
    """
    ids, logprobs = _entries(rows, vocab_size, entries)
    largest = vocab_size if (ids < 0).any() else vocab_size - 1
    codes = np.where(ids < 0, vocab_size, ids)
    id_bits = max(largest.bit_length(), 1)
    if exact:
        return Encoded({"id_bits": id_bits}, [_exact_row(codes[n], logprobs[n], id_bits) for n in _tokens(rows)])
    if (logprobs[:, 1:] > logprobs[:, :-1]).any():
        order = np.argsort(-logprobs, axis=1, kind="stable")
        codes, logprobs = np.take_along_axis(codes, order, 1), np.take_along_axis(logprobs, order, 1)
    found = quantise(logprobs.astype(np.float64))
    gaps = np.diff(found.levels, axis=1, prepend=0)
    low_bits = min(range(20), key=lambda width: width * gaps.size + int((gaps >> width).sum()))
    numbers = {"masses": found.masses, "known": found.present.sum(1), "ids": codes, "lows": gaps & (1 << low_bits) - 1}
    about = {"id_bits": id_bits, "low_bits": low_bits, "counted": not found.present.all()}
    widths = fine_bits(found.levels, found.present)
    blobs = [
        _row({name: n[tokens] for name, n in numbers.items()}, gaps[tokens], found.fine[tokens], widths[tokens], about)
        for tokens in _tokens(rows)
    ]
    return Encoded(about, blobs)


def _tokens(rows: Sequence[TopKLogprobs]) -> Iterator[slice]:
    """Where each row is among the tokens of all."""
    begin = 0
    for row in rows:
        yield slice(begin, begin + len(row.indices))
        begin += len(row.indices)


def _entries(rows: Sequence[TopKLogprobs], vocab_size: int, entries: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of all rows, [N, K], filled up with missing entries."""
    ids = np.full((sum(len(row.indices) for row in rows), entries), -1, np.int64)
    logprobs = np.full(ids.shape, -np.inf, np.float32)
    for row, tokens in zip(rows, _tokens(rows), strict=True):
        width = row.indices.shape[1]
        if width > entries:
            raise ValueError(f"a row has {width} entries a token, and the cache's format {entries}")
        ids[tokens, :width] = row.indices.cpu().numpy()
        logprobs[tokens, :width] = row.logprobs.detach().float().cpu().numpy()
    if ids.size and not -1 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"token ids are from {ids.min()} to {ids.max()}, and the vocabulary has {vocab_size}")
    return ids, logprobs


def _fixed(about: Mapping[str, Any], entries: int) -> dict[str, tuple[int, int]]:
    """The streams of one width, in their order: that width, and how many numbers a token has."""
    return {
        "masses": (MASS_BITS, 1),
        "known": (entries.bit_length() if about["counted"] else 0, 1),
        "ids": (about["id_bits"], entries),
        "lows": (about["low_bits"], entries),
    }


def _row(
    numbers: Mapping[str, np.ndarray], gaps: np.ndarray, fine: np.ndarray, widths: np.ndarray, about: Mapping[str, Any]
) -> np.ndarray:
    fixed = [bits.pack(numbers[name].ravel(), width) for name, (width, _) in _fixed(about, gaps.shape[1]).items()]
    unary = bits.pack_unary(gaps.ravel() >> about["low_bits"])
    length = np.array([len(unary)], "<u4").view(np.uint8)
    return np.concatenate([length, *fixed, unary, bits.pack_each(fine.ravel(), widths.ravel())])


def decode(
    blobs: Sequence[np.ndarray], counts: np.ndarray, about: Mapping[str, Any], vocab_size: int, entries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [N, K] int64 and log-probabilities [N, K] float32 of rows of shards with the same `about`."""
    buffer = np.concatenate([*blobs, bits.SPARE])
    begin = np.cumsum([0, *map(len, blobs)])[:-1]
    at, found, of_row = begin + 4, {}, counts * entries
    for name, (width, per_token) in _fixed(about, entries).items():
        found[name] = bits.read(buffer, bits.places(at, counts * per_token, width), width)
        at = at + bits.bytes_of(counts * per_token * width)
    behind = at + bits.read(buffer, 8 * begin, 32)
    unary = bits.read_unary([buffer[i:j] for i, j in zip(at, behind, strict=True)], of_row)
    levels = np.cumsum((unary << about["low_bits"] | found["lows"]).reshape(-1, entries), axis=1)
    known = found["known"] if about["counted"] else np.full(len(levels), entries)
    present = np.arange(entries) < known[:, None]
    widths = fine_bits(levels, present).ravel()
    fine = bits.read(buffer, bits.places_of_each(behind, of_row, widths), widths).reshape(-1, entries)
    logprobs = Levels(levels, fine, present, found["masses"]).logprobs()
    return _ids(found["ids"], vocab_size, entries), logprobs.astype(np.float32)


def _ids(codes: np.ndarray, vocab_size: int, entries: int) -> np.ndarray:
    codes[codes == vocab_size] = -1
    return codes.reshape(-1, entries)


def _exact_row(codes: np.ndarray, logprobs: np.ndarray, id_bits: int) -> np.ndarray:
    return np.concatenate([logprobs.ravel().astype("<f4").view(np.uint8), bits.pack(codes.ravel(), id_bits)])


def decode_exact(
    blobs: Sequence[np.ndarray], counts: np.ndarray, about: Mapping[str, Any], vocab_size: int, entries: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same of `exact`."""
    sizes = 4 * entries * counts
    logprobs = np.concatenate([blob[:size] for blob, size in zip(blobs, sizes, strict=True)]).view("<f4")
    buffer = np.concatenate([*blobs, bits.SPARE])
    at = np.cumsum([0, *map(len, blobs)])[:-1] + sizes
    codes = bits.read(buffer, bits.places(at, counts * entries, about["id_bits"]), about["id_bits"])
    return _ids(codes, vocab_size, entries), logprobs.astype(np.float32).reshape(-1, entries)
