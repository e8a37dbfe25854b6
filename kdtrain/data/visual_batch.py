"""What processors make of single rows to the tensors of a batch, and back to fewer rows.

What the first axis counts is the family's choice: images (LLaVA, Gemma3), crops, patches (Qwen-VL) or rows
(Idefics3, SmolVLM). Rows are laid behind each other along it, in order, and how many entries each row owns is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdtrain.data.batch import Batch, Rows, StudentChunks, TeacherImages
from kdtrain.data.multimodal import Multimodal, Processed
from kdtrain.errors import DataError
from kdtrain.host import on_host


class CannotShareError(DataError):
    """Rows that cannot be in one batch."""


# Tensors that say which pixels are real: with one of them, images of different sizes can be padded with zeros.
_SIZES = ("pixel_attention_mask", "image_sizes")
# Of families whose first axis counts rows: by zeros in one of these the model knows that a row has no image.
_ZERO_MEANS_NO_IMAGE = ("pixel_attention_mask", "batch_num_images")


def stack_visual(
    rows: Sequence[Processed | None], model: Multimodal
) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """The visual tensors of B rows (None: a row without images) along axis 0, and how much of each the rows own."""
    with_images = [row.visual for row in rows if row is not None]
    tensors: dict[str, torch.Tensor] = {}
    sizes: dict[str, list[int]] = {}
    for name in dict.fromkeys(name for visual in with_images for name in visual):
        if any(name not in visual for visual in with_images):
            raise DataError(f"the processor makes {name} for some rows with images and not for others")
        parts = [None if row is None else row.visual[name] for row in rows]
        tensors[name], sizes[name] = _stack(name, parts, model, set(with_images[0]))
    return tensors, sizes


def _stack(
    name: str, parts: list[torch.Tensor | None], model: Multimodal, names: set[str]
) -> tuple[torch.Tensor, list[int]]:
    real = [part for part in parts if part is not None]
    shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in real), strict=True)]
    for part in real:
        _check_padding(name, part, shape, names)
    empty = 0
    # Where axis 0 counts images or patches, a row without images owns none. Where it counts rows, it must have an
    # entry: zeros, which the model takes for no image only if the pixel mask or the number of images says so.
    if len(real) < len(parts) and name in model.by_row:
        if name not in (*_ZERO_MEANS_NO_IMAGE, "pixel_values") or not names & set(_ZERO_MEANS_NO_IMAGE):
            raise DataError(
                f"rows with and without images cannot share a batch: {name} has an entry per row, and none says that "
                "a row has no image. Keep them in separate runs, or use per_device_train_batch_size: 1"
            )
        empty = 1
    entries = [real[0].new_zeros(empty, *shape) if part is None else _padded(part, shape) for part in parts]
    return torch.cat(entries), [len(entry) for entry in entries]


def _check_padding(name: str, part: torch.Tensor, shape: list[int], names: set[str]) -> None:
    """Refuses to pad with zeros that the model would see.

    It sees none along axis 1 of a tensor of crops, where they are one more crop that no token stands for; nor along the
    two axes of pixels, where another tensor says how many are real.
    """
    differing = [axis for axis, size in enumerate(shape, start=1) if part.shape[axis] != size]
    crops = part.dim() >= 5 or name == "pixel_attention_mask"
    pixels = part.dim() >= 3 and bool(names & set(_SIZES))
    if any(not (crops and axis == 1) and not (pixels and axis >= part.dim() - 2) for axis in differing):
        raise CannotShareError(
            f"images of two rows have {name} of the shapes {tuple(part.shape)} and (…, {', '.join(map(str, shape))}), "
            "which cannot share a batch: let the image processor bring all images to one size, or use "
            "per_device_train_batch_size: 1"
        )


def _padded(part: torch.Tensor, shape: list[int]) -> torch.Tensor:
    if list(part.shape[1:]) == shape:
        return part
    padded = part.new_zeros(len(part), *shape)
    if len(part):
        padded[tuple(slice(size) for size in part.shape)] = part
    return padded


def pad_token_tensors(
    rows: Sequence[tuple[int, Processed | None]], width: int, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Tensors [B, T, ...] with one entry per token, padded on the right with zeros; every batch has those of `names`.

    `rows`: how many tokens of a row are in the batch (a truncated one has fewer than its processor made), and what the
    processor made of it; None for rows without images, whose entries are all zero.
    """
    found = {name: tensor for _, row in rows if row is not None for name, tensor in row.token_tensors.items()}
    tensors = {}
    for name in dict.fromkeys([*names, *found]):
        like = found.get(name, torch.zeros(1, 1, dtype=torch.long))
        tensors[name] = like.new_zeros(len(rows), width, *like.shape[2:])
        for i, (length, row) in enumerate(rows):
            if row is not None:
                own = row.token_tensors[name][0, :length]
                tensors[name][i, : len(own)] = own  # a generated answer follows it: text, which has zeros
    return tensors


def cut_rows(batch: Batch, kept: int) -> Batch:
    """The first `kept` of the B rows of a batch, with what they own of visual tensors."""
    count = len(batch)
    if kept >= count:
        return batch

    def cut(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() and len(value) != count:
            raise DataError(
                f"the last batch of an epoch has repeated rows to leave out, and it is not known which entries of "
                f"{name} {tuple(value.shape)} belong to them. Let the collator say so in `visual_sizes` (see Batch), "
                "or set training.dataloader_drop_last: true"
            )
        return value[:kept] if isinstance(value, torch.Tensor | list) and len(value) == count else value

    visual, sizes = _cut_visual(batch.model_inputs, batch.visual_sizes, kept)
    by_row = {name: cut(name, value) for name, value in batch.model_inputs.items() if name not in batch.visual_sizes}

    def cut_images(images: TeacherImages | None) -> TeacherImages | None:
        if images is None or not visual:
            return None
        inputs, own_sizes = _cut_visual(images.inputs, images.sizes, kept)
        inputs |= {name: cut(name, value) for name, value in images.inputs.items() if name not in images.sizes}
        return TeacherImages(inputs=inputs, sizes=own_sizes)

    tokens = batch.teacher_tokens
    if tokens is not None:
        first: dict[str, Any] = {name: value if value is None else value[:kept] for name, value in vars(tokens).items()}
        tokens = replace(tokens, **first)
    chunks = batch.student_chunks
    if chunks is not None:
        chunks = StudentChunks(**{name: value[:kept] for name, value in vars(chunks).items()})
    rows: dict[str, Any] = {name: value if value is None else value[:kept] for name, value in vars(batch.rows).items()}
    if batch.rows.prompts is not None:
        rows["prompts"] = tuple(part[:kept] for part in batch.rows.prompts)
    return replace(
        batch,
        model_inputs=by_row | visual,
        labels=batch.labels[:kept],
        kd_token_weights=None if batch.kd_token_weights is None else batch.kd_token_weights[:kept],
        rows=Rows(**rows),
        visual_sizes=sizes,
        teacher_images=cut_images(batch.teacher_images),
        blank_images=cut_images(batch.blank_images),
        teacher_tokens=tokens,
        student_chunks=chunks,
    )


def _cut_visual(
    inputs: Mapping[str, torch.Tensor], owned: Mapping[str, Sequence[int]], kept: int
) -> tuple[dict[str, torch.Tensor], dict[str, Sequence[int]]]:
    visual = {name: inputs[name][: sum(sizes[:kept])] for name, sizes in owned.items()}
    sizes = {name: sizes[:kept] for name, sizes in owned.items()}
    return (visual, sizes) if images_left(visual, sizes) else ({}, {})


def images_left(visual: Mapping[str, torch.Tensor], sizes: Mapping[str, Sequence[int]]) -> bool:
    """Whether any of the rows that own these tensors has an image."""
    marks = next((visual[name] for name in sizes if name in _ZERO_MEANS_NO_IMAGE), None)
    none_owned = any(not sum(owned) for owned in sizes.values())
    return bool(sizes) and not none_owned and (marks is None or bool(on_host(marks).any()))


@dataclass(frozen=True)
class Owned:
    """The visual tensors of a batch of `count` rows, and how many entries of each its rows own."""

    tensors: Mapping[str, torch.Tensor]
    sizes: Mapping[str, Sequence[int]]
    count: int

    def by_row(self, name: str) -> list[torch.Tensor | None]:
        """Each row's part of a tensor; None where the batch has no such tensor."""
        if name not in self.sizes:
            return [None] * self.count
        return list(self.tensors[name].split(list(self.sizes[name])))


def join_visual(
    batches: Sequence[Owned], order: Sequence[int]
) -> tuple[dict[str, torch.Tensor], dict[str, Sequence[int]]]:
    """The visual tensors of some rows of several batches, by their numbers in all of these together.

    Raises:
        CannotShareError: their images cannot share a batch.
    """
    tensors: dict[str, torch.Tensor] = {}
    sizes: dict[str, Sequence[int]] = {}
    names = list(dict.fromkeys(name for batch in batches for name in batch.sizes))
    for name in names:
        parts = [part for batch in batches for part in batch.by_row(name)]
        like = next(part for part in parts if part is not None)
        chosen = [parts[row] for row in order]
        real = [part for part in chosen if part is not None and len(part)] or [like[:0]]
        shape = [max(axis) for axis in zip(*(part.shape[1:] for part in real), strict=True)]
        for part in real:
            _check_padding(name, part, shape, set(names))
        # Of a batch without images it is not known what its rows would own.
        none = any(part is None for part in chosen)
        missing = like.new_zeros(_entries_without_image(name, batches) if none else 0, *shape)
        entries = [missing if part is None else _padded(part, shape) for part in chosen]
        tensors[name], sizes[name] = torch.cat(entries), [len(entry) for entry in entries]
    return tensors, sizes


def _entries_without_image(name: str, batches: Sequence[Owned]) -> int:
    """What a row of a batch without images owns of a tensor that others have: an entry of zeros, or nothing.

    As for a processor (see `Multimodal.by_row`), which is not here: found from the tensors.
    """
    owned = [entries for batch in batches for entries in batch.sizes.get(name, ())]
    if set(owned) != {1} or name == "image_sizes":  # where rows are counted, each has one
        return 0
    of = {key: batch.tensors[key].dim() for batch in batches for key in batch.sizes}
    if name == "batch_num_images" or of.get("pixel_attention_mask", 0) >= 4:  # [rows, images, height, width]
        return 1
    if of.get("pixel_values", 0) >= 5 and "image_sizes" not in of:
        raise CannotShareError(
            f"rows with and without images cannot share a batch: it is not known whether {name} counts images or rows"
        )
    return 0
