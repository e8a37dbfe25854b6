"""Cross-entropy and divergence from materialised logits: the reference that faster paths are compared with.

Shapes: N supervised tokens, V vocabulary, K known tokens. The contract is that of a fused loss (sums and one
differentiable scalar), so that the trainer does not know which of them it calls.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from kdtrain.errors import TargetsError
from kdtrain.losses.divergence import entropy, generalized_jsd
from kdtrain.losses.kinds import DEFAULT_PARAMS, Divergence, DivergenceParams, Tail
from kdtrain.losses.mixture import Mixed, MixedTopK
from kdtrain.losses.reduce import IGNORE_INDEX, FusedLoss, check_token_weights, kd_share, normaliser
from kdtrain.losses.sampled import (
    SampledTargets,
    SparseTargets,
    check_sampled_targets,
    most_drawn,
    sampled_divergence,
)
from kdtrain.losses.topk import TopKLogprobs, check_targets, coarse_grain


def dense_distillation_loss(
    student_logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor | None = None,
    *,
    softened_teacher_logits: torch.Tensor | None = None,
    targets: SparseTargets | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    kd_token_weights: torch.Tensor | None = None,
    ce_token_weights: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence: Divergence = "jsd",
    tail: Tail = "bucket",
    params: DivergenceParams = DEFAULT_PARAMS,
    num_items: torch.Tensor | int | None = None,
    num_kd_items: torch.Tensor | int | None = None,
    all_supervised: bool = False,
) -> FusedLoss:
    """kd_weight · Σ w · divergence / num_kd_items + ce_weight · Σ v · cross-entropy / num_items.

    Over the tokens whose label is not −100.

    Args:
        student_logits: [N, V].
        labels: [N], already shifted: row i of the logits predicts labels[i]; −100 is ignored.
        teacher_logits: [N, V], no graph. Without them and without targets there is no divergence, whatever kd_weight
            says.
        softened_teacher_logits: [N, V], what the divergence is taken of in their place at a temperature other than 1,
            see `mixture.py`.
        targets: a top-k teacher instead, or tokens drawn from one: row i is the teacher of token i, [N, K]. Drawn
            tokens want β 0.
        kd_weight, ce_weight: ≥ 0. At kd_weight 0 the divergence is not computed.
        kd_token_weights: [N], ≥ 0, w: what the divergence of each token counts; None is 1 for all.
        ce_token_weights: [N], ≥ 0 or bool, v: what the cross-entropy of each counts; None is 1 for all. D has all.
        beta, temperature, divergence, tail, params: as in `generalized_jsd` and `topk_divergence`.
        num_items: D; None is the number of supervised tokens in `labels`.
        num_kd_items: D_kd; see `fused_distillation_loss`.
        all_supervised: no label is −100. Then no size of a tensor depends on numbers, and no device is waited for.

    The cross-entropy is that of temperature 1; all sums are computed in float32. With no supervised token every sum is
    0 and the loss is 0 with a gradient path, so that DDP finds a graph on every rank.

    Raises:
        ValueError: shapes that do not fit, a negative weight, and what `generalized_jsd` refuses.
    """
    _check(student_logits, labels, teacher_logits, targets, kd_weight, ce_weight, tail, beta, divergence)
    check_token_weights(labels, kd_token_weights=kd_token_weights, ce_token_weights=ce_token_weights)
    keep: torch.Tensor | slice = slice(None) if all_supervised else labels != IGNORE_INDEX
    student = student_logits[keep].to(torch.promote_types(student_logits.dtype, torch.float32))
    kept_labels = labels[keep]
    num_tokens = torch.full((), len(kept_labels), device=labels.device)

    ce_sum = _cross_entropy(student, kept_labels, None if ce_token_weights is None else ce_token_weights[keep])
    loss = (
        ce_weight * ce_sum if ce_weight > 0 else student[:0].sum()
    )  # an empty sum: 0 with a gradient path, −inf or not
    kd_sum = num_agree = teacher_entropy = None
    with torch.no_grad():
        num_correct = (student.argmax(-1) == kept_labels).sum()
        student_entropy = entropy(student).sum()
    if targets is not None:
        targets = targets[keep if isinstance(keep, slice) else keep.to(targets.indices.device)]
    weights = None if kd_token_weights is None else kd_token_weights.to(student.device)[keep].to(student.dtype)
    share = kd_share(weights, num_items, num_kd_items, num_tokens)
    # Tokens of weight 0 need no divergence.
    part: torch.Tensor | slice = slice(None)
    if weights is not None and not all_supervised:
        part = weights > 0
        weights = weights[part]
    compared = None
    if isinstance(targets, SampledTargets):
        if kd_weight > 0:
            drawn = targets[part if isinstance(part, slice) else part.to(targets.indices.device)]
            kd_sum = _weighted(sampled_divergence(student[part], drawn, temperature), weights)
            loss = loss + kd_weight * share * kd_sum
        num_agree = _agreeing(student, most_drawn(targets))  # and their entropy is not the teacher's
    elif targets is not None:
        compared = _with_topk(student, targets, tail, temperature)
    elif teacher_logits is not None:
        soft = None if softened_teacher_logits is None else softened_teacher_logits[keep]
        compared = _with_logits(student, teacher_logits[keep], soft)
    if compared is not None:
        with torch.no_grad():
            entropy_N = entropy(compared.teacher.at_one)
        if kd_weight > 0:
            own, soft, entropy_part = compared.student[part], compared.teacher.softened[part], entropy_N[part]
            if weights is not None and all_supervised:
                # What is not finite would be NaN in the gradient, times a weight of 0 too.
                none = (weights <= 0)[:, None]
                own, soft = own.masked_fill(none, 0.0), soft.masked_fill(none, 0.0)
            values = generalized_jsd(own, soft, beta, temperature, divergence, params, entropy_part)
            kd_sum = _weighted(values, weights)
            loss = loss + kd_weight * share * kd_sum
        num_agree = compared.num_agree
        teacher_entropy = entropy_N.sum()
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


def _cross_entropy(student: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    # cross_entropy ignores by the same index, and its "sum" over nothing is a 0 that still has a gradient path.
    left_out = torch.zeros_like(labels, dtype=torch.bool) if weights is None else weights.to(labels.device) == 0
    labels = labels.masked_fill(left_out, IGNORE_INDEX)
    of_tokens = weights is not None and weights.dtype != torch.bool
    found = nn.functional.cross_entropy(student, labels, reduction="none" if of_tokens else "sum")
    return (found * weights.to(found)).sum() if of_tokens and weights is not None else found


def _weighted(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    return values.sum() if weights is None else torch.where(weights > 0, values * weights, 0.0).sum()


class _Compared(NamedTuple):
    """What the divergence is taken of, float32, over the same outcomes on both sides."""

    student: torch.Tensor
    teacher: Mixed
    num_agree: torch.Tensor


def _with_logits(student: torch.Tensor, teacher: torch.Tensor, softened: torch.Tensor | None) -> _Compared:
    teacher = teacher.to(device=student.device, dtype=torch.float32)
    soft = teacher if softened is None else softened.to(device=student.device, dtype=torch.float32)
    return _Compared(student, Mixed(teacher, soft), (student.argmax(-1) == teacher.argmax(-1)).sum())


def _with_topk(student: torch.Tensor, targets: TopKLogprobs | MixedTopK, tail: Tail, temperature: float) -> _Compared:
    """The student over the outcomes that the teacher is known by; they agree on the most likely token it named."""
    targets = targets.to(student.device)
    if isinstance(targets, MixedTopK):
        columns = student.shape[1]
        _, mixed = targets.known(columns, temperature)
        targets = targets.at_one(columns)
        known, _ = coarse_grain(student, targets, "bucket")
    else:
        known, teacher = coarse_grain(student, targets, tail)
        mixed = Mixed(teacher, teacher)
    top = targets.logprobs.argmax(-1, keepdim=True)  # a missing entry has −inf
    return _Compared(known, mixed, _agreeing(student, targets.indices.gather(1, top).clamp(min=0)))


def _agreeing(student: torch.Tensor, top_ids: torch.Tensor) -> torch.Tensor:
    """Tokens whose most likely one for the teacher, [N, 1], is the student's too."""
    with torch.no_grad():
        return (student.gather(1, top_ids.to(student.device)) == student.amax(-1, keepdim=True)).sum()


def _check(
    student_logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    targets: SparseTargets | None,
    kd_weight: float,
    ce_weight: float,
    tail: Tail,
    beta: float,
    divergence: Divergence,
) -> None:
    if student_logits.ndim != 2 or labels.shape != student_logits.shape[:1]:
        raise ValueError(
            "expected student logits [N, V] and labels [N], "
            f"got {tuple(student_logits.shape)} and {tuple(labels.shape)}"
        )
    if teacher_logits is not None and teacher_logits.shape != student_logits.shape:
        raise TargetsError(
            f"student logits are {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)}: "
            "both must be [N, V] over the same tokens and the same vocabulary"
        )
    if teacher_logits is not None and targets is not None:
        raise ValueError("pass a teacher's logits or targets, not both")
    if isinstance(targets, SampledTargets):
        check_sampled_targets(targets, len(labels), student_logits.shape[1], beta, divergence)
    elif targets is not None:
        check_targets(targets, len(labels), student_logits.shape[1], tail, divergence)
    if not (kd_weight >= 0 and ce_weight >= 0):
        raise ValueError(f"weights must be non-negative, got kd_weight={kd_weight}, ce_weight={ce_weight}")
