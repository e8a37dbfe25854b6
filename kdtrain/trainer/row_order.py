"""In which order the rows of an epoch are read, and how many optimizer steps they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Sampler
from transformers import Trainer

from kdtrain.data.epochs import Epochs

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


def planned_steps(trainer: GKDTrainerWithMetrics, rows: int) -> tuple[int, int]:
    """Optimizer steps of a run that begins at its first row, and those of an epoch of so many rows.

    The last step of an epoch may have fewer rows. Upstream counts them, from the length of a data loader alone: making
    one would not be free of consequences. Of a run that goes on see `RowProgress.last_step`.
    """
    batches = rows / rows_per_batch(trainer)
    length = math.floor(batches) if trainer.args.dataloader_drop_last else math.ceil(batches)
    _, per_epoch, *_, steps = Trainer.set_initial_training_values(trainer, trainer.args, range(length))
    return steps, per_epoch


def rows_per_batch(trainer: GKDTrainerWithMetrics) -> int:
    """Rows of one micro-batch on all ranks together."""
    return trainer._train_batch_size * (trainer.accelerator.num_processes // trainer.get_tp_size())


class RowOrder:
    """The rows of each epoch in the order in which they are trained: a function of seed and epoch alone.

    Args:
        rows: of the data set, all of which make up an epoch; or what makes up each one.
        shuffle: False is the order of the sources.
    """

    def __init__(self, rows: int | Epochs, shuffle: bool, seed: int) -> None:
        self._rows, self._shuffle, self.seed = rows, shuffle, seed

    def __len__(self) -> int:
        return self._rows if isinstance(self._rows, int) else len(self._rows)

    def of(self, epoch: int) -> Sequence[int]:
        """Row numbers of an epoch, counted from 0."""
        own = self._rows
        rows = torch.arange(own) if isinstance(own, int) else torch.from_numpy(own.rows(epoch))
        if self._shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            rows = rows[torch.randperm(len(rows), generator=generator)]
        found: list[int] = rows.tolist()
        return found


class StreamOrder(RowOrder):
    """Rows that come in the order in which they are trained: one epoch of as many as the run takes."""

    def __init__(self, rows: int, seed: int) -> None:
        super().__init__(rows, False, seed)

    def of(self, epoch: int) -> Sequence[int]:
        """All numbers; no list of them, which would take memory."""
        return range(len(self))


class EpochSampler(Sampler[int]):
    """What a data loader reads of an epoch: its order from one row to another.

    Behind the last row come rows of the epoch's beginning until the ranks have equal batches, as accelerate would add
    them; `Receiver` leaves them out again. accelerate itself would take them from where a resumed run begins, and the
    widths of its batches would be others than those of the run that was not interrupted.

    Args:
        multiple: rows of a micro-batch on all ranks together; 1 adds none.
    """

    def __init__(self, order: RowOrder, multiple: int) -> None:
        self._order, self._multiple = order, multiple
        self.read(0)

    def read(self, epoch: int, begin: int = 0, end: int | None = None) -> None:
        """Set what is read next: rows `begin` up to `end` of an epoch; None is its end."""
        self._epoch, self._begin = epoch, begin
        self._end = len(self._order) if end is None else end

    @property
    def new_rows(self) -> int:
        """Rows that are read, without those that are added."""
        return self._end - self._begin

    def __len__(self) -> int:
        return self.new_rows + self._missing

    def __iter__(self) -> Iterator[int]:
        rows = self._order.of(self._epoch)
        return chain(rows[self._begin : self._end], islice(cycle(rows), self._missing))

    @property
    def _missing(self) -> int:
        return -self.new_rows % self._multiple
