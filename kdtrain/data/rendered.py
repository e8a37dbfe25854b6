"""A conversation as text, and where the assistant's turns are in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from kdtrain.data.control_tokens import MARK


@dataclass(frozen=True)
class Turn:
    """An assistant's turn in a rendered text, in characters.

    `start` is where its prompt ends, `end` lies behind its stop token; `spans` are supervised, in order, half open.
    """

    start: int
    end: int
    spans: tuple[tuple[int, int], ...]
    terminated: bool = True  # it ends with a token that makes the model stop
    extended: bool = False  # that token stands outside of the template's own markers
    messages: int = 0  # of the conversation, up to and with its own
    kd_weight: float = 1.0  # what the divergence of its tokens counts


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. Without `turns` all of it is a prompt."""

    text: str
    turns: tuple[Turn, ...] = ()
    messages: int = 0  # of the conversation that are in the text
    cuts: tuple[int, ...] = ()  # characters at which the text is tokenised apart
    stop: str | None = None  # the token that ends the last turn, where the text does not have it
    excluded: tuple[tuple[int, int], ...] = ()  # never supervised, not even where every token is
    notes: tuple[str, ...] = ()

    def moved(self, text: str, move: Callable[[int], int]) -> Rendered:
        """The same turns in another text; `move` says where a character of this one stands in it."""
        turns = tuple(
            replace(
                turn,
                start=move(turn.start),
                end=move(turn.end),
                spans=tuple((move(start), move(end)) for start, end in turn.spans),
            )
            for turn in self.turns
        )
        excluded = tuple((move(start), move(end)) for start, end in self.excluded)
        return replace(self, text=text, turns=turns, cuts=tuple(map(move, self.cuts)), excluded=excluded)

    def without_marks(self) -> Rendered:
        """The text without the marks of `ControlTokens.mark`, which become `cuts`."""
        marks = [i for i, character in enumerate(self.text) if character == MARK]
        if not marks:
            return self
        marked = replace(self, cuts=(*self.cuts, *marks))
        return marked.moved(self.text.replace(MARK, ""), lambda char: char - sum(mark < char for mark in marks))
