"""`data.eval: 5%`: a share of the training rows is kept from training, chosen by what the rows say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdtrain.data.columns import IMAGE_COLUMNS, KNOWN_COLUMNS, parse_json
from kdtrain.data.errors import RowError
from kdtrain.data.files import RawRow
from kdtrain.data.media import images_by_name
from kdtrain.data.rows import Chat, asked_in
from kdtrain.data.turns import blank
from kdtrain.errors import DataError


@dataclass(frozen=True)
class HeldOut:
    """One side of the training rows.

    The side of a row is a function of its content alone: of the columns that kdtrain reads, under their canonical
    names, without those that are empty; of its prompt where the teacher writes the answer. So rows that are equal there
    fall on one side, whatever their ids, their order, their file, the number of processes and the seed, and stay there
    when rows are added. About `share` of the distinct rows are held out, not exactly.
    """

    share: float
    training: bool  # the rows that are left to train on, or those held out

    def has(
        self, raw: RawRow, columns: Mapping[str, str | None] | None, answers: str, prefix_column: str | None = None
    ) -> bool:
        """Whether this side has the row. What cannot be read is left to the training side, so that it counts once.

        What the teacher alone reads (`prefix_column`) does not count: for the student such rows are equal.
        """
        try:
            content = _content(raw, columns, answers, prefix_column)
        except RowError:
            return self.training
        number = int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")
        return (number < self.share * 2**64) != self.training

    def refuse_empty(self, rows: int) -> DataError:
        """The error of a side without rows."""
        purpose = "train on" if self.training else "evaluate on"
        return DataError(
            f"Holding out {100 * self.share:.4g}% of the {rows} rows of data.train leaves none to {purpose}: which "
            "rows are held out depends on what they say. Choose another share for data.eval, or give it rows of its own"
        )


def _content(raw: RawRow, columns: Mapping[str, str | None] | None, answers: str, prefix_column: str | None) -> str:
    if raw.problem:
        raise RowError(raw.problem)
    row = parse_json(raw.text, columns, prefix_column)
    row.pop(prefix_column, None)  # type: ignore[arg-type]
    read = KNOWN_COLUMNS if answers != "teacher" else IMAGE_COLUMNS
    said: dict[str, Any] = {column: row[column] for column in read if not blank(row.get(column))}
    said |= images_by_name(row)
    return json.dumps(said if answers != "teacher" else {**said, "asked": _asked(row)}, sort_keys=True)


def _asked(row: Mapping[str, Any]) -> Any:
    """A row without what the teacher writes in its place, however the row writes it down."""
    asked = asked_in(row)
    if isinstance(asked, Chat):
        return [asked.messages, asked.tools, dict(asked.template_kwargs)]
    return asked.prompt
