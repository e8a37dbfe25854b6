"""Likelihoods of chunks of text against those of a teacher with another tokenizer, from hidden states or from logits.

Shapes: S supervised tokens of the student, H hidden width, V vocabulary of the student, C slots (see slots.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdtrain.losses.chunk_likelihood import ChunkTerms, alm_terms
from kdtrain.losses.chunks import Call
from kdtrain.losses.fused import _Fused
from kdtrain.losses.head import Head
from kdtrain.losses.label_pass import LabelPass, WeightedLabelPass, label_logprobs_of_logits
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
    call = Call(
        student=student,
        teacher=None,
        teacher_hidden=None,
        targets=None,
        options=replace(options, kd_weight=0.0, ce_weight=1.0),
        ce_token_weights=ce_mask,
        kd_token_weights=None,
        num_items=num_items,
        num_kd_items=None,
        chunk_tokens=chunk_tokens,
        with_gradient=torch.is_grad_enabled(),
    )
    if student.masks_columns():
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
    compute = functools.partial(_made, options, targets, slots, ce_mask)
    loss, *sums = _Chunked.apply(student_hidden, student.weight, student.bias, labels, call, compute)
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


class _Chunked(torch.autograd.Function):
    """Loss and gradients in one forward pass; backward scales them, as that of `fused.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        call: Call,
        make: Callable[[torch.Tensor, torch.Tensor], Made],
    ) -> tuple[torch.Tensor, ...]:
        wanted = tuple(needed and call.with_gradient for needed in ctx.needs_input_grad[:3])
        rows = torch.arange(len(labels), device=labels.device)
        half = None
        if hidden.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            half = torch.get_autocast_dtype("cuda")
        with torch.autocast(hidden.device.type, enabled=False):
            first = LabelPass(hidden, labels, rows, len(rows), replace(call, with_gradient=False), (False,) * 3, half)
            first.all_chunks()
            logprobs = first.logprobs()
            made = make(logprobs, normaliser(call.num_items, first.num_tokens).to(logprobs.dtype))
            again = replace(call, ce_token_weights=made.weights)
            second = WeightedLabelPass(hidden, labels, rows, len(rows), again, wanted, half)
            second.logprobs = logprobs
            if any(wanted):
                second.all_chunks()
        ctx.run_gradients = second.found_gradients()
        ctx.left_to_scale, ctx.rows, ctx.tokens = second.left_to_scale, rows, len(hidden)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        _, _, tokens, correct, _, entropy, _ = first.packed_sums()
        sums = [made.kd_sum, made.ce_sum, tokens, correct, entropy]
        ctx.mark_non_differentiable(*sums)
        return made.loss, *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor, *others: Any) -> tuple[torch.Tensor | None, ...]:
        return (*_Fused.backward(ctx, loss_gradient, *others), None)


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
