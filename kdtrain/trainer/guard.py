"""Losses, gradients and weights that are not finite: they stop the run before they do harm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kdtrain.trainer.metrics import LOSS_TERMS

if TYPE_CHECKING:
    from accelerate import Accelerator

Recorded = Mapping[str, Sequence[torch.Tensor]]


def some_loss_is_not_finite(recorded: Recorded, newest: int, accelerator: Accelerator) -> bool:
    """Whether a term of this window is not finite on any rank; a collective. An infinite loss can have a finite
    gradient, so that the gradient norm does not show it.

    Args:
        recorded: the metrics since the last log.
        newest: micro-batches of a window.
    """
    values = [value for key in LOSS_TERMS for value in recorded.get(key, ())[-newest:]]
    # With a 0 in front, so that a rank without terms takes part in the collective like the others.
    stacked = torch.stack([torch.zeros((), device=accelerator.device), *(value.float() for value in values)])
    bad = (~torch.isfinite(stacked)).any().float()
    return bool(accelerator.gather(bad[None]).max())


def describe_non_finite(recorded: Recorded, step: int, rank: int, norm: Any) -> str:
    """What is not finite, and where.

    Args:
        norm: the gradient norm, where it is known.
    """
    bad = [key for key in LOSS_TERMS if any(not torch.isfinite(value) for value in recorded.get(key, ()))]
    cause = f"the loss term {', '.join(bad)} is not finite" if bad else "all loss terms of this rank are finite"
    return (
        f"Not finite at step {step}, rank {rank} (gradient norm {norm}): {cause}. The optimizer step was not taken. "
        "Lower training.learning_rate, train in float32, or look at the rows of this step."
    )
