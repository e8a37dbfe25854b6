"""What a server really does, found out with a few requests before anything is trained on its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdtrain.config.tree import Problem
from kdtrain.teachers.served import ServedTeacher


@dataclass(frozen=True)
class ProbeResult:
    """What was found out."""

    findings: list[Problem]
    """Errors, warnings, and level "info" for what is as it should be."""
    route: str | None
    """How tokens are scored; None where the server cannot."""
    api: str
    """`completions` or `chat`: how answers are written."""
    writes_targets: bool
    """Whether an answer comes with its targets."""
    tokens_per_second: float


def probe(teacher: ServedTeacher, rows: Sequence[Sequence[int]], tokenizer: Any, *, scores: bool) -> ProbeResult:
    """Ask the server for what is known already, and compare.

    Args:
        rows: token ids of three rows or so of the user's data, as the teacher reads them.
        tokenizer: the one they were encoded with.
        scores: whether targets are needed, or answers alone.
    """
    raise NotImplementedError
