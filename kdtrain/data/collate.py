"""Rows to a batch: right padding, and a mask made from lengths.

Many tokenizers pad with the EOS token. A mask made by comparing ids with the padding erases the real EOS as well, and
the student never learns to stop; here neither mask nor labels ever look at the ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from kdtrain.data.encoding import Limits
from kdtrain.data.rows import show
from kdtrain.data.template import IGNORE, EncodedRow, encode_row, truncate
from kdtrain.errors import DataError


def pad_rows(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, multiple: int | None = None
) -> dict[str, torch.Tensor]:
    """Pads (input_ids, labels) pairs on the right.

    Args:
        rows: B pairs of equally long lists.
        pad_id: written into the padding of `input_ids`; any id will do, the mask is made from the lengths.
        multiple: T is rounded up to a multiple of it.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each [B, T] long. Labels are -100 in the padding and at position 0,
        which nothing predicts.
    """
    longest = max(len(ids) for ids, _ in rows)
    width = -(-longest // multiple) * multiple if multiple else longest
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORE, dtype=torch.long)
    for i, (ids, row_labels) in enumerate(rows):
        input_ids[i, : len(ids)] = torch.as_tensor(ids)
        attention_mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = torch.as_tensor(row_labels)
    labels[:, :1] = IGNORE
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass
class Collator:
    """Collates rows of `build_dataset`, or raw rows, which are encoded on the fly in the same way.

    Args:
        tokenizer: a fast tokenizer, or a processor around one. Without a padding token its EOS pads; it is not changed.
        pad_to_multiple_of: rounds T up.
        max_length: limit in tokens; None for no limit.
        train_on: for raw rows, see `encode_row`.
        on_overlength: `error`, `truncate` (from the right) or `drop`, for rows over `max_length`.

    Calling it returns `input_ids`, `attention_mask`, `labels` (each [B, T] long), `prompt_lengths` ([B] long),
    `ce_rows` ([B] bool) and `row_ids` (B strings, empty for raw rows without one). Raises DataError for a row that
    cannot be encoded or is too long, and for a batch of which nothing is left.
    """

    tokenizer: Any
    _: KW_ONLY
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    train_on: str = "assistant"
    on_overlength: str = "error"

    def __post_init__(self) -> None:
        Limits(self.max_length, self.on_overlength)  # checks both
        inner = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        choices = (inner.pad_token_id, inner.eos_token_id, 0)
        self._pad_id: int = next(choice for choice in choices if choice is not None)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor | list[str]]:
        fitted = [(row, self._fit(self._encode(row))) for row in rows]
        kept = [(row, encoded) for row, encoded in fitted if encoded is not None]
        if not kept:
            raise DataError(f"every row of a batch of {len(rows)} is longer than max_length ({self.max_length} tokens)")
        pairs = [(encoded.input_ids, encoded.labels) for _, encoded in kept]
        return {
            **pad_rows(pairs, self._pad_id, self.pad_to_multiple_of),
            "prompt_lengths": torch.tensor([encoded.prompt_length for _, encoded in kept], dtype=torch.long),
            "ce_rows": torch.tensor([bool(row.get("ce", True)) for row, _ in kept]),
            "row_ids": [str(row.get("row_id", "")) for row, _ in kept],
        }

    def _encode(self, row: Mapping[str, Any]) -> EncodedRow:
        if "input_ids" not in row:
            return encode_row(row, self.tokenizer, train_on=self.train_on)
        ids, labels = _ints(row["input_ids"]), _ints(row.get("labels"))
        if len(ids) != len(labels) or not ids:
            raise DataError(
                f"a tokenised row ({show(row.get('row_id', 'no row_id'))}) needs labels as long as its input_ids: "
                f"{len(ids)} ids, {len(labels)} labels"
            )
        start = int(row.get("prompt_length", 0))
        return EncodedRow(ids, labels, start, prompt_only=start == len(ids), turn_starts=(start,))

    def _fit(self, row: EncodedRow) -> EncodedRow | None:
        if self.max_length is None or len(row.input_ids) <= self.max_length:
            return row
        if self.on_overlength == "error":
            raise DataError(
                f"a row has {len(row.input_ids)} tokens, max_length is {self.max_length}: raise it, or set "
                "on_overlength to truncate or drop"
            )
        return truncate(row, self.max_length) if self.on_overlength == "truncate" else None


def _ints(values: Any) -> list[int]:
    """Data sets with a torch or numpy format give tensors."""
    if values is None:
        return []
    return list(values.tolist()) if hasattr(values, "tolist") else list(values)
