"""Cross-entropy and divergence from materialised logits: the reference that faster paths are compared with.

Shapes: N supervised tokens, V vocabulary. The contract is that of a fused loss (sums and one differentiable scalar),
so that the trainer does not know which of them it calls.
"""

from __future__ import annotations

import torch

from kdtrain.losses.divergence import entropy, generalized_jsd
from kdtrain.losses.kinds import Divergence
from kdtrain.losses.reduce import IGNORE_INDEX, FusedLoss, normaliser


def dense_distillation_loss(
    student_logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor | None = None,
    *,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    ce_mask: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence: Divergence = "jsd",
    num_items: torch.Tensor | int | None = None,
) -> FusedLoss:
    """(kd_weight · Σ divergence + ce_weight · Σ cross-entropy) / num_items over tokens whose label is not −100.

    Args:
        student_logits: [N, V].
        labels: [N], already shifted: row i of the logits predicts labels[i]; −100 is ignored.
        teacher_logits: [N, V], no graph. None skips the divergence, whatever kd_weight says.
        kd_weight, ce_weight: ≥ 0. At kd_weight 0 the divergence is not computed.
        ce_mask: [N] bool, tokens that take part in the cross-entropy; None is all of them. The others still count in D.
        num_items: D; None is the number of supervised tokens in `labels`.

    The cross-entropy is that of temperature 1; all sums are computed in float32. With no supervised token every sum is
    0 and the loss is 0 with a gradient path, so that DDP finds a graph on every rank.

    Raises:
        ValueError: shapes that do not fit, a negative weight, and what `generalized_jsd` refuses.
    """
    _check(student_logits, labels, teacher_logits, kd_weight, ce_weight)
    keep = labels != IGNORE_INDEX
    student = student_logits[keep].float()
    targets = labels[keep]
    num_tokens = keep.sum()

    # cross_entropy ignores by the same index, and its "sum" over nothing is a 0 that still has a gradient path.
    ce_targets = targets if ce_mask is None else targets.masked_fill(~ce_mask[keep], IGNORE_INDEX)
    ce_sum = torch.nn.functional.cross_entropy(student, ce_targets, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = (
        ce_weight * ce_sum if ce_weight > 0 else student[:0].sum()
    )  # an empty sum: 0 with a gradient path, −inf or not
    kd_sum = num_agree = teacher_entropy = None
    with torch.no_grad():
        top1 = student.argmax(-1)
        num_correct = (top1 == targets).sum()
        student_entropy = entropy(student).sum()
    if teacher_logits is not None:
        teacher = teacher_logits[keep].to(device=student.device, dtype=torch.float32)
        if kd_weight > 0:
            kd_sum = generalized_jsd(student, teacher, beta, temperature, divergence).sum()
            loss = loss + kd_weight * kd_sum
        with torch.no_grad():
            num_agree = (top1 == teacher.argmax(-1)).sum()
            teacher_entropy = entropy(teacher).sum()
    return FusedLoss(
        loss=loss / normaliser(num_items, num_tokens),
        kd_sum=None if kd_sum is None else kd_sum.detach(),
        ce_sum=ce_sum.detach(),
        num_tokens=num_tokens,
        num_correct=num_correct,
        num_agree=num_agree,
        student_entropy_sum=student_entropy,
        teacher_entropy_sum=teacher_entropy,
    )


def _check(
    student_logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    kd_weight: float,
    ce_weight: float,
) -> None:
    if student_logits.ndim != 2 or labels.shape != student_logits.shape[:1]:
        raise ValueError(
            "expected student logits [N, V] and labels [N], "
            f"got {tuple(student_logits.shape)} and {tuple(labels.shape)}"
        )
    if teacher_logits is not None and teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"student logits are {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)}: "
            "both must be [N, V] over the same tokens and the same vocabulary"
        )
    if not (kd_weight >= 0 and ce_weight >= 0):
        raise ValueError(f"weights must be non-negative, got kd_weight={kd_weight}, ce_weight={ce_weight}")
