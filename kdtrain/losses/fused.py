"""Cross-entropy, divergence and metrics without the logits: one pass over tiles of [tokens, vocabulary].

Shapes: N tokens, S of them supervised, C tokens of one chunk, H hidden width (each model has its own), V vocabulary.

The logits are what full-vocabulary distillation runs out of memory for: at 4096 tokens and 152k words those of two
models with their gradients take over 10 GB. Here, for each chunk of supervised tokens, both models' logits are made
once in reused buffers, all terms and metrics come from the same tile, the closed-form gradient is written over the
student's logits, and from there it goes at once into the gradients of the hidden state and the head. The backward pass
only scales. Nothing is computed twice; memory is O(C·V) beside the gradients themselves.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from kdtrain.errors import TargetsError
from kdtrain.losses.by_chunks import dense_loss_by_chunks
from kdtrain.losses.chunks import Call
from kdtrain.losses.divergence import check_divergence_arguments
from kdtrain.losses.fused_function import Fused, FusedThroughModule
from kdtrain.losses.head import Head
from kdtrain.losses.kinds import DEFAULT_PARAMS, Divergence, DivergenceParams, Stretch, Tail
from kdtrain.losses.mixture import Mixed, MixedHeads, mix_logits
from kdtrain.losses.module_pass import trained_of
from kdtrain.losses.reduce import IGNORE_INDEX, FusedLoss, check_token_weights
from kdtrain.losses.sampled import SampledTargets, SparseTargets, check_sampled_targets
from kdtrain.losses.tile import TileOptions
from kdtrain.losses.topk import check_targets


def fused_distillation_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    *,
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
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> FusedLoss:
    """kd_weight · Σ w · divergence / num_kd_items + ce_weight · Σ v · cross-entropy / num_items, from hidden states.

    Logits are softcap·tanh(scale·(hidden·weightᵀ + bias)/softcap), as the models make them; the terms are those of
    `generalized_jsd` and cross-entropy.

    Args:
        student_hidden: [N, H].
        student_weight: [V, H].
        labels: [N], already shifted: row i predicts labels[i]; −100 is ignored.
        teacher_hidden, teacher_weight: [N, H'] and [V, H'], no graph; or None with `targets` or with kd_weight 0.
        targets: a top-k teacher instead, or tokens drawn from one: row i is the teacher of token i, [N, K]. Drawn
            tokens want β 0, forward KL: of every other divergence their gradient is wrong in the mean.
        kd_weight, ce_weight: ≥ 0.
        kd_token_weights: [N], ≥ 0, w: what the divergence of each token counts; None is 1 for all. Where there is no
            cross-entropy, tokens of weight 0 cost no gradient.
        ce_token_weights: [N], ≥ 0, v: what the cross-entropy of each token counts, or bool, which take part in it; None
            is 1 for all. D counts all of them whatever they are.
        beta, temperature, divergence, tail, params: as in `generalized_jsd`, `topk_divergence`, `sampled_divergence`.
        num_items: D; None is the number of supervised tokens.
        num_kd_items: D_kd, beside `kd_token_weights`; None is D where that is given, and else the number of supervised
            tokens whose weight is above 0.
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
    options = TileOptions(kd_weight, ce_weight, beta, temperature, divergence, tail, params)
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
        kd_token_weights=kd_token_weights,
        ce_token_weights=ce_token_weights,
        num_items=num_items,
        num_kd_items=num_kd_items,
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
    mixed: MixedHeads | None = None,
    targets: SparseTargets | None = None,
    kd_token_weights: torch.Tensor | None = None,
    ce_token_weights: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
    num_kd_items: torch.Tensor | int | None = None,
    chunk_tokens: int | None = None,
    stretches: Sequence[Stretch] | None = None,
) -> FusedLoss:
    """`fused_distillation_loss` for heads that are objects already, as a model's forward hands them over.

    Args:
        stretches: the tokens in their order, by what compares them with their teacher; the divergence and β of
            `options` are then not read. They also say that all are supervised, and how many are taught. None looks at
            labels and weights, for which the host waits on a GPU.
        mixed: several teachers in place of one: the divergence is from the mean of their distributions, which is made
            chunk by chunk as well.

    Raises:
        ValueError: as there.
    """
    _check(student_hidden, student.weight, labels, teacher_hidden, teacher, mixed, options, targets is not None)
    for one in (options,) if stretches is None else map(options.of, stretches):
        _check_divergence(one, targets, len(labels), len(student.weight))
    check_token_weights(labels, kd_token_weights=kd_token_weights, ce_token_weights=ce_token_weights)
    if teacher is not None and teacher_hidden is not None:
        teacher, teacher_hidden = replace(teacher, weight=teacher.weight.detach()), teacher_hidden.detach()
    # Inside an autograd function gradients are always off: whether they are wanted is known here only.
    wanted = torch.is_grad_enabled()
    call = Call(
        student=student,
        teacher=teacher,
        teacher_hidden=teacher_hidden,
        mixed=mixed,
        targets=targets,
        options=options,
        kd_token_weights=kd_token_weights,
        ce_token_weights=ce_token_weights,
        num_items=num_items,
        num_kd_items=num_kd_items,
        chunk_tokens=chunk_tokens,
        with_gradient=wanted,
        stretches=stretches,
    )
    heads = [*([] if teacher is None else [teacher]), *(() if mixed is None else mixed.heads)]
    if student.masks_columns() or any(head.masks_columns() for head in heads):
        return _with_masked_columns(student_hidden, labels, call)
    if student.module is not None:
        loss, *sums = FusedThroughModule.apply(student_hidden, labels, call, *trained_of(student.module).values())
    else:
        loss, *sums = Fused.apply(student_hidden, student.weight, student.bias, labels, call)
    return _to_fused_loss(loss, sums, call)


def _to_fused_loss(loss: torch.Tensor, sums: list[torch.Tensor], call: Call) -> FusedLoss:
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
        teacher_entropy_sum=teacher_entropy if call.has_teacher_entropy else None,
    )


def _with_masked_columns(hidden: torch.Tensor, labels: torch.Tensor, call: Call) -> FusedLoss:
    """The same sums from logits that autograd knows, a chunk of tokens at a time, for heads that mask columns."""
    head: Head | None = call.student
    if call.student.module is not None:  # which runs as in its model; its logits are then made at once
        hidden, head = call.student.differentiable_logits(hidden), None
    with torch.autocast(hidden.device.type, enabled=False):
        return dense_loss_by_chunks(
            hidden,
            labels,
            call.options,
            None if call.teacher is None and call.mixed is None else functools.partial(_teacher_logits, call),
            head=head,
            targets=call.targets,
            kd_token_weights=call.kd_token_weights,
            ce_token_weights=call.ce_token_weights,
            num_items=call.num_items,
            num_kd_items=call.num_kd_items,
            chunk_tokens=call.chunk_tokens,
            stretches=call.stretches,
        )


def _teacher_logits(call: Call, rows: slice) -> Mixed:
    """Of some tokens of a call."""
    with torch.no_grad():
        if call.mixed is not None:
            pairs = zip(call.mixed.hidden, call.mixed.heads, strict=True)
            of_each = [head.differentiable_logits(one[rows]) for one, head in pairs]
            return mix_logits(of_each, call.mixed.shares, call.options.temperature)
        assert call.teacher is not None
        assert call.teacher_hidden is not None
        logits = call.teacher.differentiable_logits(call.teacher_hidden[rows])
        return Mixed(logits, logits)


def _check(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher: Head | None,
    mixed: MixedHeads | None,
    options: TileOptions,
    has_targets: bool,
) -> None:
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
    if sum((teacher_hidden is not None, mixed is not None, has_targets)) > 1:
        raise ValueError("pass a teacher's hidden states and head, or targets, not both")
    if options.kd_weight > 0 and teacher_hidden is None and mixed is None and not has_targets:
        raise ValueError(
            f"kd_weight is {options.kd_weight}, but there is no teacher: pass teacher_hidden and teacher_weight, "
            "or targets, or kd_weight=0"
        )
    if teacher_hidden is not None and teacher is not None:
        _check_teacher(hidden, weight, teacher_hidden, teacher.weight)
    for one, head in zip(mixed.hidden, mixed.heads, strict=True) if mixed is not None else ():
        _check_teacher(hidden, weight, one, head.weight)
    if labels.device.type == "cpu" and labels.numel():  # on a GPU the host would have to wait for the device
        used = labels[labels != IGNORE_INDEX]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < weight.shape[0]:
            raise ValueError(
                f"labels must be {IGNORE_INDEX} or in [0, {weight.shape[0]}), "
                f"got {int(used.min())} to {int(used.max())}"
            )


def _check_divergence(options: TileOptions, targets: SparseTargets | None, tokens: int, vocabulary: int) -> None:
    check_divergence_arguments(options.beta, options.temperature, options.divergence)
    if isinstance(targets, SampledTargets):
        check_sampled_targets(targets, tokens, vocabulary, options.beta, options.divergence)
    elif targets is not None:
        check_targets(targets, tokens, vocabulary, options.tail, options.divergence)


def _check_teacher(
    hidden: torch.Tensor, weight: torch.Tensor, teacher_hidden: torch.Tensor, teacher_weight: torch.Tensor
) -> None:
    if teacher_hidden.ndim != 2 or len(teacher_hidden) != len(hidden):
        raise TargetsError(
            f"expected teacher_hidden [N, H'] for the same {len(hidden)} tokens, got {tuple(teacher_hidden.shape)}"
        )
    if teacher_weight.ndim != 2 or teacher_weight.shape[1] != teacher_hidden.shape[1]:
        raise TargetsError(
            f"expected teacher_weight [V, {teacher_hidden.shape[-1]}], got {tuple(teacher_weight.shape)}"
        )
    if teacher_weight.shape[0] != weight.shape[0]:
        raise TargetsError(
            f"the student's head has {weight.shape[0]} rows and the teacher's {teacher_weight.shape[0]}: both must be "
            "over one vocabulary; slice off the padding of the longer one"
        )
