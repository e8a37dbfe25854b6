"""How many steps a run has, and the order in which the rows of an epoch are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.data.epochs import Epochs


def planned_steps(args: Any, rows: int, ranks: int) -> int:
    """Optimizer steps of a run, as transformers counts them: every epoch ends with a window of its own.

    Args:
        args: training arguments.
        rows: of one epoch.
        ranks: processes.
    """
    if args.max_steps > 0:
        return int(args.max_steps)
    return math.ceil(args.num_train_epochs * steps_of_an_epoch(args, rows, ranks))


def steps_of_an_epoch(args: Any, rows: int, ranks: int) -> int:
    """Optimizer steps of one epoch; the last of them may have fewer rows."""
    batches = rows / (args.per_device_train_batch_size * ranks)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


class EpochSampler(Sampler[int]):
    """The rows of the epoch that was set last; all of them, in an order that seed and epoch decide.

    Args:
        epochs: which rows.
        shuffle: False leaves them in the order of the sources.
        seed: of the order.
    """

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
    """Tells a sampler which epoch begins, also one that is resumed in its middle."""

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._sampler.set_epoch(math.floor(state.epoch or 0))
