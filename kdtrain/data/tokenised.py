"""Rows that are tokens already: those of `build_dataset`, and those that trl or a user tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdtrain.data.encoder import EncodedRow
from kdtrain.data.show import show
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX

# What trl's rows have in place of labels: 1 where a token is supervised.
MASKS = ("completion_mask", "assistant_masks")


def tokenised_row(row: Mapping[str, Any]) -> EncodedRow:
    """The tokens of a row with `input_ids`, and `labels` or trl's masks; its images are left out.

    Raises:
        DataError: there are not as many labels as ids, or none.
    """
    ids = _ints(row["input_ids"])
    labels = _labels(row, ids)
    if len(ids) != len(labels) or not ids:
        raise DataError(
            f"a tokenised row ({show(row.get('row_id', 'no row_id'))}) needs labels as long as its input_ids: "
            f"{len(ids)} ids, {len(labels)} labels"
        )
    start = int(row.get("prompt_length", _tokens_before(row.get("completion_mask"))))
    return EncodedRow(ids, labels, start, prompt_only=start == len(ids), turn_starts=(start,))


def _labels(row: Mapping[str, Any], ids: list[int]) -> list[int]:
    """The labels; without any, the ids where all of trl's masks are 1."""
    masks = [_ints(row[name]) for name in MASKS if row.get(name) is not None]
    if row.get("labels") is not None or not masks:
        return _ints(row.get("labels"))
    return [token if all(on) else IGNORE_INDEX for token, *on in zip(ids, *masks, strict=True)]


def _tokens_before(completion_mask: Any) -> int:
    """How many tokens come before the completion; 0 without a mask, which does not say."""
    mask = _ints(completion_mask)
    return next((i for i, on in enumerate(mask) if on), len(mask))


def _ints(values: Any) -> list[int]:
    """Data sets with a torch or numpy format give tensors."""
    if values is None:
        return []
    return list(values.tolist()) if hasattr(values, "tolist") else list(values)
