"""From characters to tokens: which tokens of a rendered conversation belong to a span of its text."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Byte-level vocabularies write a leading space as Ġ, SentencePiece ones as ▁.
_SPACES = ("Ġ", "▁", " ")


@dataclass(frozen=True)
class Tokens:
    """One tokenised text, with the characters each token covers."""

    tokenizer: Any
    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    edges: Mapping[int, int] = field(default_factory=dict)  # characters where a token begins, known from elsewhere

    def first_from(self, char: int) -> int:
        """The first token that begins at or after a character."""
        if char in self.edges:
            return self.edges[char]
        return bisect_left(self.offsets, (char, -1))

    def complete_before(self, char: int) -> int:
        """How many leading tokens lie entirely before a character: a straddling one would give away the answer."""
        if char in self.edges:
            return self.edges[char]
        token = self.first_from(char)
        while token and self.offsets[token - 1][1] > char:
            token -= 1
        return token

    def end_of(self, char: int) -> int:
        """The first token behind a text that ends at a character.

        A token that goes on behind it belongs to the text if it goes on with white space alone: some tokenizers take
        what follows a special token into it (`rstrip`).
        """
        token = self.complete_before(char)
        if token < len(self.ids) and char not in self.edges:
            start, end = self.offsets[token]
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
        offsets = [(start - chars, end - chars) for start, end in self.offsets[first:]]
        return Tokens(self.tokenizer, self.text[chars:], self.ids[first:], offsets)
