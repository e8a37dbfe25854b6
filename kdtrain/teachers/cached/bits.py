"""Numbers as bits: of one width, of a width each, or in unary; thousands at a time.

Bit i of a stream is bit i mod 8 of byte i // 8, counted from the lowest. Streams begin at a byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np

# A number is read as a part of the eight bytes that it begins in, at bit 7 at the latest.
WIDEST = 57
SPARE = np.zeros(8, np.uint8)
"""Follows a buffer that is read from, so that the eight bytes of its last number are there."""


def bytes_of(bits: Any) -> Any:
    """How many bytes streams of so many bits take, one or several."""
    return (bits + 7) // 8


def pack(values: np.ndarray, width: int) -> np.ndarray:
    """A stream of numbers in [0, 2^width), [·] int64."""
    rows = -(-len(values) // 8)
    padded = np.zeros(8 * rows, "<u8")
    padded[: len(values)] = values
    stream = np.zeros((rows, width + 8), np.uint8)
    for i in range(8):  # eight numbers are `width` whole bytes
        byte, bit = divmod(i * width, 8)
        used = bytes_of(bit + width)
        stream[:, byte : byte + used] |= (padded[i::8] << np.uint64(bit)).view(np.uint8).reshape(rows, 8)[:, :used]
    return stream[:, :width].reshape(-1)[: bytes_of(len(values) * width)]


def pack_each(values: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The same where each number has a width of its own, which may be 0."""
    values, widths = values[widths > 0], widths[widths > 0]
    number = np.repeat(np.arange(len(values)), widths)
    place = np.arange(len(number)) - np.repeat(np.cumsum(widths) - widths, widths)
    return np.packbits((values[number] >> place & 1).astype(np.uint8), bitorder="little")


def read(buffer: np.ndarray, places: np.ndarray, widths: np.ndarray | int) -> np.ndarray:
    """The numbers that begin at some bits of a buffer with `SPARE` behind it, [·] int64."""
    words: np.ndarray = np.ndarray((len(buffer) - 7,), "<u8", buffer.data, strides=(1,))
    found = words[places >> 3] >> (places & 7).astype(np.uint64)
    return (found & ((np.uint64(1) << np.asarray(widths, np.uint64)) - np.uint64(1))).astype(np.int64)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whole numbers: `counts[i]` of them from `starts[i]` on."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def places(starts: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
    """Where numbers of one width begin, in bits: `counts[i]` of them in a stream that begins at byte `starts[i]`."""
    before = np.cumsum(counts) - counts
    return np.repeat(8 * starts - width * before, counts) + width * np.arange(counts.sum())


def places_of_each(starts: np.ndarray, counts: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The same where each number has a width of its own."""
    ends = np.cumsum(widths)
    firsts = np.cumsum(counts) - counts
    before = np.concatenate([[0], ends])[firsts]
    return np.repeat(8 * starts - before, counts) + ends - widths


def pack_unary(values: np.ndarray) -> np.ndarray:
    """A stream of numbers, each as so many zeros and a one."""
    ones = np.cumsum(values + 1) - 1
    bits = np.zeros(ones[-1] + 1 if len(ones) else 0, np.uint8)
    bits[ones] = 1
    return np.packbits(bits, bitorder="little")


def read_unary(streams: list[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """The numbers of some streams of `pack_unary`, `counts[i]` in stream i, [·] int64."""
    if not counts.sum():
        return np.empty(0, np.int64)
    ones = np.flatnonzero(np.unpackbits(np.concatenate(streams), bitorder="little"))
    before = np.concatenate([[-1], ones[:-1]])
    starts = 8 * np.cumsum([0, *map(len, streams)])[:-1]
    firsts = np.cumsum(counts) - counts
    before[firsts[counts > 0]] = starts[counts > 0] - 1
    return ones - before - 1
