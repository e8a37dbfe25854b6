"""A row as tokens: what is known of it, rows that were tokens already, and what becomes of those that are too long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kdtrain.data.errors import show
from kdtrain.data.images import Image
from kdtrain.data.multimodal import Processed
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX

ON_OVERLENGTH = ("error", "truncate", "drop")
# What trl's rows have in place of labels: 1 where a token is supervised.
MASKS = ("completion_mask", "assistant_masks")


@dataclass(frozen=True)
class EncodedRow:
    """One row as tokens.

    `labels` has the length of `input_ids`, -100 where nothing is supervised. `prompt_length` leading tokens are the
    prompt to generate from, up to and including the generation prompt of the last assistant turn: all of them in a
    prompt-only row, 0 in plain text.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    kind: str = "chat"  # chat | completion | text
    prompt_only: bool = False
    turn_starts: tuple[int, ...] = ()  # prompt lengths of the supervised turns, for truncated rows
    extended: bool = False  # the stop token was outside the template's markers and was added to the mask
    unterminated: bool = False  # a supervised turn ends without a token that would make the model stop
    text: str | None = None  # of a row with images: the rendered conversation, one placeholder per image
    images: tuple[Image, ...] = ()
    notes: tuple[str, ...] = ()  # what the row says and is not used, or where it differs from inference
    sizes: tuple[int, ...] = ()  # width and height of each image in pixels, one behind the other
    images_end: int = 0  # leading tokens that must stay, or the model would miss a part of an image
    processed: Processed | None = field(default=None, repr=False, compare=False)  # where `RowEncoder` keeps pixels

    @property
    def supervised(self) -> int:
        return len(self.labels) - self.labels.count(IGNORE_INDEX)


def tokenised_row(row: Mapping[str, Any]) -> EncodedRow:
    """The tokens of a row with `input_ids`, and `labels` or trl's masks; its images are left out."""
    ids = _ints(row["input_ids"])
    labels = _labels(row, ids)
    if len(ids) != len(labels) or not ids:
        raise DataError(
            f"a tokenised row ({show(row.get('row_id', 'no row_id'))}) needs labels as long as its input_ids: "
            f"{len(ids)} ids, {len(labels)} labels"
        )
    mask = _ints(row.get("completion_mask"))
    before_completion = next((i for i, on in enumerate(mask) if on), len(mask))  # 0 without a mask
    start = int(row.get("prompt_length", before_completion))
    return EncodedRow(ids, labels, start, prompt_only=start == len(ids), turn_starts=(start,))


def _labels(row: Mapping[str, Any], ids: list[int]) -> list[int]:
    """The labels; without any, the ids where all of trl's masks are 1."""
    masks = [_ints(row[name]) for name in MASKS if row.get(name) is not None]
    if row.get("labels") is not None or not masks:
        return _ints(row.get("labels"))
    return [token if all(on) else IGNORE_INDEX for token, *on in zip(ids, *masks, strict=True)]


def _ints(values: Any) -> list[int]:
    """Data sets with a torch or numpy format give tensors."""
    if values is None:
        return []
    return list(values.tolist()) if hasattr(values, "tolist") else list(values)


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
    does. None when nothing is left to train on or generate from, or a part of an image would be cut off.
    """
    if len(row.input_ids) <= max_length:
        return row
    labels = row.labels[:max_length]
    if row.prompt_only or labels.count(IGNORE_INDEX) == max_length or row.images_end > max_length:
        return None
    # All images of the row reach the model, so that a prompt to generate from needs all of their tokens.
    fitting = [start for start in row.turn_starts if row.images_end <= start < max_length]
    start = fitting[-1] if fitting else 0
    return replace(row, input_ids=row.input_ids[:max_length], labels=labels, prompt_length=start)
