"""Two tokenisations of the same text, byte by byte: which tokens of one stand for the same bytes as which of the other.

A chunk is the shortest run of bytes that begins and ends at a token's edge on both sides. Edges are counted in bytes,
so that a character that only one side splits has none within it. Where the two texts differ (a block of reasoning that
one chat template writes and the other does not), chunks lie in what they have in common.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

from kdtrain.data.errors import show
from kdtrain.errors import DataError

NONE = -100
"""The number of no chunk; that of labels that are not supervised."""

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Where texts differ in the middle: bytes of a common part that is not by chance, and the longest middle looked through.
_SHORTEST, _LONGEST = 8, 4096


class TokenBytes:
    """The bytes that each token of a tokenizer stands for in a text.

    Known are byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece with or without byte fallback (Llama 2, Gemma);
    added tokens stand for their content.

    Raises:
        DataError: a tokenizer of another kind, whose tokens do not say which spaces stand between them.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = tokenizer.backend_tokenizer
        parts = [json.loads(part.__getstate__()) for part in (backend.decoder, backend.pre_tokenizer) if part]
        kinds = {kind for part in parts for kind in _kinds(part)}
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds & {"ByteFallback", "Metaspace", "Replace"}:
            name = show(str(tokenizer.name_or_path or type(tokenizer).__name__), 80)
            raise DataError(
                "rlhf.cross_tokenizer needs tokenizers that keep every byte of a text (byte-level BPE, SentencePiece), "
                f"and that of {name} is of another kind"
            )
        self._tokenizer = tokenizer
        added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        if not self._byte_level:  # Gemma's runs of spaces are added tokens
            added = {i: text.replace("▁", " ") for i, text in added.items()}
        self._added = {i: text.encode() for i, text in added.items()}
        self._known: dict[int, bytes] = {}

    def __call__(self, ids: Sequence[int]) -> list[bytes]:
        known = self._known
        for i in ids:
            if i not in known:
                known[i] = self._bytes(i)
        return [known[i] for i in ids]

    def _bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        text = self._tokenizer.convert_ids_to_tokens(token)
        if text is None:  # padding of the embedding, which a student may write all the same
            return b""
        if self._byte_level:
            table = _byte_of_character()
            return bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()
        if match := _FALLBACK.fullmatch(text):
            return bytes([int(match[1], 16)])
        return text.replace("▁", " ").encode()


def _kinds(part: dict[str, Any]) -> Iterator[str]:
    yield part["type"]
    for inner in (*part.get("decoders", ()), *part.get("pretokenizers", ())):
        yield from _kinds(inner)


@cache
def _byte_of_character() -> dict[str, int]:
    """Of GPT-2: printable bytes are themselves as characters, the others stand behind U+0100, in their order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


# ---- chunks ----------------------------------------------------------------------------------------------------------


class Aligned(NamedTuple):
    """The chunk of each token, `NONE` without one; a chunk has the same number on both sides, in the order of text."""

    student: list[int]
    teacher: list[int]
    chunks: int
    """How many there are."""
    covered: int
    """Bytes that lie in chunks."""


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> Aligned:
    """The chunks of two texts, given as the bytes of their tokens."""
    own, other = [NONE] * len(student), [NONE] * len(teacher)
    own_ends, other_ends = (list(accumulate(map(len, tokens), initial=0)) for tokens in (student, teacher))
    count = covered = 0
    for block in common_parts(b"".join(student), b"".join(teacher)):
        for (i, j), (i_end, j_end) in _chunks(own_ends, other_ends, block):
            own[i:i_end] = [count] * (i_end - i)
            other[j:j_end] = [count] * (j_end - j)
            covered += own_ends[i_end] - own_ends[i]
            count += 1
    return Aligned(own, other, count, covered)


@dataclass(frozen=True)
class Part:
    """Bytes that two texts have in common: `length` of them, from `first` in one and `second` in the other."""

    first: int
    second: int
    length: int


def _chunks(own: Sequence[int], other: Sequence[int], part: Part) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """From edge to edge within a common part; edges as numbers of tokens on both sides."""
    i, j = bisect_left(own, part.first), bisect_left(other, part.second)
    last: tuple[int, int] | None = None
    while i < len(own) and j < len(other):
        at, there = own[i] - part.first, other[j] - part.second
        if max(at, there) > part.length:
            return
        if at < there:
            i += 1
        elif there < at:
            j += 1
        else:
            if last is not None:
                yield last, (i, j)
            last = i, j
            i, j = i + 1, j + 1


def common_parts(first: bytes, second: bytes) -> list[Part]:
    """What two texts begin and end with in common, and what is the same in between; in order, without overlap."""
    if first == second:
        return [Part(0, 0, len(first))]
    shorter = min(len(first), len(second))
    begin = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    end = next((i for i in range(shorter - begin) if first[-1 - i] != second[-1 - i]), shorter - begin)
    middle = (first[begin : len(first) - end], second[begin : len(second) - end])
    parts = [Part(0, 0, begin)]
    if all(middle) and max(map(len, middle)) <= _LONGEST:
        matcher = SequenceMatcher(None, *middle, autojunk=False)
        found = [block for block in matcher.get_matching_blocks() if block.size >= _SHORTEST]
        parts += [Part(begin + a, begin + b, size) for a, b, size in found]
    return [*parts, Part(len(first) - end, len(second) - end, end)]
