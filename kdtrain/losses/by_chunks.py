"""The dense loss a chunk of tokens at a time: for logits that a model makes by itself, and for heads that mask columns.

Shapes: N tokens, C tokens of one chunk, V vocabulary, H hidden width.

Written down at once, the terms, their softmaxes and what autograd keeps of them take up to 45 times the logits in
float32. Here each chunk's loss is differentiated as soon as it is made, and only the gradients stay: beside them
memory is O(C·V). The backward pass scales them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from kdtrain.losses.dense import dense_distillation_loss
from kdtrain.losses.head import Head
from kdtrain.losses.kinds import Stretch
from kdtrain.losses.mixture import Mixed
from kdtrain.losses.reduce import IGNORE_INDEX, SECOND_BACKWARD, FusedLoss, kd_share, normaliser
from kdtrain.losses.sampled import SparseTargets
from kdtrain.losses.tile import TileOptions

_CHUNK_VALUES = 2**23
"""Logits of a chunk: the terms and what autograd keeps of them are up to 45 float32 tensors of this size, 1.5 GB."""

Number = torch.Tensor | int | None
_SUMS = ("kd_sum", "ce_sum", "num_tokens", "num_correct", "num_agree", "student_entropy_sum", "teacher_entropy_sum")


def dense_loss_by_chunks(
    rows: torch.Tensor,
    labels: torch.Tensor,
    options: TileOptions,
    teacher: Callable[[slice], Mixed] | None = None,
    *,
    head: Head | None = None,
    targets: SparseTargets | None = None,
    kd_token_weights: torch.Tensor | None = None,
    ce_token_weights: torch.Tensor | None = None,
    num_items: Number = None,
    num_kd_items: Number = None,
    chunk_tokens: int | None = None,
    stretches: Sequence[Stretch] | None = None,
) -> FusedLoss:
    """`dense_distillation_loss`, with the same value and gradients.

    Args:
        rows: the student's logits [N, V], or with `head` its hidden states [N, H].
        teacher: the logits of some tokens, [C, V] without a graph, by a slice of the N.
        chunk_tokens: C; None chooses from the vocabulary. The result does not depend on it.
        stretches: as of `head_distillation_loss`; then no device is waited for.

    Gradients flow to the logits, or to the hidden states, weight and bias; each is kept in its own dtype (those of
    weight and bias in float32 until the end), and can be asked for once.
    """
    all_supervised = stretches is not None
    tokens = torch.full((), len(labels), device=labels.device) if all_supervised else (labels != IGNORE_INDEX).sum()
    weighs = kd_token_weights
    if weighs is not None and not all_supervised:
        weighs = weighs * (labels != IGNORE_INDEX)
    share = kd_share(weighs, num_items, num_kd_items, tokens)
    shared = [] if head is None else [head.weight, head.bias]

    def compute(own: torch.Tensor, shared: Sequence[torch.Tensor | None], part: slice) -> FusedLoss:
        logits = own
        if head is not None:
            weight, bias = shared
            assert weight is not None
            logits = replace(head, weight=weight, bias=bias).differentiable_logits(own)
        given, own_options = None if teacher is None else teacher(part), kinds[part.start]
        return dense_distillation_loss(
            logits,
            labels[part],
            None if given is None else given.at_one,
            softened_teacher_logits=None if given is None or given.softened is given.at_one else given.softened,
            targets=None if targets is None else targets[part],
            kd_weight=options.kd_weight,
            ce_weight=options.ce_weight,
            kd_token_weights=None if kd_token_weights is None else kd_token_weights[part] * share,
            ce_token_weights=None if ce_token_weights is None else ce_token_weights[part],
            beta=own_options.beta,
            temperature=options.temperature,
            divergence=own_options.divergence,
            tail=options.tail,
            params=options.params,
            num_items=1,
            num_kd_items=1,
            all_supervised=all_supervised,
        )

    vocabulary = rows.shape[-1] if head is None else len(head.weight)
    size = chunk_tokens or max(_CHUNK_VALUES // vocabulary, 1)
    kinds: dict[int, TileOptions] = {}
    parts = []
    for first, behind, of_tokens in _runs(options, stretches, len(rows)):
        for start in range(first, behind, size):
            parts.append(slice(start, min(start + size, behind)))
            kinds[start] = of_tokens
    if not parts:
        parts, kinds = [slice(0, 0)], {0: options}
    wanted = torch.is_grad_enabled()
    total, *sums = _ByChunks.apply(compute, parts, wanted, normaliser(num_items, tokens), rows, *shared)
    named = dict(zip(_SUMS, sums, strict=True))
    if named["kd_sum"] is not None:
        named["kd_sum"] = named["kd_sum"] / share
    return FusedLoss(loss=total, **named)


def _runs(
    options: TileOptions, stretches: Sequence[Stretch] | None, tokens: int
) -> Iterator[tuple[int, int, TileOptions]]:
    """Where the tokens of one kind of terms begin and end."""
    if stretches is None:
        yield 0, tokens, options
        return
    first = 0
    for one in stretches:
        yield first, first + one.tokens, options.of(one)
        first += one.tokens


class _ByChunks(torch.autograd.Function):
    """Loss and gradients in one forward pass; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., FusedLoss],
        parts: Sequence[slice],
        wanted: bool,
        items: torch.Tensor,
        rows: torch.Tensor,
        *shared: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, ...]:
        wants = [wanted and needed for needed in ctx.needs_input_grad[4:]]
        gradients: list[torch.Tensor | None] = [torch.empty_like(rows) if wants[0] else None]
        gradients += [
            torch.zeros_like(one, dtype=torch.promote_types(one.dtype, torch.float32))
            if want and one is not None
            else None
            for one, want in zip(shared, wants[1:], strict=True)
        ]
        found: list[FusedLoss] = []
        for part in parts:
            inputs = [rows[part], *shared]
            leaves = [
                one if one is None else one.detach().requires_grad_(want)
                for one, want in zip(inputs, wants, strict=True)
            ]
            with torch.enable_grad():
                one = compute(leaves[0], leaves[1:], part)
            _differentiate(one.loss, leaves, gradients, part)
            found.append(replace(one, loss=one.loss.detach()))
        ctx.run_gradients, ctx.items = gradients, items
        ctx.dtypes = [None if one is None else one.dtype for one in (rows, *shared)]
        loss = torch.stack([one.loss for one in found]).sum() / items
        sums = [_total([getattr(one, name) for one in found]) for name in _SUMS]
        ctx.mark_non_differentiable(*(one for one in sums if one is not None))
        return loss, *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        if ctx.run_gradients is None:
            raise RuntimeError(SECOND_BACKWARD)
        gradients, ctx.run_gradients = ctx.run_gradients, None
        # 1/D last, in float32 with the factors of whatever scales the loss: alone it can be too small for fp16.
        scale = loss_gradient.float() / ctx.items
        scaled = [
            None if one is None else one.mul_(scale).to(dtype) for one, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, *scaled


def _differentiate(
    loss: torch.Tensor, leaves: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None], part: slice
) -> None:
    """The gradients of a chunk: of its own rows into their place, of what all chunks share onto the others'."""
    wanted = [
        (leaf, into) for leaf, into in zip(leaves, gradients, strict=True) if leaf is not None and into is not None
    ]
    if not wanted:
        return
    found = torch.autograd.grad(loss, [leaf for leaf, _ in wanted], allow_unused=True)
    for (leaf, into), gradient in zip(wanted, found, strict=True):
        is_rows = leaf is leaves[0]
        if is_rows:
            into[part] = 0.0 if gradient is None else gradient
        elif gradient is not None:
            into.add_(gradient)


def _total(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    there = [value for value in values if value is not None]
    return torch.stack(there).sum() if there else None
