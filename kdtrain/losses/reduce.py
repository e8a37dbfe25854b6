"""What every loss term shares: which positions count, and what the sums are divided by.

Shapes: B rows, T positions, N supervised tokens. The denominator D is one number for the whole optimizer window: the
supervised tokens of all its micro-batches on all ranks. Each micro-batch contributes sum/D, so the loss and its
gradient do not depend on the world size, the accumulation, the micro-batch size or the padding. Means of micro-batch
means would: https://github.com/huggingface/trl/issues/4719.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdtrain.host import send

IGNORE_INDEX = -100
SECOND_BACKWARD = (
    "The loss makes its gradients in its forward pass, for one backward pass; this is the second. Compute the loss "
    "again for each (retain_graph=True does not keep them)."
)


@dataclass
class FusedLoss:
    """The token terms of one micro-batch, as one pass over its supervised tokens gives them.

    Sums are over the supervised tokens of this micro-batch and carry no weight but that of a token; all but `loss` are
    detached scalars on the device of the logits. Sums that need a teacher are None without one.
    """

    loss: torch.Tensor
    """kd_weight · kd_sum / num_kd_items + ce_weight · ce_sum / num_items: the only differentiable field."""
    kd_sum: torch.Tensor | None
    """Σ w · divergence, nats; w is 1 where tokens have no weights of their own."""
    ce_sum: torch.Tensor
    """Σ −log p_S(label) over the tokens that take part in the cross-entropy, by their weights there, nats."""
    num_tokens: torch.Tensor
    """Supervised tokens, N."""
    num_correct: torch.Tensor
    """Tokens whose label is the student's top-1, or shares that place."""
    num_agree: torch.Tensor | None
    """Tokens where both models have the same top-1, of draws the token drawn most often."""
    student_entropy_sum: torch.Tensor
    """Σ entropy of the student at temperature 1, nats."""
    teacher_entropy_sum: torch.Tensor | None
    """Σ entropy of the teacher at temperature 1, nats; of a top-k teacher with its tail as one token. None for
    draws, whose entropy is not the teacher's."""


def next_token_labels(labels_BT: torch.Tensor) -> torch.Tensor:
    """Labels [B, T−1] that the logits at positions 0 … T−2 predict. The first label is never predicted.

    By slicing, not by rolling: a roll would let the last position predict the first token.
    """
    return labels_BT[:, 1:]


def normaliser(num_items: torch.Tensor | int | None, local_tokens: torch.Tensor) -> torch.Tensor:
    """D as a float32 scalar ≥ 1 on the device of `local_tokens`: the window's count, else this batch's own.

    Clamped, so that a window without supervised tokens has a loss of exactly 0 instead of 0/0.
    """
    tokens = local_tokens
    if isinstance(num_items, torch.Tensor):
        tokens = send(num_items, local_tokens.device)
    elif num_items is not None:
        tokens = torch.full_like(local_tokens, num_items, dtype=torch.float32)
    return tokens.to(torch.float32).clamp(min=1)


def kd_share(
    kd_rows: torch.Tensor | None,
    num_items: torch.Tensor | int | None,
    num_kd_items: torch.Tensor | int | None,
    local_tokens: torch.Tensor,
) -> torch.Tensor | float:
    """D / D_kd: what the divergence counts more where tokens of weight 0 take no part in it. 1 without weights.

    Args:
        kd_rows: [S], the weights of the supervised tokens; None is 1 for all.
        num_kd_items: D_kd of the window, its tokens of weight above 0. None: this batch's own where `num_items` is None
            too, and D where it is not.
    """
    if kd_rows is None:
        return 1.0
    if num_kd_items is None:
        num_kd_items = (kd_rows > 0).sum() if num_items is None else num_items
    return normaliser(num_items, local_tokens) / normaliser(num_kd_items, local_tokens)


def check_token_weights(labels: torch.Tensor, **weights: torch.Tensor | None) -> None:
    """Raises ValueError for weights of tokens, by name, that are not [N], or (on a CPU) negative or not finite."""
    for name, values in weights.items():
        if values is None:
            continue
        if values.shape != labels.shape:
            raise ValueError(f"expected {name} {tuple(labels.shape)}, got {tuple(values.shape)}")
        if values.device.type == "cpu" and not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(f"{name} must be finite and not negative")


def world_scale(num_items: torch.Tensor | int | None, num_processes: int) -> int:
    """Factor on the loss that undoes the averaging of gradients across ranks.

    With the window's global D each rank's loss is its share of the total; DDP, FSDP and DeepSpeed average gradients
    over ranks, so the shares must be summed back. Without a global D (a forward outside a window) the loss is local.
    """
    return 1 if num_items is None else num_processes
