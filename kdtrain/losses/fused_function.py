"""The fused loss as an operation of autograd: what its forward keeps for the backward pass, and how that scales it.

Shapes: N tokens of a call, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kdtrain.losses.chunks import Call, ChunkedPass
from kdtrain.losses.gemm import autocast_dtype
from kdtrain.losses.module_pass import ModulePass
from kdtrain.losses.reduce import IGNORE_INDEX, SECOND_BACKWARD


class Fused(torch.autograd.Function):
    """Loss and gradients in one forward pass; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        call: Call,
    ) -> tuple[torch.Tensor, ...]:
        wanted = tuple(needed and call.with_gradient for needed in ctx.needs_input_grad[:3])
        return _forward(ctx, ChunkedPass, hidden, labels, call, wanted, (weight, bias))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return (*_backward(ctx, loss_gradient), None, None)


class FusedThroughModule(torch.autograd.Function):
    """The same with a head that is a module, and gradients for its parameters: each gets one, of all chunks."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, call: Call, *trained: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        wanted = tuple(ctx.needs_input_grad[i] and call.with_gradient for i in (0, *range(3, 3 + len(trained))))
        return _forward(ctx, ModulePass, hidden, labels, call, wanted, trained)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        hidden, *trained = _backward(ctx, loss_gradient)
        return hidden, None, None, *trained


def _forward(
    ctx: Any,
    of_pass: type[ChunkedPass],
    hidden: torch.Tensor,
    labels: torch.Tensor,
    call: Call,
    wanted: tuple[bool, ...],
    shared: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, ...]:
    """Loss and sums; the gradients of hidden state and of what all tokens share are left in `ctx`."""
    # Unsupervised tokens are left out from here on.
    rows, taught = _in_order(labels, call)
    half = autocast_dtype(hidden.device)
    run = of_pass(hidden.index_select(0, rows), labels.index_select(0, rows), rows, taught, call, wanted, half)
    with torch.autocast(hidden.device.type, enabled=False):
        run.all_chunks()
    # Not by save_for_backward: they are neither inputs nor outputs, and backward scales them in place.
    ctx.run_gradients = run.found_gradients()
    ctx.left_to_scale, ctx.rows, ctx.tokens = run.left_to_scale, rows[:taught], len(hidden)
    ctx.dtypes = [None if x is None else x.dtype for x in (hidden, *shared)]
    sums = run.packed_sums()
    options = call.options
    loss = (options.kd_weight * run.kd_share * sums[0] + options.ce_weight * sums[1]) * run.inverse_items
    ctx.mark_non_differentiable(*sums)
    return loss, *sums


def _backward(ctx: Any, loss_gradient: torch.Tensor) -> list[torch.Tensor | None]:
    if ctx.run_gradients is None:
        raise RuntimeError(SECOND_BACKWARD)
    # In place: the head's gradient can be the largest tensor of the step. A second pass would scale it again.
    gradients, ctx.run_gradients = ctx.run_gradients, None
    # All factors at once and in float32, then one rounding: 1/D alone can be too small a number for fp16.
    scale = ctx.left_to_scale * loss_gradient
    hidden, *shared = (
        None if gradient is None else gradient.mul_(scale).to(dtype)
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
    )
    if hidden is not None and len(ctx.rows) != ctx.tokens:  # zeros for the tokens that nothing teaches
        hidden = hidden.new_zeros(ctx.tokens, hidden.shape[1]).index_copy_(0, ctx.rows, hidden)
    return [hidden, *shared]


def _in_order(labels: torch.Tensor, call: Call) -> tuple[torch.Tensor, int]:
    """The supervised tokens of a call, and how many of them, the first, a term teaches; the others have sums alone."""
    if call.stretches is not None:
        if not call.only_some_are_taught:
            return torch.arange(len(labels), device=labels.device), len(labels)
        assert call.kd_token_weights is not None
        weighs = (call.kd_token_weights.to(labels.device) > 0).to(torch.uint8)
        ordered, first = list[tuple[torch.Tensor, torch.Tensor]](), 0
        for one in call.stretches:
            if one.taught < one.tokens:
                rows = weighs[first : first + one.tokens].argsort(descending=True, stable=True) + first
            else:  # in their own order: where all tokens are taught, their gradients are handed out as they lie
                rows = torch.arange(first, first + one.tokens, device=labels.device)
            ordered.append((rows[: one.taught], rows[one.taught :]))
            first += one.tokens
        return torch.cat([rows for halves in zip(*ordered, strict=True) for rows in halves]), sum(
            one.taught for one in call.stretches
        )
    supervised = labels != IGNORE_INDEX
    if not call.only_some_are_taught:
        rows = supervised.nonzero().squeeze(1)
        return rows, len(rows)
    assert call.kd_token_weights is not None
    weighs = call.kd_token_weights.to(labels.device) > 0
    taught, rest = ((supervised & some).nonzero().squeeze(1) for some in (weighs, ~weighs))
    return torch.cat([taught, rest]), len(taught)
