"""The parts of a reply that scores tokens, and how each is refused: by the choice, the position and the reason.

Shapes: T tokens of a row, S of its positions that predict a supervised token, E entries of all S positions together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NoReturn

import numpy as np

from kdtrain.teachers.served.http import ReplyError


@dataclass(frozen=True)
class Scored:
    """One row to be scored."""

    ids: tuple[int, ...]
    """All T tokens that the server is to read, without padding."""
    predicted: tuple[int, ...]
    """S positions t >= 1 of `ids`: the supervised tokens. The row of targets for t is what ids[:t] predict."""


@dataclass(frozen=True)
class Choice:
    """The reply to one row."""

    number: int
    content: dict[str, Any]
    row: Scored

    def refuse(self, reason: str, position: int | None = None) -> NoReturn:
        where = "" if position is None else f", position {position} of {len(self.row.ids)}"
        raise ReplyError(f"choice {self.number}{where}: {reason}")

    def refuse_first(self, wrong_S: np.ndarray, reason: str) -> None:
        """Refuse where a supervised position is wrong."""
        if wrong_S.any():
            self.refuse(reason, self.row.predicted[int(wrong_S.argmax())])

    def per_token(self, values: Any, name: str) -> list[Any]:
        """A list that has something for each token."""
        if not isinstance(values, list):
            self.refuse(f"it has no list {name}")
        if len(values) != len(self.row.ids):
            self.refuse(f"{name} has {len(values)} positions for {len(self.row.ids)} tokens")
        return values

    def entries(self, values: Any, name: str, prefix: str = "") -> Asked:
        """Those of the asked positions, when every position has one for the token that was sent there."""
        positions = self.per_token(values, name)
        if positions[0]:
            self.refuse("the first token has entries, which nothing predicts: the positions are shifted", 0)
        for t, actual in enumerate(self.row.ids[1:], start=1):
            if not isinstance(positions[t], dict):
                self.refuse("it has no entries", t)
            if f"{prefix}{actual}" not in positions[t]:
                self.refuse(f"token {actual}, which was sent there, is not among the entries of {name}", t)
        return Asked(self, [positions[t] for t in self.row.predicted])


@dataclass(frozen=True)
class Asked:
    """What a reply says at the S positions that were asked for."""

    choice: Choice
    at_S: list[dict[str, Any]]
    """The entries of each position, by the name of their token."""

    @cached_property
    def counts_S(self) -> np.ndarray:
        return np.fromiter(map(len, self.at_S), np.int64, len(self.at_S))

    @cached_property
    def places_E(self) -> np.ndarray:
        """Which of the S positions each entry belongs to."""
        return np.repeat(np.arange(len(self.at_S)), self.counts_S)

    @property
    def names(self) -> list[str]:
        return list(chain.from_iterable(self.at_S))

    @property
    def values(self) -> list[Any]:
        return list(chain.from_iterable(entries.values() for entries in self.at_S))

    def refuse_first(self, wrong_E: np.ndarray | Sequence[bool], reason: str) -> None:
        """Refuse where an entry is wrong."""
        wrong_E = np.asarray(wrong_E, bool)
        if wrong_E.any():
            self.choice.refuse(reason, self.choice.row.predicted[int(self.places_E[wrong_E.argmax()])])

    def read_ids(self, names: list[str]) -> np.ndarray:
        """Token ids [E]. Python would read `1_0` and other alphabets' digits as well."""
        if not ("".join(names).isascii() and all(map(str.isdecimal, names))):
            wrong = [not (name.isascii() and name.isdecimal()) for name in names]
            self.refuse_first(wrong, "an entry is named by something that is no token id")
        if max(map(len, names), default=0) > 9:
            self.refuse_first([len(name) > 9 for name in names], "a token id has more than nine digits")
        return np.fromiter(map(int, names), np.int64, len(names))


@dataclass(frozen=True)
class Entries:
    """The E entries of the asked positions, one after the other."""

    asked: Asked
    ids_E: np.ndarray
    logprobs_E: np.ndarray
    """float64."""
    ranks_E: np.ndarray | None = None
    """1 is the most likely token; None where the server gives none."""


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are; null, true and text are refused and not read as something."""
    return not set(map(type, values)) - {float, int}


def is_no_number(value: Any) -> bool:
    return type(value) not in (float, int)


def as_floats(values: Sequence[float]) -> np.ndarray:
    return np.fromiter(map(float, values), np.float64, len(values))
