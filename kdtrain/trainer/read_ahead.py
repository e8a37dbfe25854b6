"""Windows that are read before it is their turn, so that a teacher can be asked for their targets meanwhile.

Nothing that is trained depends on it: which rows a window has is decided by the data loader, and all else (options, who
writes the answers, D) when the window trains. A checkpoint counts the windows that were trained; after a resume those
that had only been read are read again.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.trainer.answers import writer_of
from kdtrain.trainer.forwards import laid_out
from kdtrain.trainer.given_rows import is_stream
from kdtrain.trainer.teacher_failures import row_errors_on_all_ranks

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics


@dataclass(frozen=True)
class _Read:
    """A window as the data loader gave it."""

    batches: list[Batch]
    prepared: bool
    """Whether the teacher was told of it ahead: then its rows lie as they will train."""
    micro_batches: int
    """As upstream counts them."""


class ReadAhead:
    """Reads the windows of an epoch, and tells the teacher of each one once.

    Up to `lookahead` windows of the same epoch are read ahead, never past the last step. Those that the teacher or the
    student will write answers for are told to the teacher when they have them. Whether they will is seen from seed and
    step; where a callback has changed `lmbda` or `seq_kd` since, the window is told of when it trains, as it is then.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        self._iterator: Iterator[Any] = iter(())
        self._waiting: deque[_Read] = deque()
        self._taken = _Read([], prepared=False, micro_batches=0)
        self.lookahead = 0 if trainer.teacher is None else trainer.teacher.lookahead
        """Windows; see `Teacher.lookahead`."""

    def forget(self) -> None:
        """Drop what was read and not trained."""
        self._iterator = iter(())
        self._waiting.clear()

    def last_again(self) -> Iterator[Any]:
        """Put the window that was taken last back; what it can be taken from once more."""
        self._waiting.appendleft(self._taken)
        return self._iterator

    @property
    def is_laid_out(self) -> bool:
        """Whether the rows of the window that was taken last lie as they train, see `forwards.py`."""
        return self._taken.prepared

    @property
    def micro_batches(self) -> int:
        """Of the window that was taken last, as upstream counts them."""
        return self._taken.micro_batches

    @property
    def last_batches(self) -> list[Batch]:
        """Of the window that was taken last, as received."""
        return self._taken.batches

    def take(self, epoch_iterator: Iterator[Any], num_batches: int) -> list[Batch]:
        """The window whose turn it is, as received: `num_batches` of them, or fewer where the epoch ends."""
        if epoch_iterator is not self._iterator:  # an epoch may end early
            self.forget()
            self._iterator = epoch_iterator
        if not self._waiting:
            received = self._read(self._received(num_batches))
            self._waiting.append(_Read(received, prepared=False, micro_batches=len(received)))
        self._taken = self._waiting.popleft()
        return self._taken.batches

    def prepare(self, batches: Sequence[Batch], options: DistillationOptions) -> None:
        """Tell the teacher of the window that trains now, unless that was done ahead, and of the next ones.

        Args:
            batches: of this window, with the answers that it trains on, and maybe with targets already.
            options: of this window.
        """
        trainer = self._trainer
        assert trainer.teacher is not None
        step = trainer.state.global_step
        asked = bool(batches) and all(batch.targets is not None for batch in batches)
        if not asked and (not self._taken.prepared or writer_of(trainer, options, step) is not None):
            trainer.teacher.prepare(batches)
        steps_left = trainer.state.max_steps - step - 1
        while len(self._waiting) < min(self.lookahead, steps_left):
            if not (following := self._read(self._until_the_end(trainer.args.gradient_accumulation_steps))):
                break
            is_data = writer_of(trainer, options, step + 1 + len(self._waiting)) is None
            count = len(following)
            if is_data:
                following = laid_out(trainer, following)
                trainer.teacher.prepare(following)
            self._waiting.append(_Read(following, prepared=is_data, micro_batches=count))

    def _read(self, batches: Iterator[Batch]) -> list[Batch]:
        """A window as it is received. A row of a stream that one rank cannot use ends all of them, in the same step."""
        trainer = self._trainer
        if not is_stream(trainer.train_dataset) or trainer.accelerator.num_processes == 1:
            return list(batches)
        with row_errors_on_all_ranks(trainer.accelerator):
            found = list(batches)
        return found

    def _received(self, count: int) -> Iterator[Batch]:
        """Each batch is received as soon as it is read: what the loader says of the end holds for the last one read."""
        trainer, rows = self._trainer, self._trainer.rows.rows_being_read
        for batch in itertools.islice(self._iterator, count):
            yield trainer.receiver.receive(trainer._prepare_inputs(batch), rows, train=True)

    def _until_the_end(self, count: int) -> Iterator[Batch]:
        """As many, but the loader is not asked for more than it has: it would take the epoch for finished."""
        for _ in range(count):
            if self._trainer.accelerator.gradient_state.end_of_dataloader:
                return
            yield from self._received(1)
