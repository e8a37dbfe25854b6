"""Which of a run's processes this one is, as its launcher wrote into the environment.

Known before torch is imported and before the processes have found each other. Where MPI is the launcher, accelerate
sets the same variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher of several processes sets for each."""


def under_launcher() -> bool:
    """Whether a launcher started this process as one of several, or as the only one."""
    return "RANK" in os.environ


def rank() -> int:
    """Number of this process among those of all machines, from 0."""
    return _number("RANK", 0)


def world_size() -> int:
    """Processes that the launcher has started, on all machines."""
    return _number("WORLD_SIZE", 1)


def _number(name: str, default: int) -> int:
    """What is no number is refused elsewhere, see `cli/meeting.py`: the message has to come out."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def is_main() -> bool:
    """Whether this is the process that writes the run's files and logs what holds for all ranks."""
    return rank() == 0


@contextmanager
def put_back() -> Iterator[None]:
    """Undo what is written over these variables inside: a later run in this process would take it for a launcher's."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
