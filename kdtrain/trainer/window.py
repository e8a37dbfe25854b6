"""An optimizer window: the batches between two steps, and what is known of all of them together.

Everything is decided here once, for all micro-batches and ranks alike, before the first forward: which rows count, who
writes the answers, and D, the number of supervised tokens that the loss is divided by.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from kdtrain.config.options import DistillationOptions, TokenSelection
from kdtrain.data.batch import Batch, received, right_padded
from kdtrain.data.collate import Collator
from kdtrain.data.visual_batch import cut_rows
from kdtrain.errors import DataError
from kdtrain.host import send
from kdtrain.preflight.token_ids import check_batch
from kdtrain.ranks import is_main
from kdtrain.trainer import argument_checks
from kdtrain.trainer.answers import answered, dealt, new_tokens, writer_of
from kdtrain.trainer.forwards import laid_out
from kdtrain.trainer.objective import weighted_chunks
from kdtrain.trainer.selection import select, selects
from kdtrain.trainer.token_selection import num_kd_tokens

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """What holds for all micro-batches of an optimizer step."""

    options: DistillationOptions | None
    """As they were when it began: what a callback changes holds from the next window. None when it is done."""
    has_new_images: bool
    """Whether a row has an image and is not there only to fill up an epoch; see `_some_new_image`."""
    on_policy: bool
    """Whether the student has written its answers."""
    weighs_tokens: bool = False
    """Whether tokens may count in the divergence by weights of their own, or not all are chosen, on any rank;
    or the teacher has another tokenizer, whose chunks are counted."""
    num_kd_items: torch.Tensor | None = None
    """D_kd, the supervised tokens that count in the divergence, where these may be others than D; None is D."""
    aux_share: torch.Tensor | float = 1.0
    """A micro-batch's share of the experts' load-balancing loss, a mean over the window's micro-batches."""


class Receiver:
    """Takes in what the data loader gives.

    Args:
        accepted: what the student's forward takes, of `forward_names`.
        embeddings: rows of the embedding of "student" and "teacher", where ids of batches have to be checked.
    """

    def __init__(
        self, trainer: GKDTrainerWithMetrics, accepted: frozenset[str] | None, embeddings: Mapping[str, int] | None
    ) -> None:
        self._trainer, self._accepted, self._embeddings = trainer, accepted, embeddings
        self._rows = self._truncated = 0
        self._told_of_several = False

    def accept(self, batch: Batch | Mapping[str, Any]) -> Batch:
        """A batch without what the student's forward does not take."""
        return received(batch, self._accepted)

    def receive(self, batch: Batch, epoch_rows: int, *, train: bool) -> Batch:
        """A batch of any collator, without the rows that are repeated at the end of an epoch of `epoch_rows`."""
        trainer, args = self._trainer, self._trainer.args
        batch = self.accept(batch)
        if not isinstance(trainer.data_collator, Collator):  # a caller may replace it at any time
            batch = right_padded(batch)  # reads the mask, which a GPU would have to wait for
        if train:
            self._warn_of_several(batch)
        if not (train and args.dataloader_drop_last):
            size = trainer._train_batch_size if train else args.eval_batch_size
            batch = _without_repeated_rows(batch, trainer.accelerator, epoch_rows, size)
        self.check_ids(batch)
        return batch

    def check_ids(self, batch: Batch) -> None:
        """Refuse token ids that an embedding lacks, where rows are tokenised while training."""
        if self._embeddings is not None:
            check_batch(batch, self._embeddings)

    def _warn_of_several(self, batch: Batch) -> None:
        """Say once that rows of the data set become several of a batch, which takes more memory than was asked for."""
        places = batch.rows.places or ()
        if not self._told_of_several and len(set(places)) < len(places):
            self._told_of_several = True
            logger.warning(
                "Some conversations become several rows, one for each answer: batches have more rows than "
                "per_device_train_batch_size (%d). Lower it if they do not fit into memory.",
                self._trainer.args.per_device_train_batch_size,
            )

    def count_truncated(self, batches: Sequence[Batch]) -> None:
        """Count the rows of a window that were cut at `max_length`; the first is warned of."""
        self._rows += sum(len(batch) for batch in batches)
        truncated = sum(sum(batch.rows.truncated) for batch in batches)
        if truncated and not self._truncated:
            logger.warning(
                "Rows longer than max_length (%s tokens) are cut from the right.", self._trainer.args.max_length
            )
        self._truncated += truncated

    def start_counting(self) -> None:
        """Forget the truncated rows of an earlier training."""
        self._rows = self._truncated = 0

    def warn_of_truncated(self) -> None:
        """Say how many truncated rows there were on all ranks; a collective."""
        accelerator, max_length = self._trainer.accelerator, self._trainer.args.max_length
        own = torch.tensor([self._truncated, self._rows], device=accelerator.device)
        truncated, rows = accelerator.reduce(own).tolist()
        if truncated and is_main():
            logger.warning("%d of %d rows were cut at max_length (%s tokens).", truncated, rows, max_length)


def _without_repeated_rows(batch: Batch, accelerator: Accelerator, epoch_rows: int, batch_size: int) -> Batch:
    """Cut off the rows that accelerate repeats to fill the last batch of an epoch: no row may count twice.

    Ranks take the last rows in order, so only the first `remainder` of them, counted over the ranks, are new. A rank
    that has none of them keeps one row, without labels, so that it takes part in the same collectives as the others.
    """
    ranks = accelerator.num_processes
    if ranks == 1 or not accelerator.gradient_state.end_of_dataloader:
        return batch
    # Not gradient_state.remainder: accelerate does not know it in an epoch that is resumed in its middle.
    remainder = epoch_rows % (batch_size * ranks)
    new = min(max(remainder - accelerator.process_index * batch_size, 0), batch_size)
    if remainder == 0 or new == batch_size:
        return batch
    if batch.rows.places is not None:  # the collator has dropped rows or made several of one, new or repeated
        new = sum(place < new for place in batch.rows.places)
    elif new > 0 and len(batch) != batch_size:
        raise DataError(
            f"The last batch of an epoch has {batch_size - new} repeated rows of {batch_size} to leave out, and "
            f"the collator made {len(batch)} of them (packing?): it is not known which they are. "
            f"Set training.dataloader_drop_last: true, or give a multiple of {batch_size * ranks} rows."
        )
    batch = cut_rows(batch, max(new, 1))
    return batch if new else replace(batch.without_labels(), all_repeated=True)


def options_of_window(trainer: GKDTrainerWithMetrics) -> DistillationOptions:
    """The options as they are now. Callbacks set them at any time: each window checks them again, before any work."""
    options = trainer.options.checked()
    argument_checks.check_options(trainer, options)
    argument_checks.check_sampler(trainer.sampler, options)
    argument_checks.check_same_on_all_ranks(options, trainer.accelerator)
    return options


def collect(
    trainer: GKDTrainerWithMetrics, batches: list[Batch], options: DistillationOptions, device: torch.device
) -> tuple[list[Batch], Window]:
    """Decide who writes the window's answers, have them written, and find what holds for all of its batches.

    Args:
        batches: this rank's, as received.
        options: of `options_of_window`.
    """
    trainer.receiver.count_truncated(batches)
    if trainer.is_sharded:  # before answers are written: that is a forward too
        batches = trainer.stand_ins.give(batches, train=True)
    writer = writer_of(trainer, options, trainer.state.global_step)
    selected = writer == "student" and selects(options)
    if writer is not None:
        batches = answered(trainer, batches, writer, options)
        if writer == "student":
            trainer.samples.note(batches, new_tokens(trainer, options))
        if selected:
            trainer.completions.will_select(batches)
        if selected:
            batches = select(trainer, batches, options)
        elif not trainer.layout.changes:
            batches = dealt(trainer, batches)
    if not trainer.is_sharded:  # rows with images may have gone to other batches
        batches = trainer.stand_ins.give(batches, train=True)
    if writer is not None or not trainer.read_ahead.is_laid_out:
        batches = laid_out(trainer, batches)
    new_images = _some_new_image(trainer, batches)
    if trainer.visual is not None:
        trainer.visual.count(batches)
    for term in trainer.feature_terms:
        term.begin_window()
    share = _aux_share(trainer, batches, device) if trainer.has_aux_loss else 1.0
    weighs = trainer.rows_may_weigh or options.selection is not None or options.crosses_tokenizers
    weighs = weighs or (selected and options.select == "weighted")
    return batches, Window(options, new_images, writer == "student", weighs and options.lm_kd_active, aux_share=share)


def num_supervised(
    batches: Sequence[Batch], selection: TokenSelection | None, accelerator: Accelerator, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """D and D_kd: the supervised tokens of the window's micro-batches on all ranks, scalars; a collective.

    D_kd has those whose weight in the divergence is above 0, and of these as many as will be chosen;
    of a teacher with another tokenizer chunks.
    """
    own = torch.zeros(2, dtype=torch.int64)
    for batch in batches:
        own += torch.stack([batch.num_supervised, _kd_items(batch, selection)])
    all_tokens, kd_tokens = accelerator.gather(send(own[None], device)).sum(0)
    return all_tokens, kd_tokens


def _kd_items(batch: Batch, selection: TokenSelection | None) -> torch.Tensor:
    return num_kd_tokens(batch, selection) if batch.num_chunks is None else weighted_chunks(batch)


def _some_new_image(trainer: GKDTrainerWithMetrics, batches: Sequence[Batch]) -> bool:
    """Whether a row has an image that is not there only to fill up an epoch; on any rank, where it is asked.

    It is asked where nothing else is trained, for a window without one is then no step for the optimizer; and where
    ranks may have run images that teach nothing.
    """
    own = any(batch.has_images and not batch.all_repeated for batch in batches)
    if not (trainer.by_images_alone or trainer.stand_ins.may_be_needed):
        return own
    if trainer.accelerator.num_processes == 1:
        return own
    return bool(trainer.accelerator.gather(torch.tensor([own], device=trainer.accelerator.device)).any())


def _aux_share(trainer: GKDTrainerWithMetrics, batches: Sequence[Batch], device: torch.device) -> torch.Tensor:
    """What each micro-batch counts in the window's mean of load-balancing losses; those without new rows are none."""
    new = send(torch.tensor([sum(not batch.all_repeated for batch in batches)]), device)
    return trainer.get_tp_size() / trainer.accelerator.gather(new).sum().clamp(min=1)
