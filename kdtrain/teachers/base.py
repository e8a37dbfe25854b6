"""What the trainer expects of a teacher.

Shapes: B rows, T positions, N supervised tokens, V vocabulary. Row i of a target is the distribution that predicts
supervised token i: positions are selected by the mask that selects the student's logits, so both sides use identical
indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Teacher(Protocol):
    """Turns a batch into targets for its supervised positions.

    A protocol and not a base class: a teacher may be a module in this process, a server or a file, and shares no state
    with the others.
    """

    module: nn.Module | None
    """The model, where there is one in this process: the trainer places it, and hooks and generation use it."""

    vocab_size: int
    """Logit columns, padding included."""

    def targets(self, inputs: Mapping[str, Any], predicts_BT: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] at temperature 1 for the positions where `predicts_BT` is true.

        Args:
            inputs: what the student's forward takes.
            predicts_BT: [B, T−1] bool, true at positions whose logits predict a supervised token.

        Raises:
            TeacherError: no usable answer.
        """
        ...
