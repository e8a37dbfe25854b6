"""The rows with images that a run is tried on before it begins."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from kdtrain.data.batch import Batch, received
from kdtrain.data.collate import Collator
from kdtrain.data.columns import PATH_COLUMNS


def first_batch_with_images(dataset: Any, collator: Any, tries: int = 32) -> Batch | None:
    """A batch of the first row with images; None if there is none. The collator may be a user's own."""
    batches = (received(collator([row]), None) for row in _candidates(dataset, tries))
    return next((batch for batch in batches if batch.has_images), None)


def few_with_images(dataset: Any, collator: Any, count: int, tries: int = 32) -> Batch | None:
    """A batch of a few of the first rows with images and supervised tokens; None if there is none."""
    if not isinstance(collator, Collator):
        return first_batch_with_images(dataset, collator, tries)
    rows = itertools.islice((row for row in _candidates(dataset, tries) if collator.has_images(row)), count)
    chosen = list(rows)
    return received(collator(chosen), None) if chosen else None


def first_row_with_images(dataset: Any, collator: Collator, tries: int = 32) -> Any | None:
    """The row that `first_batch_with_images` collates, as it stands in the data set."""
    return next((row for row in _candidates(dataset, tries) if collator.has_images(row)), None)


def _candidates(dataset: Any, tries: int) -> Iterator[Any]:
    columns = {"images", "image", *PATH_COLUMNS} & set(getattr(dataset, "column_names", None) or ())
    for i in range(len(dataset) if columns else min(tries, len(dataset))):
        row = dataset[i]
        if not columns or any(row[name] for name in columns):
            yield row
