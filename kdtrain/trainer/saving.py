"""Saving a checkpoint: on all ranks, or an error on all of them.

Upstream's `_save_checkpoint` is a row of writes with collectives between them. A rank that leaves it with an error,
because its disk is full, would let the others wait in the next collective. Here an error of a write is kept until all
ranks have come through, and then all of them raise.

Where FSDP or DeepSpeed write pieces, their own collectives are in between, and an error is raised where it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kdtrain.errors import CheckpointError
from kdtrain.ranks import is_main
from kdtrain.trainer.guard import local_part

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

# What the disk raises, by open(), safetensors and torch.save.
_OF_WRITING = (OSError, SafetensorError, RuntimeError)


class CheckpointHooks(Protocol):
    """What is done around a save, on the rank that writes: see `runs/rotation.py`."""

    def begin(self, checkpoint: Path) -> None:
        """Before the first file, and before another rank writes one."""

    def finish(self, checkpoint: Path, finite: bool, best: str | None) -> None:
        """When all files of all ranks are there.

        Args:
            finite: whether the optimizer's state is, on all ranks.
            best: folder name of the checkpoint with the best metric.
        """

    def why_no_model(self, checkpoint: Path) -> str | None:
        """Why the model of a checkpoint cannot be loaded for the one that was saved, as an error's message."""


class Saving:
    """A trainer's saves."""

    def __init__(self, trainer: GKDTrainerWithMetrics) -> None:
        self._trainer = trainer
        self.hooks: CheckpointHooks | None = None
        """They rotate old checkpoints too; None leaves that to upstream."""
        self._under_way = False
        self._error: BaseException | None = None
        self._push: Callable[[], None] | None = None

    def checkpoint(self, save: Callable[[], None]) -> None:
        """Save a checkpoint by upstream's function; a collective.

        Raises:
            CheckpointError: another rank could not write; the rank itself raises what it met.
        """
        args, limit = self._trainer.args, self._trainer.args.save_total_limit
        self._error, self._push, self._under_way = None, None, True
        if self.hooks is not None:
            args.save_total_limit = None  # upstream would rotate before the manifest stands
        try:
            with self._kept(OSError):
                save()
        finally:
            args.save_total_limit, self._under_way = limit, False
        self._raise_together()
        if self.hooks is not None:
            [unsound] = self._on_any_rank(not _is_finite(self._trainer.optimizer))
            with self._kept(*_OF_WRITING):
                self._finish(self.hooks, finite=not unsound)
            self._raise_together()
        if self._push is not None:
            self._push()

    def part(self, write: Callable[..., Any], *args: Any) -> None:
        """Write a part of a checkpoint, unless one before it failed; outside of a checkpoint, just write."""
        if not self._under_way:
            write(*args)
        elif self._error is None:
            with self._kept(*_OF_WRITING):
                write(*args)

    def push_when_complete(self, push: Callable[[], None]) -> None:
        """Send a checkpoint to the hub, once it has all its files."""
        self._push = push

    def check_model(self, checkpoint: str | Path) -> None:
        """Refuse to load a model that is not as it was saved; a collective.

        Raises:
            CheckpointError: on all ranks.
        """
        if self.hooks is None:
            return
        [reason] = broadcast_object_list([self.hooks.why_no_model(Path(checkpoint)) if is_main() else None])
        if reason is not None:
            raise CheckpointError(reason)

    def begin(self, checkpoint: str | Path) -> None:
        """Make way for a checkpoint, before any rank writes; a collective."""
        if self.hooks is None or not self._under_way:
            return
        if self._trainer.args.should_save:
            self.part(self.hooks.begin, Path(checkpoint))
        self._trainer.accelerator.wait_for_everyone()

    def _finish(self, hooks: CheckpointHooks, finite: bool) -> None:
        args, state = self._trainer.args, self._trainer.state
        if args.should_save:
            best = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
            checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            hooks.finish(checkpoint, finite=finite, best=best)

    @contextmanager
    def _kept(self, *kinds: type[BaseException]) -> Iterator[None]:
        try:
            yield
        except kinds as error:
            if self._trainer.is_sharded and self._under_way:
                raise
            self._error = error

    def _raise_together(self) -> None:
        """Raise on all ranks where one of them has failed."""
        [failed] = self._on_any_rank(self._error is not None)
        if not failed:
            return
        said = [str(self._error) or type(self._error).__name__] if self._error is not None else []
        if self._trainer.accelerator.num_processes > 1:
            said = gather_object(said)
        if self._error is not None:
            raise self._error
        raise CheckpointError(f"Another rank could not write its part of a checkpoint: {said[0]}")

    def _on_any_rank(self, *flags: bool) -> list[bool]:
        accelerator = self._trainer.accelerator
        if accelerator.num_processes == 1:
            return list(flags)
        gathered = accelerator.gather(torch.tensor([flags], device=accelerator.device))
        return [bool(flag) for flag in gathered.any(dim=0)]


def _is_finite(optimizer: Any) -> bool:
    """Whether what an optimizer remembers is; this rank's part of it."""
    states = getattr(optimizer, "state", None) or {}
    tensors = (value for state in states.values() if isinstance(state, dict) for value in state.values())
    return all(bool(torch.isfinite(local_part(t)).all()) for t in tensors if _is_number(t))


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor | nn.Parameter) and value.is_floating_point()
