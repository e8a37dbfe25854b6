"""Every error that kdtrain raises on purpose, with the exit code it ends a run with.

Each message says what happened, where, and what to do. Anything else that escapes is a bug (exit code 1).

    KdtrainError                       1
    ├── ConfigError (ValueError)       2   the command line or the YAML file is wrong
    │   └── NotAvailableError          2   a documented option that this version does not implement yet
    ├── PreflightError (ValueError)    3   the config is fine, the world is not: files, devices, folders
    │   ├── DataError                  3   rows that cannot be trained on
    │   └── VocabularyError            3   student and teacher do not speak the same token ids
    ├── TeacherError                   4   the teacher did not answer, or answered nonsense
    │   └── TargetsError (ValueError)  4   its targets are no distributions
    ├── NonFiniteError                 5   NaN or infinity in a loss, a gradient or trained weights
    │   └── NonFiniteTargetsError      5   in a teacher's targets (ValueError)
    ├── CheckpointError                6   a checkpoint or the disk under it
    ├── LostRankError              1   another process of the run has ended
    └── Interrupted          128+signal   SIGINT, SIGTERM and others; while training the state was saved
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any


class KdtrainError(Exception):
    """Base of all errors raised on purpose."""

    exit_code: int = 1
    problems: tuple[Any, ...] = ()
    """The findings that it is made of, where a preflight has raised it; see `preflight/findings.py`."""


class ConfigError(KdtrainError, ValueError):
    """The command line or the config file is wrong. A `ValueError`, so that callers need not know kdtrain."""

    exit_code = 2


class NotAvailableError(ConfigError):
    """A documented option that this version does not implement: refused, never silently ignored."""


class PreflightError(KdtrainError, ValueError):
    """The config is well formed, but what it names cannot be used: a missing file, a full folder, a wrong device."""

    exit_code = 3


class DataError(PreflightError):
    """Rows that cannot be read, masked or tokenised, or no rows at all."""


class VocabularyError(PreflightError):
    """Student and teacher distributions are not over the same token ids."""


class TeacherError(KdtrainError):
    """The teacher failed while training."""

    exit_code = 4
    between_steps: bool = False
    """Whether all ranks raise it between two optimizer steps: the state can then be saved."""


class NonFiniteError(KdtrainError):
    """A loss or a gradient became NaN or infinite; raised before the optimizer step, so the weights are still good.

    Or the weights themselves, by the last step; raised before they are saved. Or what a model writes answers from.

    Args:
        facts: what `nonfinite.json` holds: `step`, `during`, `origin`, and of each bad rank its `micro_batches` with
            their rows and terms. The same on all ranks that raise it together.
    """

    exit_code = 5

    def __init__(self, message: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.facts = dict(facts or {})


class TargetsError(TeacherError, ValueError):
    """Targets that are no distributions over the student's tokens. A `ValueError`: they are arguments of the losses."""


class NonFiniteTargetsError(NonFiniteError, ValueError):
    """NaN or infinity in targets."""


class CheckpointError(KdtrainError):
    """A checkpoint that cannot be resumed from, or a disk that cannot be written to."""

    exit_code = 6


class LostRankError(KdtrainError):
    """Another process of the run has ended, so that this one cannot go on; why, that one knows."""


class Interrupted(KdtrainError):
    """The run was stopped by a signal, after its state was saved.

    Args:
        signum: the signal; the exit code is the shell's convention of 128 + signum.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum

    @property
    def signal_name(self) -> str:
        return signal.Signals(self.signum).name
