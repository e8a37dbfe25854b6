"""Likelihoods of chunks of text against those of a teacher with another tokenizer, from hidden states or from logits.

Shapes: S supervised tokens of the student, H hidden width, V vocabulary of the student, C slots (see slots.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdtrain.losses.chunk_likelihood import ChunkTerms, alm_terms
from kdtrain.losses.head import Head
from kdtrain.losses.label_pass import Known, LabelLoss, label_call, label_logprobs_of_logits
from kdtrain.losses.reduce import FusedLoss, normaliser
from kdtrain.losses.slots import Made, Slots, fused_loss, label_metrics, sums_of_slots
from kdtrain.losses.tile import TileOptions


@dataclass(frozen=True)
class ChunkTargets:
    """What a teacher says of chunks (`rlhf.cross_tokenizer: alm`)."""

    slots: torch.Tensor
    """[S] long: the slot of each of the student's supervised tokens; C where it has none."""
    logprobs: torch.Tensor
    """[C]: the teacher's log-likelihood of each slot, nats; of empty ones any number."""

    def to(self, device: torch.device) -> ChunkTargets:
        return ChunkTargets(self.slots.to(device), self.logprobs.to(device))


def _terms(slots: Slots, logprobs_S: torch.Tensor, targets: ChunkTargets) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ w·KL, and w·∂KL/∂log P_S of each token's slot [S], 0 without one."""
    logprobs_C = sums_of_slots(logprobs_S.double(), slots.slots, len(targets.logprobs))
    filled = slots.weights > 0
    found = ChunkTerms(*(torch.where(filled, one, 0.0) for one in alm_terms(logprobs_C, targets.logprobs)))
    slopes = torch.cat([slots.weights * found.slope, found.slope.new_zeros(1)])
    return (slots.weights * found.value).sum(), slopes[slots.slots]


def head_chunk_loss(
    student_hidden: torch.Tensor,
    student: Head,
    labels: torch.Tensor,
    options: TileOptions,
    targets: ChunkTargets,
    *,
    ce_mask: torch.Tensor | None = None,
    kd_token_weights: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
    num_kd_items: torch.Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> FusedLoss:
    """kd_weight · Σ w·ALM / num_kd_items + ce_weight · Σ cross-entropy / num_items, without the logits.

    Both terms are of the labels' likelihoods alone: `label_pass.py` says how their gradients are made.

    Args:
        student_hidden: [S, H].
        labels: [S], all supervised.
        options: only its two weights are read.
        num_items, ce_mask, chunk_tokens: as of `fused_distillation_loss`.
        kd_token_weights: [S], ≥ 0; a chunk has the mean of its tokens'.
        num_kd_items: chunks of the window whose weight is above 0; None is those of this call.

    Value and gradients of float32 inputs are within 1e-5 (relative) of float64, near P = 1 and P = 0 as well.
    """
    if student.module is not None or student.masks_columns():
        logits = student.differentiable_logits(student_hidden)
        return dense_chunk_loss(
            logits,
            labels,
            options,
            targets,
            ce_mask=ce_mask,
            kd_token_weights=kd_token_weights,
            num_items=num_items,
            num_kd_items=num_kd_items,
        )
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    slots = Slots.of(targets.slots, len(targets.logprobs), kd_token_weights, num_kd_items, dtype)
    call = label_call(student, ce_mask=ce_mask, num_items=num_items, chunk_tokens=chunk_tokens)

    def make(known: Known) -> Made:
        return _made(options, targets, slots, ce_mask, known.logprobs, known.items)

    loss, *sums = LabelLoss.apply(student_hidden, student.weight, student.bias, labels, call, make)
    return fused_loss(loss, sums)


def _made(
    options: TileOptions,
    targets: ChunkTargets,
    slots: Slots,
    ce_mask: torch.Tensor | None,
    logprobs_S: torch.Tensor,
    items: torch.Tensor,
) -> Made:
    return slots.made(options, *_terms(slots, logprobs_S, targets), ce_mask, logprobs_S, items)


def dense_chunk_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: TileOptions,
    targets: ChunkTargets,
    *,
    ce_mask: torch.Tensor | None = None,
    kd_token_weights: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
    num_kd_items: torch.Tensor | int | None = None,
) -> FusedLoss:
    """The same from logits [S, V] that autograd knows."""
    logprobs = label_logprobs_of_logits(logits, labels)
    known, tokens = logprobs.detach(), torch.full((), len(labels), device=labels.device)
    items = normaliser(num_items, tokens).to(known.dtype)
    slots = Slots.of(targets.slots, len(targets.logprobs), kd_token_weights, num_kd_items, known.dtype)
    made = _made(options, targets, slots, ce_mask, known, items)
    slope = -(torch.where(made.weights != 0, logprobs, 0.0) * made.weights).sum() / items
    correct, entropy = label_metrics(logits.detach().to(known.dtype), labels)
    loss = made.loss + (slope - slope.detach())  # the value, with the gradient of its tangent
    return fused_loss(loss, [made.kd_sum, made.ce_sum, tokens, correct, entropy])
