"""In which order the rows of an epoch are read, and how many optimizer steps they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import Trainer

from kdtrain.data.epochs import Epochs

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

_GROUPS_TOGETHER = 50


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


@dataclass(frozen=True)
class ByLength:
    """Steps whose rows are of like length (`train_sampling_strategy: group_by_length`)."""

    lengths: np.ndarray
    """Tokens of each row of the data set."""
    group: int
    """Rows of a step; of a resumed run those of the steps that it began with."""


class RowOrder:
    """The rows of each epoch in the order in which they are trained: a function of seed and epoch alone.

    Args:
        rows: of the data set, all of which make up an epoch; or what makes up each one.
        shuffle: False is the order of the sources.
        by_length: of shuffled rows: those of a step are of like length. A function of the lengths, too.
    """

    def __init__(self, rows: int | Epochs, shuffle: bool, seed: int, by_length: ByLength | None = None) -> None:
        self._rows, self._shuffle, self.seed, self._by_length = rows, shuffle, seed, by_length

    def __len__(self) -> int:
        return self._rows if isinstance(self._rows, int) else len(self._rows)

    def of(self, epoch: int) -> Sequence[int]:
        """Row numbers of an epoch, counted from 0."""
        own = self._rows
        rows = torch.arange(own) if isinstance(own, int) else torch.from_numpy(own.rows(epoch))
        if self._shuffle:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            rows = rows[torch.randperm(len(rows), generator=generator)]
            if self._by_length is not None:
                rows = _grouped(rows, self._by_length, generator)
        found: list[int] = rows.tolist()
        return found


class StreamOrder(RowOrder):
    """Rows that come in the order in which they are trained: one epoch of as many as the run takes."""

    def __init__(self, rows: int, seed: int) -> None:
        super().__init__(rows, False, seed)

    def of(self, epoch: int) -> Sequence[int]:
        """All numbers; no list of them, which would take memory."""
        return range(len(self))


def _grouped(rows: torch.Tensor, by_length: ByLength, generator: torch.Generator) -> torch.Tensor:
    """Shuffled rows in groups of like length, the longest of a group first, so that its batches are of like length too.

    Groups are made of a few hundred rows each time, so that which rows meet is another in every epoch, and come in any
    order; but the one with the longest row is first: what does not fit into memory is seen at once. The last group of
    an epoch, which may be smaller, is rows of any length.
    """
    size = by_length.group
    whole = len(rows) // size * size
    lengths = torch.from_numpy(by_length.lengths)[rows]
    longest_first = [
        part[lengths[part].argsort(descending=True, stable=True)]
        for part in (*torch.arange(whole).split(_GROUPS_TOGETHER * size), torch.arange(whole, len(rows)))
    ]
    places = torch.cat(longest_first)
    groups = places[:whole].view(-1, size)
    if len(groups):
        groups = groups[torch.randperm(len(groups), generator=generator)]
        first = int(lengths[groups[:, 0]].argmax())
        groups = torch.cat([groups[first : first + 1], groups[:first], groups[first + 1 :]])
    return rows[torch.cat([groups.flatten(), places[whole:]])]


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
