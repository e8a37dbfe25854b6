"""The longest row in tokens, and what becomes of longer ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kdtrain.data.encoder import EncodedRow
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX

ON_OVERLENGTH = ("error", "truncate", "drop")


@dataclass(frozen=True)
class Limits:
    """`max_length` in tokens (None: no limit) and what becomes of longer rows."""

    max_length: int | None
    on_overlength: str

    def __post_init__(self) -> None:
        if self.on_overlength not in ON_OVERLENGTH:
            raise DataError(f"on_overlength must be one of {', '.join(ON_OVERLENGTH)}, not {self.on_overlength!r}")
        if self.max_length is not None and self.max_length < 2:
            raise DataError(f"max_length must be at least 2, not {self.max_length}: one token predicts the next")


def truncate(row: EncodedRow, max_length: int) -> EncodedRow | None:
    """Cuts from the right: the system prompt stays, and no end token is made up for an answer without its end.

    The prompt to generate from becomes that of the last turn whose prompt still fits; there is none (0) if no turn's
    does. Returns None when nothing is left to train on or generate from, or a part of an image would be cut off.
    """
    if len(row.input_ids) <= max_length:
        return row
    labels = row.labels[:max_length]
    if row.prompt_only or labels.count(IGNORE_INDEX) == max_length or row.images_end > max_length:
        return None
    # All images of the row reach the model, so that a prompt to generate from needs all of their tokens.
    fitting = [start for start in row.turn_starts if row.images_end <= start < max_length]
    return replace(
        row, input_ids=row.input_ids[:max_length], labels=labels, prompt_length=fitting[-1] if fitting else 0
    )
