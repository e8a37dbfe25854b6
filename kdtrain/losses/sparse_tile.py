"""As `tile.py`, for a teacher that is known at each position by some tokens only: its top k, or tokens drawn from it.

Shapes and names are those of `tile.py`; K known tokens.
"""

from __future__ import annotations

import torch

from kdtrain.losses.divergence import entropy, generalized_jsd
from kdtrain.losses.mixture import Mixed, MixedTopK
from kdtrain.losses.sampled import SampledTargets, most_drawn
from kdtrain.losses.tile import (
    Buffers,
    RowWeights,
    TileOptions,
    TileSums,
    coefficient_of,
    log_sum,
    subtract,
    subtract_at,
    tile_terms,
    total_of,
)
from kdtrain.losses.topk import TopKLogprobs, teacher_tail


def topk_tile_terms(
    student: torch.Tensor,
    targets: TopKLogprobs | MixedTopK,
    labels: torch.Tensor,
    rows: RowWeights,
    options: TileOptions,
    scratch: Buffers,
    with_gradient: bool,
) -> TileSums:
    """As `tile_terms`, for a teacher that is known by its k most likely tokens, or the mean of several.

    The divergence is one of [R, K + 1] log-probabilities, small enough for autograd. With a its gradient with respect
    to them, that with respect to z is a at the known tokens and a_tail·p/Σ_tail p at the others: it does not depend on
    the common shift of the log-probabilities, so that Σ a = 0.
    """
    p = scratch.p
    # Without a teacher: p is left in scratch, and the student's logits stay what they are.
    sums = tile_terms(student, None, labels, rows, options, scratch, with_gradient=False)
    largest = student.amax(-1, keepdim=True)
    log_z = largest + log_sum(p)
    indices, teacher = _teacher(targets, student, options)
    missing = indices < 0  # a row may name fewer than K tokens: the rest of it is −1, and takes no part
    ids, count = indices.clamp(min=0), indices.shape[1]
    known = (student.gather(1, ids) - log_z).masked_fill(missing, -torch.inf)
    if options.tail == "bucket":
        # From the logits: the probabilities of a tail that the student finds impossible are 0 in float32.
        others, total, log_others = _tail(student, ids, missing, scratch)
        everything = (~missing).sum(-1, keepdim=True) == student.shape[1]
        known = torch.cat([known, log_others - log_z], 1)
    teacher_entropy = entropy(teacher.at_one)
    with torch.enable_grad():
        known.requires_grad_(with_gradient)
        values = generalized_jsd(
            known,
            teacher.softened,
            options.beta,
            options.temperature,
            options.divergence,
            options.params,
            teacher_entropy,
        )
        kd = total_of(values[:, None], rows.kd)
    sums.kd = kd.detach()
    top = torch.where(missing, -torch.inf, teacher.at_one[:, :count]).argmax(-1, keepdim=True)
    sums.agree = (student.gather(1, ids.gather(1, top)) == largest).sum()
    sums.teacher_entropy = teacher_entropy.sum()
    if with_gradient:
        coefficient = coefficient_of(options.ce_weight, rows.ce)
        (gradient,) = torch.autograd.grad(kd, known)
        gradient = gradient * options.kd_weight
        at_known = torch.where(missing, 0.0, gradient[:, :count])
        # Over the student's logits: first the tail, in its shares of p, then the known tokens, then the cross-entropy.
        if options.tail == "bucket":
            in_tail = gradient[:, count:].masked_fill(everything, 0.0)
            torch.mul(others, in_tail / total.masked_fill(total == 0, 1.0), out=student)
        else:
            student.zero_()
        student.scatter_add_(1, ids, at_known)
        if isinstance(coefficient, torch.Tensor):
            student.addcmul_(p, coefficient)
        elif coefficient != 0:
            student.add_(p, alpha=coefficient)
        subtract_at(student, labels, coefficient)
    return sums


def _teacher(
    targets: TopKLogprobs | MixedTopK, student: torch.Tensor, options: TileOptions
) -> tuple[torch.Tensor, Mixed]:
    """Ids [R, K], and the teacher's log-probabilities of them, [R, K], with a bucket behind them [R, K + 1]."""
    if isinstance(targets, MixedTopK):
        return targets.known(student.shape[1], options.temperature)
    teacher = targets.logprobs.to(student.dtype)
    if options.tail == "bucket":
        everything = (targets.indices >= 0).sum(-1, keepdim=True) == student.shape[1]
        teacher = torch.cat([teacher, teacher_tail(teacher, everything)], 1)
    return targets.indices, Mixed(teacher, teacher)


def _tail(
    student: torch.Tensor, ids: torch.Tensor, missing: torch.Tensor, scratch: Buffers
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(z − c) of the tokens that are not known, 0 for the others [R, V]; their sum [R, 1], and log Σ exp z of them.

    Known ones become −∞ one by one: a mask of the vocabulary would be two more passes over it. A missing entry stands
    for a known one of its row, and where a row has none, its logit is written over itself.
    """
    a_known = ids.gather(1, missing.int().argmin(-1, keepdim=True))
    places = torch.where(missing, a_known, ids)
    written = torch.where(missing.all(-1, keepdim=True), student.gather(1, places), -torch.inf)
    others = scratch.work.copy_(student).scatter_(1, places, written)
    shift = others.amax(-1, keepdim=True)
    shift.masked_fill_(shift == -torch.inf, 0.0)  # nothing is left: exp(−∞) = 0
    total = others.sub_(shift).exp_().sum(-1, keepdim=True)
    return others, total, total.log() + shift


def sampled_tile_terms(
    student: torch.Tensor,
    targets: SampledTargets,
    labels: torch.Tensor,
    rows: RowWeights,
    options: TileOptions,
    scratch: Buffers,
    with_gradient: bool,
) -> TileSums:
    """As `tile_terms`, for a teacher that is known by tokens drawn from its distribution at the loss's temperature."""
    p, inverse = scratch.p, 1 / options.temperature
    # Without a teacher: p is left in scratch, and the student's logits stay what they are.
    sums = tile_terms(student, None, labels, rows, options, scratch, with_gradient=False)
    ids, weights = targets.indices.clamp(min=0), targets.weights.to(student.dtype)  # a missing entry weighs nothing
    largest = student.amax(-1, keepdim=True)
    sums.agree = (student.gather(1, most_drawn(targets)) == largest).sum()
    below_largest = (student.gather(1, ids) - largest) * inverse
    softened = p if inverse == 1 else torch.softmax(student.mul_(inverse), -1, out=scratch.q)
    # From the largest logit and the largest probability: log Z alone is a number of ten, with a rounding of its own.
    log_p = below_largest - log_sum(softened)
    divergence = torch.xlogy(weights, weights).sub_(weights * log_p).sum(-1, keepdim=True)
    sums.kd = total_of(divergence.clamp_(min=0), rows.kd)
    if with_gradient:
        coefficient = coefficient_of(options.ce_weight, rows.ce)
        factor = coefficient_of(options.kd_weight * inverse, rows.kd)
        if softened is p:
            torch.mul(p, coefficient + factor, out=student)
        else:
            subtract(torch.mul(p, coefficient, out=student), softened, -factor, out=student)
        student.scatter_add_(1, ids, weights * -factor)
        subtract_at(student, labels, coefficient)
    return sums
