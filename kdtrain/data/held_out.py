"""`data.eval: 5%`: a share of the training rows is kept from training, chosen by what the rows say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdtrain.data.columns import KNOWN_COLUMNS, parse_json
from kdtrain.data.errors import RowError
from kdtrain.data.files import RawRow
from kdtrain.data.turns import SPEAKERS
from kdtrain.errors import DataError

_ANSWERS = ("completion", "output", "response")


@dataclass(frozen=True)
class HeldOut:
    """One side of the training rows.

    The side of a row is a function of its content alone: of the columns that kdtrain reads, under their canonical
    names, without those that are null; of its prompt where the teacher writes the answer. So rows that are equal there
    fall on one side, whatever their ids, their order, their file, the number of processes and the seed, and stay there
    when rows are added. About `share` of the distinct rows are held out, not exactly.
    """

    share: float
    training: bool  # the rows that are left to train on, or those held out

    def has(self, raw: RawRow, columns: Mapping[str, str | None] | None, answers: str) -> bool:
        """Whether this side has the row. What cannot be read is left to the training side, so that it counts once."""
        try:
            content = _content(raw, columns, answers)
        except RowError:
            return self.training
        number = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")
        return (number < self.share * 2**64) != self.training

    def refuse_empty(self, rows: int) -> DataError:
        """The error of a side without rows."""
        purpose = "train on" if self.training else "evaluate on"
        return DataError(
            f"data.eval: {100 * self.share:.4g}% of the {rows} rows of data.train leaves none to {purpose}: which rows "
            "are held out depends on what they say. Choose another share, or give data.eval rows of its own"
        )


def _content(raw: RawRow, columns: Mapping[str, str | None] | None, answers: str) -> str:
    if raw.problem:
        raise RowError(raw.problem)
    row = parse_json(raw.text, columns)
    read: Any = {column: row[column] for column in KNOWN_COLUMNS if row.get(column) is not None}
    return json.dumps(_without_answer(read) if answers == "teacher" else read, sort_keys=True)


def _without_answer(read: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what the teacher writes in its place, see `prompt_of`."""
    left = {column: value for column, value in read.items() if column not in _ANSWERS}
    for column in ("messages", "conversations"):
        turns = left.get(column)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            speaker = turns[-1].get("role") or turns[-1].get("from")
            if SPEAKERS.get(str(speaker).lower()) == "assistant":
                left[column] = turns[:-1]
    return left
