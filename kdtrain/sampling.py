"""The order in which the rows of an epoch are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.data.epochs import Epochs


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
