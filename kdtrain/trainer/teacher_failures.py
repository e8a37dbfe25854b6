"""What fails one rank: all of them stop, and between two steps, so that the state can be saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from kdtrain.errors import DataError, TeacherError


@contextmanager
def raised_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Run what asks the teacher before a window's first forward; a collective.

    Without this, the other ranks would wait for the gradients of the one that has failed.

    Raises:
        TeacherError: it failed this rank, or another one; with `between_steps`.
    """
    error = None
    try:
        yield
    except TeacherError as raised:
        error = raised
    any_failed = error is not None
    if accelerator.num_processes > 1:  # one process need not wait for its device to know
        failed = torch.tensor([any_failed], device=accelerator.device)
        any_failed = bool(accelerator.gather(failed).any())
    if any_failed:
        error = error or TeacherError("The teacher failed another rank, whose message says how.")
        error.between_steps = True
        raise error


@contextmanager
def row_errors_on_all_ranks(accelerator: Accelerator) -> Iterator[None]:
    """Read the rows of a window; a collective.

    Raises:
        DataError: a row cannot be used, of this rank or another one.
    """
    error = None
    try:
        yield
    except DataError as raised:
        error = raised
    failed = torch.tensor([error is not None], device=accelerator.device)
    if bool(accelerator.gather(failed).any()):
        raise error or DataError("A row of another process cannot be used; its message says which.")
