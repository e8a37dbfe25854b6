"""Tokens with a meaning of their own, such as <|im_end|>, in what people wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Stands inside a control token that is to be encoded as text: a character that Unicode keeps free for such uses.
MARK = "\ufdd0"


class ControlTokens:
    """Finds tokens in text. There may be thousands, more than a regular expression tries at every `<` in time."""

    def __init__(self, tokens: set[str]) -> None:
        self._tokens = tokens
        self._first = re.compile(
            "[" + "".join(sorted(re.escape(token[0]) for token in tokens)) + "]" if tokens else r"(?!)"
        )
        self._lengths = sorted({len(token) for token in tokens}, reverse=True)

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """Where each of them begins, and the token."""
        for match in self._first.finditer(text):
            at = match.start()
            for length in self._lengths:
                if text[at : at + length] in self._tokens:
                    yield at, text[at : at + length]
                    break

    def mark(self, text: str) -> str:
        """The text with a mark inside each of them."""
        for at, _ in reversed(list(self.find(text))):
            text = text[: at + 1] + MARK + text[at + 1 :]
        return text
