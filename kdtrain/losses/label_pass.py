"""The log-likelihoods of labels without the logits, and the gradient of a weighted sum of them: two chunked passes.

Shapes: S supervised tokens, R rows of a block, H hidden width, V vocabulary.

A loss of the labels' likelihoods alone, L(log p_1, …, log p_S), is made in two passes over the same tiles. The first
finds the log-likelihoods; from them follow the loss and w_i = ∂L/∂(−log p_i), numbers of no size. The second turns
Σ w_i·(−log p_i) into gradients, whose closed form is w_i·(p − onehot).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from kdtrain.losses.chunks import Call, ChunkedPass
from kdtrain.losses.derivatives import dot
from kdtrain.losses.fused_function import Fused
from kdtrain.losses.gemm import autocast_dtype
from kdtrain.losses.gradients import Wanted
from kdtrain.losses.head import Head
from kdtrain.losses.reduce import normaliser
from kdtrain.losses.slots import Made
from kdtrain.losses.tile import Buffers, TileOptions, TileSums

_OF_LABELS = TileOptions(kd_weight=0, ce_weight=1, beta=0, temperature=1, divergence="jsd", tail="bucket")


def label_logprobs_of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log p(label) of each row [S] of logits [S, V], by operations that autograd knows."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    at_label = logits.gather(1, labels[:, None])
    # −log(1 + Σ_others e^(z − z_label)): near p = 1 it keeps the digits that z_label − log Z has lost.
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(-1, keepdim=True)
    return -functional.softplus(others - at_label).squeeze(1)


class LabelPass(ChunkedPass):
    """The first pass: `logprobs()` of the labels, and the metrics of the tile."""

    generates = False

    def _terms(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        scratch: Buffers,
        options: TileOptions,
        with_gradient: bool,
    ) -> None:
        p, labels = scratch.p, self.labels[rows]
        largest = student.amax(-1, keepdim=True)
        torch.softmax(student, -1, out=p)
        log_z = largest - p.amax(-1, keepdim=True).log()
        at_label = student.gather(1, labels[:, None])
        entropy = (log_z - dot(p, student, scratch.work)).sum()
        # As in `label_logprobs_of_logits`, in place.
        student.scatter_(1, labels[:, None], -torch.inf)
        logprobs = -functional.softplus(torch.logsumexp(student, -1, keepdim=True) - at_label).squeeze(1)
        self._found.append(logprobs)
        correct = (at_label == largest).sum()
        self.sums.append(TileSums(None, -logprobs.sum(), correct, None, entropy, None))

    @property
    def _found(self) -> list[torch.Tensor]:
        return self.__dict__.setdefault("found", [])

    def logprobs(self) -> torch.Tensor:
        """log p(label), [S]; after `all_chunks`."""
        return torch.cat(self._found) if self._found else torch.zeros(0, dtype=self.dtype, device=self.labels.device)


class WeightedLabelPass(ChunkedPass):
    """The second pass: gradients of Σ w·(−log p(label)), the weights being those of the cross-entropy (`ce_mask`).

    `logprobs` [S] are those of the first pass.
    """

    generates = False

    logprobs: torch.Tensor

    def _terms(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        scratch: Buffers,
        options: TileOptions,
        with_gradient: bool,
    ) -> None:
        assert self.row_weights.ce is not None
        weights = (options.ce_weight * self.row_weights.ce[rows])[:, None]
        torch.softmax(student, -1, out=scratch.p)
        torch.mul(scratch.p, weights, out=student)
        # p(label) − 1, which rounds to 0 long before it is.
        student.scatter_(1, self.labels[rows][:, None], weights * torch.expm1(self.logprobs[rows])[:, None])


def label_call(
    student: Head,
    *,
    ce_mask: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> Call:
    """A call of the two passes; arguments as of `fused_distillation_loss`."""
    return Call(
        student=student,
        teacher=None,
        teacher_hidden=None,
        targets=None,
        options=_OF_LABELS,
        ce_token_weights=ce_mask,
        kd_token_weights=None,
        num_items=num_items,
        num_kd_items=None,
        chunk_tokens=chunk_tokens,
        with_gradient=torch.is_grad_enabled(),
    )


def label_pass(hidden: torch.Tensor, labels: torch.Tensor, call: Call, half: torch.dtype | None) -> LabelPass:
    """The first pass over hidden states [S, H]; autocast is off."""
    rows = torch.arange(len(labels), device=labels.device)
    run = LabelPass(hidden, labels, rows, len(rows), replace(call, with_gradient=False), (False,) * 3, half)
    run.all_chunks()
    return run


@dataclass(frozen=True)
class Known:
    """What a loss is made of, once the first pass has been."""

    hidden: torch.Tensor
    """[S, H]."""
    labels: torch.Tensor
    logprobs: torch.Tensor
    """[S], of the labels."""
    items: torch.Tensor
    """D."""
    wanted: tuple[bool, ...]
    half: torch.dtype | None
    """See `ChunkedPass`."""


class LabelLoss(torch.autograd.Function):
    """Loss and gradients in one forward pass; backward scales them, as `Fused` does."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        call: Call,
        make: Callable[[Known], Made],
    ) -> tuple[torch.Tensor, ...]:
        wanted = tuple(needed and call.with_gradient for needed in ctx.needs_input_grad[:3])
        half = autocast_dtype(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            first = label_pass(hidden, labels, call, half)
            logprobs = first.logprobs()
            items = normaliser(call.num_items, first.num_tokens).to(logprobs.dtype)
            made = make(Known(hidden, labels, logprobs, items, wanted, half))
            weighted = replace(call, ce_token_weights=made.weights)
            second = WeightedLabelPass(hidden, labels, first.rows, len(labels), weighted, wanted, half)
            second.logprobs = logprobs
            if any(wanted):
                second.all_chunks()
        ctx.run_gradients, ctx.left_to_scale = second.found_gradients(), second.left_to_scale
        if made.beside is not None:
            ctx.run_gradients, ctx.left_to_scale = _added(second, *made.beside), torch.ones((), device=hidden.device)
        ctx.rows, ctx.tokens = first.rows, len(hidden)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        _, _, tokens, correct, _, entropy, _ = first.packed_sums()
        sums = [made.kd_sum, made.ce_sum, tokens, correct, entropy]
        ctx.mark_non_differentiable(*sums)
        return made.loss, *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor, *others: Any) -> tuple[torch.Tensor | None, ...]:
        return (*Fused.backward(ctx, loss_gradient, *others), None)


def _added(labels: ChunkedPass, other: ChunkedPass, tokens: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients of both passes in one, all factors in; `tokens` are those of the other."""
    found: list[torch.Tensor | None] = []
    for name, first, second in zip(Wanted._fields, labels.found_gradients(), other.found_gradients(), strict=True):
        if first is None:
            found.append(None)
            continue
        total = first.to(labels.dtype) * labels.left_to_scale
        if second is not None:
            part = second.to(labels.dtype) * other.left_to_scale
            total = total.index_add_(0, tokens, part) if name == "hidden" else total.add_(part)
        found.append(total)
    return found
