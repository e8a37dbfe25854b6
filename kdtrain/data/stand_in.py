"""A row with a small image that teaches nothing.

A vision encoder in pieces is put together by all ranks or by none, and gradients are reduced in the same order by all.
So a batch without images is run with such a row behind its own where another rank's batch has images. Nothing of it is
supervised: it goes through the whole model, forward and backward, and its gradient is exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from kdtrain.data.batch import Batch, Rows, TeacherImages
from kdtrain.data.multimodal import Multimodal, Processed
from kdtrain.data.regroup import rows_of
from kdtrain.data.visual_batch import pad_token_tensors, stack_visual
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX

_SIDE = 64  # pixels; a processor that wants other sizes makes them


def image_row(student: Multimodal, teacher: Multimodal | None) -> Batch:
    """A batch of the row alone.

    Args:
        teacher: the processor that makes the teacher's images, where these are others than the student's.

    Raises:
        DataError: a processor does not take it, or the two make other tokens of it.
    """
    processed = _processed(student, student.placeholder)
    ids = torch.tensor([processed.ids])
    visual, sizes = stack_visual([processed], student)
    tokens = pad_token_tensors([(len(processed.ids), processed)], len(processed.ids), ())
    images = None
    if teacher is not None:
        of_teacher = _processed(teacher, student.placeholder)
        if of_teacher.ids != processed.ids:
            raise DataError("the teacher's processor makes other tokens of an image than the student's")
        inputs, of_rows = stack_visual([of_teacher], teacher)
        images = TeacherImages(inputs=inputs, sizes=of_rows)
    return Batch(
        model_inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids), **tokens, **visual},
        labels=torch.full_like(ids, IGNORE_INDEX),
        rows=Rows(prompt_lengths=torch.tensor([len(processed.ids)])),
        visual_sizes=sizes,
        teacher_images=images,
    )


def _processed(model: Multimodal, placeholder: str) -> Processed:
    from PIL import Image

    # A colour, of which normalising makes no zeros: some models take an image of zeros for none.
    return model.process(f"a{placeholder}b", [Image.new("RGB", (_SIDE, _SIDE), "red")])


def as_run(batch: Batch) -> Batch:
    """The batch as both models' forwards take it: with its stand-in as the last row, where it has one.

    Its supervised tokens are the same, in the same order.

    Raises:
        CannotShareError: rows with and without images cannot share a batch of this family, or of this collator.
    """
    row = batch.stand_in
    if row is None or batch.has_images:
        return batch
    kept = replace(row, generated_by=batch.generated_by, all_repeated=batch.all_repeated)
    own, kept = _alike(batch, kept), _alike(kept, batch)
    if batch.rows.prompt_lengths is None and batch.rows.prompts is not None:  # of trl's collator
        kept = replace(kept, rows=Rows(prompts=(row.model_inputs["input_ids"], row.model_inputs["attention_mask"])))
    text_id = int(row.model_inputs["input_ids"][0, -1])  # to pad with: not one that stands for an image
    run = rows_of([own, kept], range(len(batch) + 1), text_id, None)
    return replace(run, stand_in=row, targets=batch.targets)


def _alike(batch: Batch, other: Batch) -> Batch:
    """The batch with all that the other one's processor says of every token; 0 is text."""
    missing = {
        name: values.new_zeros(*batch.labels.shape, *values.shape[2:])
        for name, values in other.token_level.items()
        if name not in batch.token_level
    }
    return replace(batch, model_inputs={**batch.model_inputs, **missing}) if missing else batch


def counted_inputs(batch: Batch) -> Mapping[str, Any]:
    """The inputs of a batch as it is run, with a mask that leaves the stand-in out, for means over tokens."""
    if batch.stand_in is None or not batch.has_images:
        return batch.model_inputs
    mask = batch.model_inputs["attention_mask"].clone()
    mask[-1] = 0
    return {**batch.model_inputs, "attention_mask": mask}
