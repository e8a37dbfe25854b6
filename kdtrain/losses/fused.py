"""Cross-entropy, divergence and metrics without the logits: one pass over tiles of [tokens, vocabulary].

Shapes: N tokens, S of them supervised, C tokens of one chunk, H hidden width (each model has its own), V vocabulary.

The logits are what full-vocabulary distillation runs out of memory for: at 4096 tokens and 152k words those of two
models with their gradients take over 10 GB. Here, for each chunk of supervised tokens, both models' logits are made
once in reused buffers, all terms and metrics come from the same tile, the closed-form gradient is written over the
student's logits, and from there it goes at once into the gradients of the hidden state and the head. The backward pass
only scales. Nothing is computed twice; memory is O(C·V) beside the gradients themselves.

Three sizes are cut: a call into chunks, whose matrix products are large enough to be fast; a chunk into blocks, whose
element-wise passes stay in a CPU's cache. A chunk's logits live in one tile, a block is a view of some of its rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdtrain.losses.dense import dense_distillation_loss
from kdtrain.losses.divergence import Divergence, check_divergence_arguments
from kdtrain.losses.gemm import (
    HalfGradients,
    add_weight_gradient,
    hidden_gradient,
    one_dtype,
    power_of_two_unit,
)
from kdtrain.losses.head import Head
from kdtrain.losses.reduce import IGNORE_INDEX, FusedLoss, normaliser
from kdtrain.losses.tile import Buffers, TileOptions, TileSums, tile_terms, topk_tile_terms
from kdtrain.losses.topk import Tail, TopKLogprobs, check_targets
from kdtrain.losses.workspace import workspace

# Bytes of the two logit tiles of a chunk together. On a GPU the scratch of the element-wise part is one and a half
# times as much again, on a CPU it is a few blocks.
_TILE_BYTES = {"cpu": 256 * 2**20, "cuda": 384 * 2**20}
# Values of one element-wise block: on a CPU its buffers stay in the cache, on a GPU a block is the whole tile.
_BLOCK_VALUES = 2**20


def fused_distillation_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    *,
    targets: TopKLogprobs | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    ce_mask: torch.Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence: Divergence = "jsd",
    tail: Tail = "bucket",
    num_items: torch.Tensor | int | None = None,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> FusedLoss:
    """(kd_weight · Σ divergence + ce_weight · Σ cross-entropy) / num_items, from hidden states and heads.

    Logits are softcap·tanh(scale·(hidden·weightᵀ + bias)/softcap), as the models make them; the terms are those of
    `generalized_jsd` and cross-entropy.

    Args:
        student_hidden: [N, H].
        student_weight: [V, H].
        labels: [N], already shifted: row i predicts labels[i]; −100 is ignored.
        teacher_hidden, teacher_weight: [N, H'] and [V, H'], no graph; or None with `targets` or with kd_weight 0.
        targets: a top-k teacher instead: row i is the teacher of token i, [N, K].
        kd_weight, ce_weight: ≥ 0.
        ce_mask: [N] bool, tokens that take part in the cross-entropy; None is all. The others still count in D.
        beta, temperature, divergence, tail: as in `generalized_jsd` and `topk_divergence`.
        num_items: D; None is the number of supervised tokens.
        student_bias, teacher_bias: [V]. With −inf in one of them (a masked column) the loss takes a slower way.
        student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap: what a model does to its logits.
        chunk_tokens: C; None chooses from vocabulary and device. The result does not depend on it.

    Gradients flow to student_hidden, student_weight and student_bias; a frozen head costs no gradient. They are
    computed with the loss, in float32 whatever the inputs' dtype, and can be asked for once. Value and gradients of
    float32 inputs are within 1e-5 (relative) of float64 at every β; the value of a divergence below 0.01 nats per token
    is within 1e-7 nats instead.

    Raises:
        ValueError: shapes that do not fit, labels outside the vocabulary (on a CPU), weights or β out of range, or no
            teacher for a positive kd_weight.

    Equals `dense_distillation_loss` on the logits. Source of the method: the closed-form gradients are in `tile.py`;
    the idea of fusing head and loss is Wijmans et al. 2024, https://arxiv.org/abs/2411.09009.
    """
    options = TileOptions(kd_weight, ce_weight, beta, temperature, divergence)
    teacher = None
    if teacher_weight is not None:
        teacher = Head(teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
    return head_distillation_loss(
        student_hidden,
        Head(student_weight, student_bias, student_logit_scale, student_softcap),
        labels,
        options,
        teacher_hidden,
        teacher,
        targets=targets,
        tail=tail,
        ce_mask=ce_mask,
        num_items=num_items,
        chunk_tokens=chunk_tokens,
    )


def head_distillation_loss(
    student_hidden: torch.Tensor,
    student: Head,
    labels: torch.Tensor,
    options: TileOptions,
    teacher_hidden: torch.Tensor | None = None,
    teacher: Head | None = None,
    *,
    targets: TopKLogprobs | None = None,
    tail: Tail = "bucket",
    ce_mask: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> FusedLoss:
    """`fused_distillation_loss` for heads that are objects already, as a model's forward hands them over.

    Raises:
        ValueError: as there.
    """
    _check(student_hidden, student.weight, labels, teacher_hidden, teacher, targets, options)
    if teacher is not None and teacher_hidden is not None:
        teacher, teacher_hidden = replace(teacher, weight=teacher.weight.detach()), teacher_hidden.detach()
    # Inside an autograd function gradients are always off: whether they are wanted is known here only.
    wanted = torch.is_grad_enabled()
    call = _Call(student, teacher, teacher_hidden, targets, tail, options, ce_mask, num_items, chunk_tokens, wanted)
    if student.masks_columns() or (teacher is not None and teacher.masks_columns()):
        return _with_masked_columns(student_hidden, labels, call)
    loss, *sums = _Fused.apply(student_hidden, student.weight, student.bias, labels, call)
    return _to_fused_loss(loss, sums, call)


@dataclass(frozen=True)
class _Call:
    """Everything of a call that takes no gradient."""

    student: Head
    teacher: Head | None
    teacher_hidden: torch.Tensor | None
    targets: TopKLogprobs | None
    tail: Tail
    options: TileOptions
    ce_mask: torch.Tensor | None
    num_items: torch.Tensor | int | None
    chunk_tokens: int | None
    with_gradient: bool

    @property
    def has_teacher(self) -> bool:
        return self.teacher is not None or self.targets is not None


class _Fused(torch.autograd.Function):
    """Loss and gradients in one forward pass; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        call: _Call,
    ) -> tuple[torch.Tensor, ...]:
        wanted = tuple(needed and call.with_gradient for needed in ctx.needs_input_grad[:3])
        # Unsupervised tokens are left out from here on. On a GPU the host waits here, once a call, for their number.
        rows = (labels != IGNORE_INDEX).nonzero().squeeze(1)
        half = None
        if hidden.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            half = torch.get_autocast_dtype("cuda")  # the type in which the model would have made its logits
        run = _Run(hidden.index_select(0, rows), labels.index_select(0, rows), rows, call, wanted, half)
        with torch.autocast(hidden.device.type, enabled=False):
            run.all_chunks()
        # Not by save_for_backward: they are neither inputs nor outputs, and backward scales them in place.
        ctx.run_gradients = [run.grad_hidden, run.grad_weight, run.grad_bias]
        ctx.left_to_scale, ctx.rows, ctx.tokens = run.left_to_scale, rows, len(hidden)
        ctx.wanted, ctx.dtypes = wanted, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        sums = run.packed_sums()
        options = call.options
        loss = (options.kd_weight * sums[0] + options.ce_weight * sums[1]) * run.inverse_items
        ctx.mark_non_differentiable(*sums)
        return loss, *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        if ctx.run_gradients is None:
            raise RuntimeError("The fused loss keeps its gradients for one backward pass; this is the second.")
        # In place: the head's gradient can be the largest tensor of the step. A second pass would scale it again.
        gradients, ctx.run_gradients = ctx.run_gradients, None
        # All factors at once and in float32, then one rounding: 1/D alone can be too small a number for fp16.
        scale = ctx.left_to_scale * loss_gradient
        result: list[torch.Tensor | None] = []
        for gradient, wanted, dtype in zip(gradients, ctx.wanted, ctx.dtypes, strict=True):
            result.append(gradient.mul_(scale).to(dtype) if wanted else None)
        if result[0] is not None and len(ctx.rows) != ctx.tokens:  # zeros for the tokens that were left out
            all_tokens = result[0].new_zeros(ctx.tokens, result[0].shape[1])
            result[0] = all_tokens.index_copy_(0, ctx.rows, result[0])
        return (*result, None, None)


class _Run:
    """One forward pass over the chunks of the supervised tokens."""

    def __init__(
        self,
        hidden_SH: torch.Tensor,
        labels_S: torch.Tensor,
        rows: torch.Tensor,
        call: _Call,
        wanted: tuple[bool, ...],
        half: torch.dtype | None,
    ) -> None:
        self.labels, self.rows, self.call = labels_S, rows, call
        self.hidden, weight = one_dtype(hidden_SH, call.student.weight, half)
        self.student = replace(call.student, weight=weight)
        self.teacher, self.teacher_hidden = call.teacher, call.teacher_hidden
        if call.teacher is not None and call.teacher_hidden is not None:
            self.teacher_hidden, weight = one_dtype(call.teacher_hidden, call.teacher.weight, half)
            self.teacher = replace(call.teacher, weight=weight)
        self.wants_hidden, self.wants_weight, self.wants_bias = wanted
        self.dtype = torch.promote_types(hidden_SH.dtype, torch.float32)
        device = hidden_SH.device
        tokens = torch.tensor(len(labels_S), device=device)
        self.num_tokens = tokens
        self.inverse_items = 1 / normaliser(call.num_items, tokens).to(self.dtype)
        self.ce_rows = None if call.ce_mask is None else call.ce_mask.to(device)[rows].to(self.dtype)
        # A gradient is (g · scale) · left_to_scale: g is the tile's, with the terms' weights in it; `scale` is the
        # head's logit scale, a factor of each product; `left_to_scale`, 1/D, comes last, in backward, as a tensor: so
        # that D, which may still be on its way on a GPU, need not be waited for.
        self.options, self.left_to_scale = call.options, self.inverse_items
        self.scale = float(call.student.logit_scale)
        self.half = None
        if HalfGradients.fit(hidden_SH, call.student.weight) and len(labels_S):
            # Products that end as bfloat16 are rounded once: all factors, 1/D as well, go in before that. On a CPU
            # reading D costs nothing. The tile's g is made with weights times `unit`, and `scale` takes it out again.
            factor = self.scale * float(self.inverse_items)
            unit = power_of_two_unit(factor, call.options.ce_weight or call.options.kd_weight)
            self.options, self.scale = call.options.scaled(unit), factor / unit
            self.left_to_scale = torch.ones(())
            self.half = HalfGradients(hidden_SH, call.student.weight, self.scale, self.wants_hidden, self.wants_weight)
        empty = torch.zeros(0, device=device)
        own_hidden, own_weight = (wants and self.half is None for wants in (self.wants_hidden, self.wants_weight))
        self.grad_hidden = torch.empty_like(hidden_SH, dtype=self.dtype) if own_hidden else empty
        self.grad_weight = torch.zeros_like(call.student.weight, dtype=self.dtype) if own_weight else empty
        self.grad_bias = (
            torch.zeros(len(call.student.weight), dtype=self.dtype, device=device) if self.wants_bias else empty
        )
        self.sums: list[TileSums] = []

    def all_chunks(self) -> None:
        """Compute everything, chunk by chunk, in buffers that are made once."""
        call, (tokens, vocabulary) = self.call, (len(self.labels), self.call.student.weight.shape[0])
        sizes = chunk_sizes(tokens, call.chunk_tokens or default_chunk(vocabulary, self.dtype, self.hidden.device))
        if not sizes:
            return
        tile = sizes[0], vocabulary, self.dtype, self.hidden.device
        student = workspace.take("student", *tile)
        teacher = workspace.take("teacher", *tile) if call.teacher is not None else None
        block = max(1, _BLOCK_VALUES // vocabulary) if student.device.type == "cpu" else sizes[0]
        scratch = Buffers.like(student, min(block, sizes[0]))
        start = 0
        for size in sizes:  # the last chunks may be a row shorter than the buffers
            chunk = slice(start, start + size)
            self._chunk(chunk, student[:size], None if teacher is None else teacher[:size], block, scratch)
            start += size
        if self.half is not None:
            self.grad_hidden, self.grad_weight = self.half.finish()

    def _chunk(
        self, chunk: slice, student: torch.Tensor, teacher: torch.Tensor | None, block: int, scratch: Buffers
    ) -> None:
        """Logits of a chunk into `student` and `teacher`, their gradient over `student`, then the products of that."""
        head, hidden = self.student, self.hidden[chunk]
        head.logits(hidden, student)
        if teacher is not None and self.teacher is not None and self.teacher_hidden is not None:
            # The teacher's hidden states are of all tokens: gathered a chunk at a time, they are never copied whole.
            self.teacher.logits(self.teacher_hidden.index_select(0, self.rows[chunk]), teacher)
        with_gradient = self.wants_hidden or self.wants_weight or self.wants_bias
        # After this loop `student` holds d loss/d(hidden · weightᵀ + bias), but for `scale` and `left_to_scale`.
        for first in range(0, len(student), block):
            inside = slice(first, min(first + block, len(student)))
            self._block(
                slice(chunk.start + inside.start, chunk.start + inside.stop),
                student[inside],
                None if teacher is None else teacher[inside],
                scratch.rows(inside.stop - inside.start),
                with_gradient,
            )
        if self.wants_bias:
            self.grad_bias.add_(student.sum(0), alpha=self.scale)
        if self.half is not None:
            self.half.add(chunk, student)
            return
        if self.wants_hidden:
            self.grad_hidden[chunk] = hidden_gradient(student, head.weight, self.scale)
        if self.wants_weight:
            add_weight_gradient(self.grad_weight, student, hidden, self.scale)

    def _block(
        self, rows: slice, student: torch.Tensor, teacher: torch.Tensor | None, scratch: Buffers, with_gradient: bool
    ) -> None:
        """All terms of some rows; their gradient with respect to the raw logits is left in `student`."""
        call = self.call
        softcap = call.student.softcap if with_gradient else None
        # The derivative of y = softcap·tanh(x/softcap) is 1 − (y/softcap)². It needs y, which the gradient is about to
        # overwrite.
        slope = None if softcap is None else (student / softcap).square_().neg_().add_(1)
        common = (
            self.labels[rows],
            None if self.ce_rows is None else self.ce_rows[rows],
            self.options,
            scratch,
            with_gradient,
        )
        if call.targets is not None:
            # Row i of the targets is token i of the call, as with the teacher's hidden states.
            targets = call.targets[self.rows[rows].to(call.targets.indices.device)].to(student.device)
            self.sums.append(topk_tile_terms(student, targets, call.tail, *common))
        else:
            terms = _compiled_tile_terms() if _compiles(student.device) else tile_terms
            self.sums.append(terms(student, teacher, *common))
        if slope is not None:
            student.mul_(slope)

    def packed_sums(self) -> list[torch.Tensor]:
        """kd, ce, tokens, correct, agree, student entropy, teacher entropy: scalars, 0 where there is no teacher."""

        def total(name: str) -> torch.Tensor:
            values = [getattr(one, name) for one in self.sums if getattr(one, name) is not None]
            zero = torch.zeros((), dtype=self.dtype, device=self.labels.device)
            return torch.stack(values).sum() if values else zero

        names = ("kd", "ce", "correct", "agree", "student_entropy", "teacher_entropy")
        kd, ce, correct, agree, student_entropy, teacher_entropy = (total(name) for name in names)
        return [kd, ce, self.num_tokens, correct, agree, student_entropy, teacher_entropy]


def _compiles(device: torch.device) -> bool:
    """Whether the element-wise part runs as generated kernels: on a GPU some fifteen passes over memory become a few.

    On a CPU the blocks stay in the cache, and compiling would cost seconds and need a compiler.
    """
    return device.type == "cuda"


@functools.cache
def _compiled_tile_terms() -> Callable[..., TileSums]:
    return torch.compile(tile_terms)


def default_chunk(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a chunk: as many as two logit tiles of the budget hold, at least 64 and, on a CPU, at most 256."""
    budget = _TILE_BYTES.get(device.type, _TILE_BYTES["cuda"])
    largest = 256 if device.type == "cpu" else 8192
    return min(max(budget // (2 * vocabulary * dtype.itemsize), 64), largest)


def chunk_sizes(tokens: int, chunk: int) -> list[int]:
    """`tokens` in as few chunks as are needed, as equal as they can be, the larger ones first."""
    count = math.ceil(tokens / chunk)
    return [tokens // count + (i < tokens % count) for i in range(count)]


def _to_fused_loss(loss: torch.Tensor, sums: list[torch.Tensor], call: _Call) -> FusedLoss:
    kd, ce, tokens, correct, agree, student_entropy, teacher_entropy = sums
    with_teacher = call.has_teacher
    return FusedLoss(
        loss=loss,
        kd_sum=kd if with_teacher and call.options.kd_weight > 0 else None,
        ce_sum=ce,
        num_tokens=tokens,
        num_correct=correct,
        num_agree=agree if with_teacher else None,
        student_entropy_sum=student_entropy,
        teacher_entropy_sum=teacher_entropy if with_teacher else None,
    )


def _with_masked_columns(hidden: torch.Tensor, labels: torch.Tensor, call: _Call) -> FusedLoss:
    """The same sums from whole logits that autograd knows, for heads that mask columns."""
    if call.targets is not None:
        raise ValueError(
            "top-k targets and a head whose bias is −inf for some tokens cannot be combined: slice those tokens off"
        )
    teacher_logits = None
    with torch.autocast(hidden.device.type, enabled=False):
        if call.teacher is not None and call.teacher_hidden is not None:
            teacher_logits = call.teacher.differentiable_logits(call.teacher_hidden)
        return dense_distillation_loss(
            call.student.differentiable_logits(hidden),
            labels,
            teacher_logits,
            kd_weight=call.options.kd_weight,
            ce_weight=call.options.ce_weight,
            ce_mask=call.ce_mask,
            beta=call.options.beta,
            temperature=call.options.temperature,
            divergence=call.options.divergence,
            num_items=call.num_items,
        )


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher: Head | None,
    targets: TopKLogprobs | None,
    options: TileOptions,
) -> None:
    check_divergence_arguments(options.beta, options.temperature, options.divergence)
    if not (0 <= options.kd_weight < math.inf and 0 <= options.ce_weight < math.inf):
        raise ValueError(
            f"weights must be non-negative and finite, got kd_weight={options.kd_weight}, ce_weight={options.ce_weight}"
        )
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "expected student_hidden [N, H], student_weight [V, H] and labels [N], got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if (teacher_hidden is None) != (teacher is None):
        raise ValueError("teacher_hidden and teacher_weight belong together: pass both or neither")
    if teacher_hidden is not None and targets is not None:
        raise ValueError("pass a teacher's hidden states and head, or its top-k targets, not both")
    if options.kd_weight > 0 and teacher_hidden is None and targets is None:
        raise ValueError(
            f"kd_weight is {options.kd_weight}, but there is no teacher: pass teacher_hidden and teacher_weight, "
            "or targets, or kd_weight=0"
        )
    if teacher_hidden is not None and teacher is not None:
        _check_teacher(hidden, weight, teacher_hidden, teacher.weight)
    if targets is not None:
        check_targets(targets, len(labels), weight.shape[0])
    if labels.device.type == "cpu" and labels.numel():  # on a GPU the host would have to wait for the device
        used = labels[labels != IGNORE_INDEX]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < weight.shape[0]:
            raise ValueError(
                f"labels must be {IGNORE_INDEX} or in [0, {weight.shape[0]}), "
                f"got {int(used.min())} to {int(used.max())}"
            )


def _check_teacher(
    hidden: torch.Tensor, weight: torch.Tensor, teacher_hidden: torch.Tensor, teacher_weight: torch.Tensor
) -> None:
    if teacher_hidden.ndim != 2 or len(teacher_hidden) != len(hidden):
        raise ValueError(
            f"expected teacher_hidden [N, H'] for the same {len(hidden)} tokens, got {tuple(teacher_hidden.shape)}"
        )
    if teacher_weight.ndim != 2 or teacher_weight.shape[1] != teacher_hidden.shape[1]:
        raise ValueError(f"expected teacher_weight [V, {teacher_hidden.shape[-1]}], got {tuple(teacher_weight.shape)}")
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"the student's head has {weight.shape[0]} rows and the teacher's {teacher_weight.shape[0]}: both must be "
            "over one vocabulary; slice off the padding of the longer one"
        )
