"""Which rows a run has trained, and which are left after a resume, whatever batch, accumulation and ranks are now.

Upstream skips as many batches as were trained, of today's size, and takes the same number of steps for the same rows.
Here the first epoch of a resumed run is read from the next row of its order, and the run ends after the row where it
would have ended; `max_steps` stays what it says, a number of steps.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.data.batch import Batch
from kdtrain.data.epochs import Epochs
from kdtrain.data.stream.rows import StreamedRows
from kdtrain.preflight.positions import tokens_of_rows
from kdtrain.ranks import is_main
from kdtrain.trainer.data_position import Dealing, Position, SavedPosition, read_position
from kdtrain.trainer.given_rows import is_stream
from kdtrain.trainer.row_order import ByLength, EpochSampler, RowOrder, StreamOrder, rows_per_batch

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """What is read of an epoch."""

    dealing: Dealing
    epoch: int
    begin: int
    end: int
    first_step: int
    """Steps that were taken before it."""

    @property
    def rows(self) -> int:
        return self.end - self.begin

    @property
    def is_whole(self) -> bool:
        return self.begin == 0 and self.end == self.dealing.rows

    def share(self, steps: int) -> float:
        """Of the epoch, after some steps of this part; as upstream counts it where batches end where they did."""
        dealing = self.dealing
        if self.begin % dealing.batch == 0 and self.end == dealing.rows:
            batches = min(steps * dealing.accumulation, dealing.batches(self.rows))
            return (self.begin // dealing.batch + batches) / max(dealing.batches(dealing.rows), 1)
        if self.end == dealing.rows and steps >= dealing.steps(self.rows):
            return 1.0  # the last rows may be left out
        return (self.begin + dealing.trained(self.rows, steps)) / dealing.rows


@dataclass(frozen=True)
class _Start:
    """Where a resumed run begins."""

    saved: SavedPosition
    position: Position
    end: Position | None
    """None where `max_steps` says it."""
    last_step: int


class RowProgress(TrainerCallback):
    """Deals the rows of a run to its steps, from wherever it begins."""

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        self.epochs: Epochs | None = None
        """What makes up each epoch, where that is not all of the training data."""
        self._start: _Start | None = None
        self._group: int | None = None  # rows of a group, where a run goes on that others were grouped for
        self._part = _Part(Dealing(0, 1, 1, False), 0, 0, 0, 0)
        self._stream_rows = 0  # that the run takes of a stream
        self._places: deque[Any] = deque(maxlen=2)  # where the last two windows of a stream can be read again from
        self.schedule_steps = 0
        """Steps of the schedule of learning rates."""

    # ---- what a run is made of ---------------------------------------------------------------------------------------

    @property
    def order(self) -> RowOrder:
        """Of today's options."""
        args, epochs = self._trainer.args, self.epochs
        seed = args.seed if args.data_seed is None else args.data_seed
        if is_stream(self._trainer.train_dataset):
            return StreamOrder(self._stream_rows or args.max_steps * self._rows_per_step, seed)
        rows = len(self._trainer.train_dataset) if epochs is None else epochs
        return RowOrder(rows, args.train_sampling_strategy != "sequential", seed, self._by_length)

    @property
    def _by_length(self) -> ByLength | None:
        if self._trainer.args.train_sampling_strategy != "group_by_length":
            return None
        return ByLength(self._lengths, self._group or self._rows_per_step)

    @cached_property
    def _lengths(self) -> np.ndarray:
        return tokens_of_rows(self._trainer.train_dataset)

    @property
    def _rows_per_step(self) -> int:
        return rows_per_batch(self._trainer) * self._trainer.args.gradient_accumulation_steps

    @property
    def dealing(self) -> Dealing:
        """Of today's options."""
        args = self._trainer.args
        batch, accumulation = rows_per_batch(self._trainer), args.gradient_accumulation_steps
        return Dealing(len(self.order), batch, accumulation, args.dataloader_drop_last)

    def new_sampler(self) -> EpochSampler:
        """What the data loader of a training reads its rows from."""
        batch = rows_per_batch(self._trainer)
        fills_up = batch > self._trainer._train_batch_size and not self._trainer.args.dataloader_drop_last
        return EpochSampler(self.order, batch if fills_up else 1)

    @property
    def rows_being_read(self) -> int:
        """Rows of what the data loader reads now, without those that fill up its last batch."""
        return self._part.rows

    # ---- going on ----------------------------------------------------------------------------------------------------

    def last_step(self, checkpoint: Path) -> int:
        """The step that a run ends with which goes on from a checkpoint."""
        return self._start_at(checkpoint).last_step

    def begin(self, checkpoint: str | None) -> None:
        """Training begins, from a checkpoint or from the first row."""
        self._start, self._group, self._stream_rows = None, None, 0
        self._places.clear()
        if checkpoint is not None and not self._trainer.args.ignore_data_skip:
            self._start = start = self._start_at(Path(checkpoint))
            self._group = start.saved.rows_per_group
            position = start.position
            self._part = _Part(self.dealing, position.epoch, position.row, self.dealing.rows, start.saved.step)
            self._say(start)
        self._begin_stream()

    def _begin_stream(self) -> None:
        """Let a stream begin where the run does."""
        rows = self._trainer.train_dataset
        if not is_stream(rows):
            return
        start = self._start
        self._stream_rows = self._rows_of_stream(start.saved) if start is not None else 0
        rows.length = len(self.order)
        if isinstance(rows, StreamedRows):
            rows.start_at(None if start is None else start.saved.stream)

    def _rows_of_stream(self, saved: SavedPosition) -> int:
        """The rows that the run will have taken at its end."""
        return saved.position.row + max(self._trainer.args.max_steps - saved.step, 0) * self._rows_per_step

    def note_window(self, batches: Sequence[Batch]) -> None:
        """Keep where the window that is about to train can be read again from."""
        if batches and batches[-1].rows.stream_place is not None:
            self._places.append(batches[-1].rows.stream_place)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say what was left out of a stream, which nobody knew before."""
        if self._places and is_main() and ((found := self._places[-1].so_far).bad or found.dropped):
            logger.warning(
                "Of %s rows that were read of the stream, %s were bad and %s too long: they were left out.",
                *(f"{count:,}" for count in (found.read, found.bad, found.dropped)),
            )

    def _start_at(self, checkpoint: Path) -> _Start:
        args, dealing = self._trainer.args, self.dealing
        saved = read_position(checkpoint, dealing)
        if is_stream(self._trainer.train_dataset):
            dealing = replace(dealing, rows=self._rows_of_stream(saved))
        epochs, same_rows = args.num_train_epochs, saved.rows_per_epoch == dealing.rows
        position = Position(saved.position.epoch, min(saved.position.row, dealing.rows))
        if args.max_steps > 0:
            end, last_step = None, args.max_steps
        else:
            end = saved.end if same_rows and saved.num_train_epochs == epochs else None
            end = end or dealing.end(epochs)
            last_step = saved.step + dealing.steps_between(position, end)
        at_its_end = end is not None and position.epoch == end.epoch
        if not at_its_end and not dealing.steps(dealing.rows - position.row):
            position = Position(position.epoch + 1)  # what is left of the epoch fills no batch
        return _Start(saved, position, end, last_step)

    @property
    def begins_within_an_epoch(self) -> bool:
        """Whether the part of an epoch that begins now is where a resumed run goes on, behind its first row."""
        start, part = self._start, self._part
        return start is not None and part.begin > 0 and part.epoch == start.position.epoch

    @property
    def first_epoch(self) -> int | None:
        """Of a resumed run."""
        return None if self._start is None else self._start.position.epoch

    @property
    def earlier_processes(self) -> int | None:
        """Those that wrote the checkpoint, where there are others now."""
        if self._start is None or self._start.saved.processes == self._trainer.args.world_size:
            return None
        return self._start.saved.processes

    def training_values(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Upstream's numbers of epochs (the first) and of steps (the last), of a run that goes on as well."""
        epochs, *between, steps = values
        self.schedule_steps = steps
        if (start := self._start) is None:
            return values
        steps = start.last_step
        if start.end is not None:
            epochs = start.end.epoch + (start.end.row > 0)
        else:
            left = max(steps - start.saved.step, 0) - self.dealing.steps(self.dealing.rows - start.position.row)
            per_epoch = max(self.dealing.steps(self.dealing.rows), 1)
            epochs = start.position.epoch + 1 + max(math.ceil(left / per_epoch), 0)
        return (epochs, *between, steps)

    # ---- an epoch ----------------------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: int, loader: Any) -> dict[str, int]:
        """Let the data loader read an epoch, from where the run goes on.

        Returns:
            what upstream's loop is told of a part of an epoch: its micro-batches and steps.
        """
        dealing, start = self.dealing, self._start
        begin, end = 0, dealing.rows
        if start is not None and epoch == start.position.epoch:
            begin = start.position.row
        if start is not None and start.end is not None and start.end.row and epoch == start.end.epoch:
            end = start.end.row
        self._part = part = _Part(dealing, epoch, begin, end, self._trainer.state.global_step)
        batches = loader.batch_sampler
        getattr(batches, "batch_sampler", batches).sampler.read(epoch, begin, end)
        if part.is_whole:
            return {}
        return {
            "steps_in_epoch": dealing.batches(part.rows),
            "num_update_steps_per_epoch": dealing.steps(part.rows),
        }

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the epoch right: upstream takes a part of one for a whole one."""
        if not self._part.is_whole:
            state.epoch = self._part.epoch + self._part.share(state.global_step - self._part.first_step)

    # ---- a checkpoint ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write where the run stands into a checkpoint."""
        args, dealing = self._trainer.args, self.dealing
        end = None
        if args.max_steps <= 0:
            end = dealing.end(args.num_train_epochs) if self._start is None else self._start.end
        position = self._next()
        if is_stream(self._trainer.train_dataset):  # its end is the run's, which may become longer
            position = Position(0, self._part.end) if position.epoch else position
        SavedPosition(
            position=position,
            rows_per_epoch=dealing.rows,
            seed=self.order.seed,
            rows_per_step=dealing.step,
            processes=args.world_size,
            step=self._trainer.state.global_step,
            end=end,
            num_train_epochs=None if end is None else args.num_train_epochs,
            stream=self._stream_place(position.row),
            rows_per_group=None if (by_length := self._by_length) is None else by_length.group,
        ).write(folder)

    def _stream_place(self, row: int) -> dict[str, Any] | None:
        """The last one at or before a row: a window that was read need not have been trained."""
        found = next((place for place in reversed(self._places) if place.row <= row), None)
        if found is not None:
            return found.as_json()
        return None if self._start is None else self._start.saved.stream

    def _next(self) -> Position:
        part, state = self._part, self._trainer.state
        steps = state.global_step - part.first_step
        control = self._trainer.control
        ends_early = control.should_epoch_stop and not control.should_training_stop  # the run goes on with the next one
        if ends_early or steps >= part.dealing.steps(part.rows):
            return Position(part.epoch + 1) if part.end == part.dealing.rows else Position(part.epoch, part.end)
        return Position(part.epoch, part.begin + part.dealing.trained(part.rows, steps))

    # ---- the schedule of learning rates ------------------------------------------------------------------------------

    @property
    def schedule_step(self) -> int | None:
        """Where a resumed run begins in it: as many steps before its end as the run is; None where it stood."""
        start, state = self._start, self._trainer.state
        if start is None or start.saved.rows_per_step == self.dealing.step:
            return None
        return max(self.schedule_steps - (state.max_steps - state.global_step), 0)

    # ---- what is said of it ------------------------------------------------------------------------------------------

    def _say(self, start: _Start) -> None:
        if not is_main():
            return
        saved, dealing, order = start.saved, self.dealing, self.order
        if is_stream(self._trainer.train_dataset):
            if saved.seed not in (None, order.seed):
                logger.warning("The seed is %d, and the stream keeps the order of seed %s.", order.seed, saved.seed)
        elif saved.rows_per_epoch != dealing.rows or saved.seed not in (None, order.seed):
            logger.warning(
                "The order of rows is another one than before (%d rows of seed %s, now %d of seed %d): of this epoch "
                "some rows may be trained twice, and others not at all.",
                saved.rows_per_epoch, saved.seed, dealing.rows, order.seed,
            )  # fmt: skip
        if saved.rows_per_step not in (None, dealing.step):
            where = f"epoch {start.position.epoch + 1}, row {start.position.row + 1} of {dealing.rows}"
            ends = "the run ends after the same rows" if start.end else "max_steps stays a number of steps"
            logger.warning(
                "A step has %d rows, and had %d: the run goes on at the next row (%s), with step %d of %d; %s.",
                dealing.step, saved.rows_per_step, where, saved.step + 1, start.last_step, ends,
            )  # fmt: skip
        if saved.processes != self._trainer.args.world_size:
            logger.warning(
                "%d processes wrote the checkpoint, and there are %d: their random numbers (dropout) begin anew, from "
                "seed, step and process.",
                saved.processes, self._trainer.args.world_size,
            )  # fmt: skip
