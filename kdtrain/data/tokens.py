"""From characters to tokens: which tokens of a rendered conversation belong to a span of its text."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
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

    def first_from(self, char: int) -> int:
        """The first token that begins at or after a character."""
        token = bisect_left(self.offsets, (char, -1))
        return token + 1 if self._begins_earlier(token, char) else token

    def complete_before(self, char: int) -> int:
        """How many leading tokens lie entirely before a character: a straddling one would give away the answer."""
        token = self.first_from(char)
        while token and (self.offsets[token - 1][1] > char or self._begins_earlier(token - 1, char)):
            token -= 1
        return token

    def stop_at(
        self, start: int, end: int, stop_ids: frozenset[int], added_ids: frozenset[int]
    ) -> tuple[int, bool, bool]:
        """Where supervision of an assistant's turn, marked as the tokens `start:end`, ends: after its stop token.

        Also whether that one stands behind the span, and whether there is any: without one the span stays as it is.
        White space after it is left out, since the model has stopped by then. `stop_ids` are known to end a turn;
        every stop token of a chat template is in the added vocabulary, `added_ids`.
        """
        last = end - 1
        while last > start and self._blank(last):
            last -= 1
        if last < start or self.ids[last] in stop_ids:
            return max(last + 1, start), False, last >= start
        following = end
        while following < len(self.ids) and self._blank(following):
            following += 1
        if following < len(self.ids) and self.ids[following] in stop_ids:
            return following + 1, True, True
        if self.ids[last] in added_ids:
            return last + 1, False, True  # a stop token that the probe does not know, such as that of a tool call
        return end, False, False

    def _blank(self, token: int) -> bool:
        start, end = self.offsets[token]
        return not self.text[start:end].strip()

    def _begins_earlier(self, token: int, char: int) -> bool:
        """Some tokenizers leave the leading space out of a token's offsets (`trim_offsets`): it begins before them."""
        if not 0 < token < len(self.ids):
            return False
        gap_start, gap_end = self.offsets[token - 1][1], self.offsets[token][0]
        if not gap_start < char <= gap_end or self.text[gap_start:gap_end].strip():
            return False
        return str(self.tokenizer.convert_ids_to_tokens(self.ids[token])).startswith(_SPACES)
