"""Images for ranks that have none in a micro-batch in which another rank has some.

| run | which batches without images get a stand-in (`data/stand_in.py`) | why |
|---|---|---|
| FSDP, ZeRO-3 | those where another rank's has images | the encoder's weights are put together by all ranks |
| ZeRO-1, 2 | those, in training | gradients are reduced in buckets that fill up in one order |
| DDP that does not look for unused parameters | all, in training, if the vision path is trained | it waits for each |
| language model frozen, weights in pieces | all | backward needs a graph on every rank |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from kdtrain.data.batch import Batch
from kdtrain.data.collate import Collator
from kdtrain.data.multimodal import multimodal
from kdtrain.data.stand_in import as_run, image_row
from kdtrain.data.visual_batch import CannotShareError
from kdtrain.errors import DataError, PreflightError
from kdtrain.models.kinds import sees_images
from kdtrain.models.layouts import layout_of
from kdtrain.models.parts import part_of

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


class StandIns:
    """Those of a run."""

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        self._row: Batch | None = None
        self._config = getattr(trainer.unwrap(trainer.model), "config", None)

    @property
    def may_be_needed(self) -> bool:
        """Whether ranks may wait for each other's images; the same on all of them."""
        is_alone = self._trainer.accelerator.num_processes == 1 and not self._trainer.is_sharded
        return not is_alone and self._config is not None and sees_images(self._config)

    def give(self, batches: Sequence[Batch], *, train: bool) -> list[Batch]:
        """The batches, with a stand-in where one is needed; a collective with FSDP and DeepSpeed.

        Raises:
            PreflightError: one is needed and cannot be had; on all ranks.
        """
        needed = self._needed(batches, train) if batches and self.may_be_needed else []
        if not any(needed):
            return list(batches)
        row = self._made()
        given = [
            replace(batch, stand_in=row) if is_needed and not batch.has_images else batch
            for batch, is_needed in zip(batches, needed, strict=True)
        ]
        self._check_can_be_run(given)
        return given

    def forget_zeros(self) -> None:
        """No row of a window has a new image: its vision path has no gradient, rather than one of zeros.

        With zeros, weight decay and momentum would still change the weights. DeepSpeed has taken its step by now, and
        knows no parameter without a gradient.
        """
        visual = self._trainer.visual
        for parameter in (*self._visual_parameters(), *([] if visual is None else visual.parameters())):
            parameter.grad = None

    def _needed(self, batches: Sequence[Batch], train: bool) -> list[bool]:
        trainer = self._trainer
        if not trainer.is_sharded:
            return [train and self._ddp_waits_for_all()] * len(batches)
        if not train and not (trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled()):
            return [False] * len(batches)
        flags = torch.tensor(
            [[batch.has_images, batch.has_images and not batch.all_repeated] for batch in batches],
            device=trainer.accelerator.device,
        )
        anywhere, new = trainer.accelerator.gather(flags[None]).any(0).T
        if train and trainer.by_images_alone:
            if trainer.is_deepspeed_enabled and not new.any():
                raise PreflightError(
                    f"No row of step {trainer.state.global_step + 1} has an image, and the language model is frozen: "
                    "DeepSpeed would take a step with nothing to train. Give more rows an image, raise "
                    "training.gradient_accumulation_steps, or train with FSDP or plain data parallelism."
                )
            return [True] * len(batches)
        return anywhere.tolist()

    def _ddp_waits_for_all(self) -> bool:
        wrapped = self._trainer.model_wrapped
        if not isinstance(wrapped, DistributedDataParallel) or wrapped.find_unused_parameters:
            return False
        known = layout_of(self._trainer.model) is not None
        return not known or any(parameter.requires_grad for parameter in self._visual_parameters())

    def _visual_parameters(self) -> Iterator[nn.Parameter]:
        """As they are now, since FSDP replaces them; none of a family that is not known."""
        model = self._trainer.model
        if layout_of(model) is not None:
            yield from part_of(model, "vit").values()
            yield from part_of(model, "aligner").values()

    def _made(self) -> Batch:
        """On all ranks alike, so that all of them fail or none."""
        trainer, collator = self._trainer, self._trainer.data_collator
        if self._row is not None:
            return self._row
        try:
            student = multimodal(trainer.processing_class)
            if student is None or not student.placeholder:
                name = type(trainer.processing_class).__name__
                raise DataError(f"the processing class ({name}) makes no images, or has no token that stands for one")
            row = image_row(student, collator.of_teacher if isinstance(collator, Collator) else None)
        except DataError as error:
            raise _refusal(error) from error
        self._row = trainer.receiver.accept(trainer._prepare_inputs(row))
        return self._row

    def _check_can_be_run(self, batches: Sequence[Batch]) -> None:
        """On all ranks, though some of them have no stand-in: a family that cannot have one is refused by name."""
        failed: DataError | None = None
        try:
            for batch in batches:
                as_run(batch)
        except CannotShareError as error:
            failed = error
        if not self._trainer.is_sharded:
            if failed is not None:
                raise _refusal(failed) from failed
            return
        flag = torch.tensor([failed is not None], device=self._trainer.accelerator.device)
        if self._trainer.accelerator.gather(flag).any():
            raise _refusal(failed or "it cannot on another rank") from failed


def _refusal(reason: object) -> PreflightError:
    return PreflightError(
        "A batch has images on some ranks and none on others. The ranks without would run a small image that teaches "
        f"nothing, so that the others do not wait for ever, and here they cannot: {reason}. Give every row an image, "
        "raise training.per_device_train_batch_size, or train with plain data parallelism "
        "(ddp_find_unused_parameters: true)."
    )
