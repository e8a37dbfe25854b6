"""Token ids against the embeddings that will look them up, before training and whether or not there is a teacher.

A tokenizer may have more tokens than an embedding has rows, as long as no row uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import datasets
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from transformers import PreTrainedModel

from kdtrain.data.batch import Batch
from kdtrain.errors import DataError
from kdtrain.models.vocabulary import vocabulary_size

_COLUMNS = ("input_ids", "teacher_input_ids")


def embedding_rows(model: PreTrainedModel) -> int:
    """Ids that a model can look up: 0 up to, and without, this number."""
    # Under ZeRO-3 the weight is empty between its uses; the module knows its size.
    return int(getattr(model.get_input_embeddings(), "num_embeddings", None) or vocabulary_size(model))


def check_rows(data: Any, name: str, sizes: Mapping[str, int]) -> bool:
    """Refuse a data set with ids beyond an embedding, where its rows can be read without making them.

    Args:
        data: as it was given to the trainer: a `datasets.Dataset`, rows, a torch data set, a stream, or a map of these.
        sizes: rows of the embedding of "student" and "teacher".

    Returns:
        Whether that was all: False for a torch data set or a stream, whose batches are to be checked. Rows that are not
        tokenised yet get their ids from the tokenizer, and are a matter of its size.
    """
    if isinstance(data, Mapping):
        checked = [check_rows(part, f"{name} ({key})", sizes) for key, part in data.items()]
        return all(checked)
    if isinstance(data, datasets.IterableDataset | torch.utils.data.Dataset):
        return False
    if isinstance(data, datasets.Dataset):
        if "input_ids" not in data.column_names:
            return True
        # All rows of the table, chosen or not: almost always that is enough, and takes no time.
        chunks = [chunk for name in _COLUMNS if name in data.column_names for chunk in data.data.column(name).chunks]
        if max((pc.max(chunk.flatten()).as_py() or 0 for chunk in chunks), default=0) < min(sizes.values()):
            return True
    known = [column for column in _COLUMNS if column in getattr(data, "column_names", _COLUMNS)]
    for i, row in enumerate(data.select_columns(known) if isinstance(data, datasets.Dataset) else data):
        for column in known if isinstance(row, Mapping) else ():
            ids = row.get(column)
            largest = 0 if ids is None else int(max(ids, default=0))  # int: of data sets with a torch or numpy format
            if largest >= min(sizes.values()):
                _refuse(largest, f"{name}: row {data[i].get('row_id', i)}", sizes)
    return True


def check_batch(batch: Batch, sizes: Mapping[str, int]) -> None:
    """The same of a batch, for rows that are tokenised while training; waits for the device."""
    ids: torch.Tensor = batch.model_inputs["input_ids"]
    largest = int(ids.max()) if ids.numel() else 0
    if batch.teacher_tokens is not None and batch.teacher_tokens.chunks is None:
        largest = max(largest, int(batch.teacher_tokens.input_ids.max()))
    if largest >= min(sizes.values()):
        _refuse(largest, f"a batch (rows {', '.join(batch.rows.ids) or '?'})", sizes)


def _refuse(largest: int, where: str, sizes: Mapping[str, int]) -> NoReturn:
    side, size = next((side, size) for side, size in sizes.items() if largest >= size)
    raise DataError(
        f"{where} has token id {largest}, and the {side}'s embedding has {size} rows. The tokenizer is not the one "
        "that the model was trained with, or tokens were added to it: resize the model's embedding and save it with "
        "its tokenizer, or leave such rows out."
    )
