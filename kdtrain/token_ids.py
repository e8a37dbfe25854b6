"""Token ids against the embeddings that will look them up, before training and whether or not there is a teacher.

A tokenizer may have more tokens than an embedding has rows, as long as no row uses them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch

from kdtrain.errors import DataError
from kdtrain.vocabulary import vocabulary_size


def embedding_rows(model: Any) -> int:
    """Ids that a model can look up: 0 up to, and without, this number."""
    # Under ZeRO-3 the weight is empty between its uses; the module knows its size.
    return int(getattr(model.get_input_embeddings(), "num_embeddings", None) or vocabulary_size(model))


def check_rows(data: Any, name: str, sizes: Mapping[str, int]) -> None:
    """Refuse a data set with ids beyond an embedding; one that is not tokenised yet is not looked at.

    Args:
        data: a `datasets.Dataset` with `input_ids`, rows, or a map of data sets.
        name: of the data set, for messages.
        sizes: rows of the embedding of "student" and "teacher".

    Raises:
        DataError: naming the row.
    """
    if isinstance(data, Mapping):
        for key, part in data.items():
            check_rows(part, f"{name} ({key})", sizes)
        return
    if not hasattr(data, "__len__"):  # a stream, whose batches are looked at
        return
    if isinstance(data, datasets.Dataset):
        if "input_ids" not in data.column_names:
            return
        # All rows of the table, chosen or not: almost always that is enough, and takes no time.
        if _largest(data.data.column("input_ids")) < min(sizes.values()):
            return
    elif "input_ids" not in data[0]:
        return
    for i, ids in enumerate(_ids(data)):
        _check(max(ids, default=0), f"{name}: row {_row_name(data, i)}", sizes)


def check_batch(batch: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """The same of a batch, for rows that are tokenised while training; waits for the device.

    Raises:
        DataError: naming its rows.
    """
    ids: torch.Tensor = batch["input_ids"]
    if ids.numel():
        _check(int(ids.max()), f"a batch (rows {', '.join(batch.get('row_ids', ['?']))})", sizes)


def _check(largest: int, where: str, sizes: Mapping[str, int]) -> None:
    for side, size in sizes.items():
        if largest >= size:
            raise DataError(
                f"{where} has token id {largest}, and the {side}'s embedding has {size} rows. The tokenizer is not the "
                "one that the model was trained with, or tokens were added to it: resize the model's embedding and "
                "save it with its tokenizer, or leave such rows out."
            )


def _largest(column: pa.ChunkedArray) -> int:
    return max((pc.max(chunk.flatten()).as_py() or 0 for chunk in column.chunks), default=0)


def _ids(data: Any) -> Iterator[list[int]]:
    for i in range(len(data)):
        row = data[i]
        if isinstance(row, Mapping) and "input_ids" in row:
            yield list(row["input_ids"])


def _row_name(data: Any, i: int) -> str:
    return str(data[i].get("row_id", i))
