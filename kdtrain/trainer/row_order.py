"""How many optimizer steps a run has, and in which order the rows of an epoch are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.data.epochs import Epochs

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


def planned_steps(trainer: GKDTrainerWithMetrics, rows: int) -> tuple[int, int]:
    """Optimizer steps that `train` takes in all, and in an epoch of so many rows, whose last step may have fewer.

    Upstream counts them, from the length of a data loader alone: making one would not be free of consequences.
    """
    batches = rows / rows_per_batch(trainer)
    length = math.floor(batches) if trainer.args.dataloader_drop_last else math.ceil(batches)
    _, per_epoch, *_, steps = trainer.set_initial_training_values(trainer.args, range(length))
    return steps, per_epoch


def rows_per_batch(trainer: GKDTrainerWithMetrics) -> int:
    """Rows of one micro-batch on all ranks together."""
    return trainer._train_batch_size * (trainer.accelerator.num_processes // trainer.get_tp_size())


class EpochSampler(Sampler[int]):
    """The rows of the epoch that was set last: in the order of the sources, or in one that seed and epoch decide."""

    def __init__(self, epochs: Epochs, shuffle: bool, seed: int) -> None:
        self._epochs, self._shuffle, self._seed = epochs, shuffle, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """To be called before each epoch is read."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._epochs)

    def __iter__(self) -> Iterator[int]:
        rows = torch.from_numpy(self._epochs.rows(self._epoch))
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed + self._epoch)
            rows = rows[torch.randperm(len(rows), generator=generator)]
        return iter(rows.tolist())


class SetEpoch(TrainerCallback):
    """Gives a sampler the number of each epoch that begins.

    Upstream does so too, but on several ranks its call does not reach the sampler where an epoch is resumed in its
    middle: the run would go on with the rows of the first epoch.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._sampler.set_epoch(math.floor(state.epoch or 0))
