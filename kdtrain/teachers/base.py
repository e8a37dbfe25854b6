"""What the trainer expects of a teacher.

Shapes: B rows, T positions, S supervised tokens, H hidden width, V vocabulary, K known tokens. Row i of a target is the
distribution that predicts supervised token i: positions are selected by the mask that selects the student's, so both
sides use identical indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn

from kdtrain.losses.head import Head
from kdtrain.losses.topk import TopKLogprobs


@dataclass(frozen=True)
class DenseTargets:
    """Full distributions, as the hidden states and the head that give their logits."""

    hidden: torch.Tensor
    """[S, H]."""
    head: Head

    def logits(self) -> torch.Tensor:
        """[S, V], float32."""
        with torch.no_grad():
            return self.head.differentiable_logits(self.hidden)


Targets: TypeAlias = "DenseTargets | TopKLogprobs | torch.Tensor"
"""A teacher's answer for S tokens; a plain tensor is logits [S, V]."""


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

    def targets(self, inputs: Mapping[str, Any], predicts_BT: torch.Tensor) -> Targets:
        """Targets at temperature 1 for the positions where `predicts_BT` is true.

        Args:
            inputs: what the student's forward takes.
            predicts_BT: [B, T−1] bool, true at positions that predict a supervised token.

        Raises:
            TeacherError: no usable answer.
        """
        ...
