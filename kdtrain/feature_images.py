"""Which batches and rows have images, and how much a batch weighs in a mean over image features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kdtrain.data.collate import Collator


def has_images(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch carries pixels."""
    return bool(_pixels(inputs))


def visual_units(batch: Mapping[str, Any]) -> float:
    """What a mean over image features weighs a batch by, proportional to its tokens.

    Patches where the batch says how many, the area of images that are packed, crops or frames elsewhere. Crops that
    only fill up a batch, all zero, do not count: no model encodes them. Nothing where all its rows are repeated, to
    fill up an epoch. A batch that was counted carries its number: on a GPU, looking again would wait for the device.
    """
    if "visual_units" in batch:
        return float(batch["visual_units"])
    if batch.get("all_repeated", False):
        return 0.0
    grids = [batch[key] for key in ("image_grid_thw", "video_grid_thw") if batch.get(key) is not None]
    patches = float(sum(grid.prod(-1).sum() for grid in grids))
    return patches or float(sum(_images(pixels, batch.get("image_sizes")) for pixels in _pixels(batch)))


def _pixels(inputs: Mapping[str, Any]) -> list[Any]:
    return [value for key, value in inputs.items() if key.startswith("pixel_values") and value is not None]


def _images(pixels: Any, sizes: Any) -> float:
    if not isinstance(pixels, torch.Tensor):
        return len(pixels)
    if pixels.dim() == 5:  # [rows, crops, channels, height, width]
        return float(pixels.flatten(2).any(-1).sum())
    if pixels.dim() == 4 and sizes is not None and len(sizes) == len(pixels):
        return float(torch.as_tensor(sizes).prod(-1).sum())
    return len(pixels)


def first_batch_with_images(dataset: Any, collator: Any, tries: int = 32) -> Mapping[str, Any] | None:
    """A batch of the first row with images; None if there is none.

    Args:
        dataset: rows with an `images` or `image` column, or with images inside their messages: of those only the first
            `tries` are looked at.
    """
    batches = (collator([row]) for row in _candidates(dataset, tries))
    return next((batch for batch in batches if has_images(batch)), None)


def first_row_with_images(dataset: Any, collator: Collator, tries: int = 32) -> Any | None:
    """The row that `first_batch_with_images` collates, as it stands in the data set."""
    return next((row for row in _candidates(dataset, tries) if collator.has_images(row)), None)


def _candidates(dataset: Any, tries: int) -> Iterator[Any]:
    columns = {"images", "image"} & set(getattr(dataset, "column_names", None) or ())
    for i in range(len(dataset) if columns else min(tries, len(dataset))):
        row = dataset[i]
        if not columns or any(row[name] for name in columns):
            yield row
