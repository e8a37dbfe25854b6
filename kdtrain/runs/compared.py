"""What an evaluation has measured of its models, and who hears how far it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kdtrain.data import BuildReport
from kdtrain.runs.samples import Sample
from kdtrain.runs.tasks import Metrics
from kdtrain.trainer.figures import RowSums


class EvaluationReporter(Protocol):
    """Shows what an evaluation does."""

    def data(self, name: str, report: BuildReport) -> None:
        """The rows were read."""

    def rows(self, model: str, done: int, total: int) -> None:
        """A model has been evaluated on some of the rows."""

    def answers(self, done: int, total: int) -> None:
        """The teacher has answered some of the rows that it has to."""

    def close(self) -> None:
        """It is over, one way or another."""


@dataclass(frozen=True)
class Compared:
    """Sums of `before`, `after`, and `against` where there is another run."""

    rows: dict[str, RowSums] = field(default_factory=dict)
    """On the rows of `data.eval`."""
    prompted: dict[str, RowSums] = field(default_factory=dict)
    """On what the teacher writes to their prompts, where it reads something that the student does not; or empty."""
    right: dict[str, np.ndarray | None] = field(default_factory=dict)
    """Also of `teacher`: which answers are right, see `Asked.right`."""
    samples: list[Sample] = field(default_factory=list)
    tasks: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    """Of each model, of `teacher` too: by task."""
    image_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Numbers of the rows with images."""
    blanked: dict[str, RowSums] = field(default_factory=dict)
    """On these alone, each image replaced by its mean colour; also of `teacher`."""
