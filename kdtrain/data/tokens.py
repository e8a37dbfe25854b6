"""From characters to tokens: which tokens of a rendered conversation belong to a span of its text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from kdtrain.data.errors import RowError, show

# Byte-level vocabularies write a leading space as Ġ, SentencePiece ones as ▁.
_SPACES = ("Ġ", "▁", " ")


@dataclass(frozen=True)
class Tokens:
    """One tokenised text, with the characters each token covers: a token's place gives where it begins and ends."""

    tokenizer: Any
    text: str
    ids: list[int]
    offsets: Callable[[int], tuple[int, int]]
    edges: Mapping[int, int] = field(default_factory=dict)  # characters where a token begins, known from elsewhere
    _found: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    def first_from(self, char: int) -> int:
        """The first token that begins at or after a character."""
        if char in self.edges:
            return self.edges[char]
        found = self._found.get(char)
        if found is None:
            found = bisect_left(range(len(self.ids)), char, key=lambda token: self.offsets(token)[0])
            self._found[char] = found
        return found

    def complete_before(self, char: int) -> int:
        """How many leading tokens lie entirely before a character: a straddling one would give away the answer."""
        if char in self.edges:
            return self.edges[char]
        token = self.first_from(char)
        while token and self.offsets(token - 1)[1] > char:
            token -= 1
        return token

    def end_of(self, char: int) -> int:
        """The first token behind a text that ends at a character.

        A token that goes on behind it belongs to the text if it goes on with white space alone: some tokenizers take
        what follows a special token into it (`rstrip`).
        """
        token = self.complete_before(char)
        if token < len(self.ids) and char not in self.edges:
            start, end = self.offsets(token)
            if start < char < end and self.text[start:char].strip() and not self.text[char:end].strip():
                return token + 1
        return token

    def straddled(self, char: int) -> bool:
        """Whether a token begins before a character and ends behind it."""
        return self.complete_before(char) < self.first_from(char)

    @property
    def begins_with_a_space_of_its_own(self) -> bool:
        """Whether the tokenizer put a space in front that the text does not have."""
        if not self.ids or self.text.startswith(_SPACES):
            return False
        return str(self.tokenizer.convert_ids_to_tokens(self.ids[0])).startswith(_SPACES)

    def without(self, chars: int) -> Tokens:
        """The tokens behind some leading characters of the text."""
        first = self.first_from(chars)
        offsets = [(start - chars, end - chars) for start, end in map(self.offsets, range(first, len(self.ids)))]
        return Tokens(self.tokenizer, self.text[chars:], self.ids[first:], offsets.__getitem__)


def tokenize(tokenizer: Any, texts: list[str]) -> list[Tokens]:
    """The tokens of texts with the characters that each covers, without special tokens."""
    if not texts:
        return []
    # Calling the tokenizer itself takes half as long again: it copies every token into lists of its own.
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    # Post-processing adds special tokens, which the chat template writes itself, and trims white space off offsets.
    kept, backend.post_processor = backend.post_processor, None
    try:
        encodings = backend.encode_batch(texts, add_special_tokens=False)
    finally:
        backend.post_processor = kept
    # A few places are asked for: lists of all of them take as long as the rest of what is done with a row's tokens.
    return [Tokens(tokenizer, text, one.ids, one.token_to_chars) for text, one in zip(texts, encodings, strict=True)]


def tokenize_apart(tokenizer: Any, text: str, at: set[int]) -> Tokens:
    """The tokens of the pieces of a text, cut at some characters."""
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    edges: dict[int, int] = {}
    for start, end in pairwise([0, *sorted(at - {0, len(text)}), len(text)]):
        edges[start] = len(ids)
        (piece,) = tokenize(tokenizer, [text[start:end]])
        if start and piece.begins_with_a_space_of_its_own:
            piece = behind_another(tokenizer, text[start:end])
        ids += piece.ids
        offsets += [(start + first, start + behind) for first, behind in map(piece.offsets, range(len(piece.ids)))]
    return Tokens(tokenizer, text, ids, offsets.__getitem__, edges)


def behind_another(tokenizer: Any, text: str) -> Tokens:
    """The tokens of a text that does not begin a text: SentencePiece puts a space in front of those that do."""
    for other in ("\n", ".", "\t"):
        (longer,) = tokenize(tokenizer, [other + text])
        piece = longer.without(len(other))
        if piece.ids and piece.offsets(0)[0] == 0 and not piece.begins_with_a_space_of_its_own:
            return piece
    raise RowError(f"the tokenizer cannot tell …{show(text, 40)} from a text that begins so")
