"""Rows as they were handed to the trainer, in a form that can be indexed, counted and checked."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from datasets import Dataset

from kdtrain.data.collate import Collator
from kdtrain.data.columns import KNOWN_COLUMNS
from kdtrain.data.errors import RowError
from kdtrain.data.kd_weights import WEIGHT
from kdtrain.data.stream.handed_over import IteratedRows
from kdtrain.data.stream.rows import StreamedRows
from kdtrain.data.tables import has_mappings, without_nulls
from kdtrain.errors import ConfigError, DataError, NotAvailableError


class RowsInMemory(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows as they were given: an Arrow table would want one type for all contents, and could not hold a PIL image."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def in_memory(self) -> bool:
        """Whether the rows are there, and not made when they are asked for."""
        return isinstance(self._rows, list | tuple)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._rows[index])


def as_rows(name: str, data: Any) -> Any:
    """A data set in a form that can be indexed. One to evaluate on may be missing, a stream, or a dict of several."""
    if name != "train_dataset":
        if data is None or isinstance(data, datasets.IterableDataset):
            return data
        if isinstance(data, dict):
            return {key: as_rows(f"{name}[{key!r}]", rows) for key, rows in data.items()}
    if data is None:
        raise ConfigError("`train_dataset` is required: a datasets.Dataset, or a list of rows.")
    if isinstance(data, dict):
        raise ConfigError(f"{name} is a dict with the keys {', '.join(map(str, data))}: pass one of its data sets.")
    if isinstance(data, StreamedRows | IteratedRows):
        return data
    if is_iterated(data):
        return IteratedRows(name, data)
    if not isinstance(data, list | tuple | Dataset | torch.utils.data.Dataset) or not hasattr(data, "__len__"):
        raise ConfigError(
            f"{name} must be a datasets.Dataset, a list of rows or a torch Dataset with a length; it is a "
            f"{type(data).__name__}. Files are read by kdtrain.fit (data.train)."
        )
    if len(data) == 0:
        raise DataError(f"{name} has no rows.")
    if not isinstance(data[0], Mapping):
        raise DataError(
            f"{name}: a row must be a mapping such as {{'messages': […]}}; the first is a {type(data[0]).__name__}."
        )
    return _as_written(data) if isinstance(data, Dataset) else RowsInMemory(data)


def _as_written(data: Dataset) -> Dataset:
    """A data set whose tools and calls come without the keys of other rows, which Arrow fills in with null."""
    features = {name: feature for name, feature in data.features.items() if name in KNOWN_COLUMNS}
    if (
        data.format["type"] is not None
        or "input_ids" in data.column_names
        or not any(map(has_mappings, features.values()))
    ):
        return data
    return data.with_transform(functools.partial(_without_nulls, features))


def _without_nulls(features: Mapping[str, Any], batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: [without_nulls(value, features.get(name)) for value in batch[name]] for name in batch}


def check_raw_rows(collator: Any, name: str, data: Any) -> None:
    """Refuse raw rows that no batch can be made of, before one of them ends a run in its middle.

    RowsInMemory that are made when they are asked for, and pictures that would be decoded, are left to their batch.
    """
    if isinstance(data, dict):
        for key, rows in data.items():
            check_raw_rows(collator, f"{name}[{key!r}]", rows)
    in_memory = data.in_memory if isinstance(data, RowsInMemory) else isinstance(data, Dataset)
    pictures = isinstance(data, Dataset) and {"image", "images"} & set(data.column_names)
    if not isinstance(collator, Collator) or not in_memory or pictures or "input_ids" in data[0]:
        return
    for number, row in enumerate(data):
        try:
            collator.check(row)
        except RowError as error:
            raise DataError(f"{name}: row {number}: {error}.") from error


def rows_weigh(data: Any) -> bool | None:
    """Whether rows have weights in the divergence (`kd_weight`); None where that is not known before they are read.

    The same on all ranks, which have the same rows.
    """
    first = rows_to_look_at(data)
    if isinstance(first, Dataset) and "input_ids" in first.column_names:
        found = bool({WEIGHT, f"{WEIGHT}s"} & set(first.column_names))
        return found or (None if is_stream(data) else False)
    if isinstance(first, RowsInMemory) and first.in_memory:
        return any(_weighs(first[i]) for i in range(len(first)))
    return None


def _weighs(row: Mapping[str, Any]) -> bool:
    """Whether a row, or one of its messages, has a weight; of messages as JSON text, whether it may."""
    if row.get(WEIGHT) is not None:
        return True
    for value in row.values():
        if isinstance(value, str) and f'"{WEIGHT}"' in value:
            return True
        if isinstance(value, list | tuple) and any(isinstance(one, Mapping) and WEIGHT in one for one in value):
            return True
    return False


def check_stream(data: Any, collator: Any, accelerator: Accelerator) -> None:
    """Refuse a stream whose batches accelerate would take apart to send them to other processes: it knows dicts only.

    Raises:
        NotAvailableError: on several processes, with a collator of this package.
    """
    made_by = collator.args[0] if isinstance(collator, functools.partial) and collator.args else collator
    if is_iterated(data) and isinstance(made_by, Collator) and accelerator.num_processes > 1:
        raise NotAvailableError(
            "eval_dataset: an IterableDataset (streaming) is not available yet on several processes: pass a "
            "datasets.Dataset or a list of rows, evaluate in one process, or pass a data_collator that returns dicts."
        )


def is_iterated(data: Any) -> bool:
    """Whether a data set has an order and no numbers."""
    return isinstance(data, torch.utils.data.IterableDataset | datasets.IterableDataset)


def is_stream(data: Any) -> bool:
    """Whether training rows are read while training, and have no number."""
    return isinstance(data, StreamedRows | IteratedRows)


def rows_to_look_at(data: Any) -> Any:
    """The training rows, or of a stream the first of them."""
    return data.first if is_stream(data) else data


def check_stream_arguments(data: Any, args: Any) -> None:
    """Refuse arguments that count on the number of the training rows, which a stream does not tell.

    Raises:
        ConfigError: what to set instead.
    """
    if not is_stream(data):
        return
    if args.max_steps <= 0:
        raise ConfigError("train_dataset is a stream, whose rows are not counted: set max_steps, not num_train_epochs.")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if str(getattr(getattr(args, name), "value", getattr(args, name))) == "epoch":
            raise ConfigError(f"train_dataset is a stream, which has no epochs: set {name} to steps.")
    if args.train_sampling_strategy == "group_by_length":
        raise ConfigError("train_dataset is a stream, whose rows come as they are read: group_by_length is not for it.")
    if isinstance(data, IteratedRows) and args.dataloader_num_workers:
        raise ConfigError(
            "train_dataset is an IterableDataset, of which workers of the data loader would read a part each: set "
            "dataloader_num_workers to 0, or name files in a config, with streaming: true."
        )


def placeholder(data: Any) -> Any:
    """What upstream's constructor gets: it asks for the type and the length, and wants an Arrow table."""
    if is_stream(data):
        return Dataset.from_dict({"row": [0]})
    if isinstance(data, dict):
        return {key: placeholder(rows) for key, rows in data.items()}
    return Dataset.from_dict({"row": range(len(data))}) if isinstance(data, RowsInMemory) else data
