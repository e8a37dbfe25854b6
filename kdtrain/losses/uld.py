"""Universal logit distillation: sorted probabilities of two vocabularies, side by side.

Shapes: S supervised tokens of the student, S' of the teacher, C slots, K of them filled, V and V' vocabularies.

For each chunk of text that tokens of both make up:

    p = s · softmax(z) at its last token, s the product of the likelihoods of its tokens before that one (at least 1e-8)
    ULD = Σ_i | sort(p)_i − sort(q)_i |, q the teacher's, the smaller vocabulary padded with zeros

With σ the signs of these differences, put back to the tokens that they belong to, and u = s·σ:

    ∂ULD/∂z = softmax(z) · (u − Σ softmax(z)·u)        ∂ULD/∂ log s = Σ softmax(z)·u

The last is what the labels in front of the last one get, through `label_pass.py`.

Source: Boizard et al. 2024, https://arxiv.org/abs/2402.12030, as TRL's GOLDTrainer extends it to merged tokens
(`uld_token_merge_strategy: bayesian`; its default, `observed`, takes the logits of the next position). TRL divides by
the chunks of a row, and then by the rows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdtrain.losses.chunks import Call, ChunkedPass
from kdtrain.losses.head import Head
from kdtrain.losses.label_pass import Known, LabelLoss, label_call, label_logprobs_of_logits, label_pass
from kdtrain.losses.reduce import FusedLoss, normaliser
from kdtrain.losses.slots import Made, Slots, fused_loss, label_metrics, sums_of_slots
from kdtrain.losses.tile import Buffers, TileOptions

_LEAST = math.log(1e-8)


@dataclass(frozen=True)
class UldTargets:
    """A teacher's distributions at its own tokens of the text (`rlhf.cross_tokenizer: uld`)."""

    slots: torch.Tensor
    """[S] long: the slot of each of the student's supervised tokens; C where it has none."""
    count: int
    """C."""
    outputs: torch.Tensor
    """Of the teacher: hidden states [S', H'] with `head`, or logits [S', V']."""
    head: Head | None
    labels: torch.Tensor
    """[S']: the teacher's tokens."""
    teacher_slots: torch.Tensor
    """[S'], as `slots`."""
    filled: torch.Tensor | None = None
    """[K] long: the slots with tokens of both models that weigh more than 0. None finds them, for which the host waits
    on a GPU."""

    def to(self, device: torch.device) -> UldTargets:
        names = ("slots", "outputs", "labels", "teacher_slots", *(() if self.filled is None else ("filled",)))
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def find_filled(self, weights_C: torch.Tensor) -> torch.Tensor:
        """`filled`, of slots of these weights."""
        if self.filled is not None:
            return self.filled
        return ((weights_C > 0) & (last_tokens(self.teacher_slots, self.count) >= 0)).nonzero()[:, 0]


@dataclass(frozen=True)
class _Bases:
    """The last tokens of the K filled slots, of one model, and what stands in front of them."""

    tokens: torch.Tensor
    """[K]: their numbers."""
    before: torch.Tensor
    """[K]: log s."""

    @classmethod
    def of(cls, slots: torch.Tensor, count: int, logprobs: torch.Tensor, filled: torch.Tensor) -> _Bases:
        last = last_tokens(slots, count)
        in_front = torch.where(is_in_front(slots, last), logprobs.clamp(min=_LEAST), 0.0)
        return cls(last[filled], sums_of_slots(in_front, slots, count)[filled])


def last_tokens(slots: torch.Tensor, count: int) -> torch.Tensor:
    """[C]: the last token of each slot, −1 of an empty one."""
    numbers = torch.arange(len(slots), device=slots.device)
    found = torch.full((count + 1,), -1, dtype=torch.long, device=slots.device)
    return found.scatter_reduce_(0, slots, numbers, "amax")[:count]


def is_in_front(slots: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Whether each token is in a slot, and not its last one."""
    ends = torch.cat([last, last.new_full((1,), -1)])[slots]
    return (slots < len(last)) & (ends != torch.arange(len(slots), device=slots.device))


def sorted_distance(
    p: torch.Tensor, q: torch.Tensor, s: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """ULD of rows of probabilities, [K]; and u, [K, V].

    Args:
        p, q: [K, V] and [K, V'].
        s, t: [K, 1].
    """
    values, order = p.sort(-1, descending=True)
    difference = s * values
    shared = min(p.shape[1], q.shape[1])
    teacher = t * q.sort(-1, descending=True).values
    difference[:, :shared] -= teacher[:, :shared]
    value = difference.abs().sum(-1) + teacher[:, shared:].sum(-1)
    return value, torch.empty_like(p).scatter_(1, order, s * difference.sign())


class _BasePass(ChunkedPass):
    """Values and gradients at the last tokens of chunks; `rows` are the teacher's numbers of them."""

    generates = False

    student_before: torch.Tensor
    teacher_before: torch.Tensor
    weights: torch.Tensor

    def _terms(
        self,
        rows: slice,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        scratch: Buffers,
        options: TileOptions,
        with_gradient: bool,
    ) -> None:
        assert teacher is not None
        p, q = torch.softmax(student, -1, out=scratch.p), torch.softmax(teacher, -1)
        s, t = (one[rows].exp()[:, None] for one in (self.student_before, self.teacher_before))
        value, u = sorted_distance(p, q, s, t)
        # Most signs are the same: counted from that of the likeliest token, Σ p·u is no sum of nearly s.
        common = u.gather(1, p.argmax(-1, keepdim=True))
        slope = (p * u.sub_(common)).sum(-1, keepdim=True)
        self.found.append((value, (slope + common)[:, 0]))
        weight = options.kd_weight * self.weights[rows][:, None]
        torch.mul(p, u.sub_(slope).mul_(weight), out=student)

    def all_chunks(self) -> None:
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []
        super().all_chunks()

    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """ULD and its derivative with respect to log s, [K]."""
        if not self.found:
            nothing = torch.zeros(0, dtype=self.dtype, device=self.labels.device)
            return nothing, nothing
        first, second = zip(*self.found, strict=True)
        return torch.cat(first), torch.cat(second)


def head_uld_loss(
    student_hidden: torch.Tensor,
    student: Head,
    labels: torch.Tensor,
    options: TileOptions,
    targets: UldTargets,
    *,
    ce_mask: torch.Tensor | None = None,
    kd_token_weights: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
    num_kd_items: torch.Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> FusedLoss:
    """kd_weight · Σ w·ULD / num_kd_items + ce_weight · Σ cross-entropy / num_items, without the logits.

    Arguments as of `head_chunk_loss`. Value and gradients of float32 inputs are within 1e-5 (relative) of float64.
    """
    common: dict[str, Any] = {"ce_mask": ce_mask, "kd_token_weights": kd_token_weights, "num_items": num_items}
    head = targets.head
    if student.module is not None or student.masks_columns() or head is None or head.masks_columns():
        logits = student.differentiable_logits(student_hidden)
        return dense_uld_loss(logits, labels, options, targets, num_kd_items=num_kd_items, **common)
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    slots = Slots.of(targets.slots, targets.count, kd_token_weights, num_kd_items, dtype)
    call = label_call(student, ce_mask=ce_mask, num_items=num_items, chunk_tokens=chunk_tokens)
    make = functools.partial(_made, options, targets, slots, call)
    loss, *sums = LabelLoss.apply(student_hidden, student.weight, student.bias, labels, call, make)
    return fused_loss(loss, sums)


def _made(options: TileOptions, targets: UldTargets, slots: Slots, call: Call, known: Known) -> Made:
    """The terms, for which a pass over the last tokens of chunks is made."""
    assert targets.head is not None
    logprobs, filled = known.logprobs, targets.find_filled(slots.weights)
    other_call = label_call(targets.head, chunk_tokens=call.chunk_tokens)
    of_teacher = label_pass(targets.outputs, targets.labels, other_call, known.half).logprobs()
    own = _Bases.of(targets.slots, targets.count, logprobs, filled)
    other = _Bases.of(targets.teacher_slots, targets.count, of_teacher, filled)
    of_bases = replace(
        call,
        teacher=targets.head,
        teacher_hidden=targets.outputs,
        options=replace(options, ce_weight=0.0),
        ce_token_weights=None,
        num_items=slots.num_items,
    )
    tokens = own.tokens
    base = _BasePass(
        known.hidden[tokens], known.labels[tokens], other.tokens, len(filled), of_bases, known.wanted, known.half
    )
    base.student_before, base.teacher_before = own.before, other.before.to(own.before.dtype)
    base.weights = slots.weights[filled]
    base.all_chunks()
    values, slopes = base.values()
    by_slot = logprobs.new_zeros(targets.count + 1).index_copy_(0, filled, base.weights * slopes)
    in_front = is_in_front(targets.slots, last_tokens(targets.slots, targets.count)) & (logprobs > _LEAST)
    slopes_S = torch.where(in_front, by_slot[targets.slots], 0.0)
    kd_sum = (base.weights * values).sum()
    made = slots.made(options, kd_sum, slopes_S, call.ce_token_weights, logprobs, known.items)
    return replace(made, beside=(base, tokens))


def dense_uld_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    options: TileOptions,
    targets: UldTargets,
    *,
    ce_mask: torch.Tensor | None = None,
    kd_token_weights: torch.Tensor | None = None,
    num_items: torch.Tensor | int | None = None,
    num_kd_items: torch.Tensor | int | None = None,
) -> FusedLoss:
    """The same from logits [S, V] that autograd knows."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        teacher = targets.outputs if targets.head is None else targets.head.differentiable_logits(targets.outputs)
        teacher = teacher.to(logits.dtype)
    slots = Slots.of(targets.slots, targets.count, kd_token_weights, num_kd_items, logits.dtype)
    logprobs = label_logprobs_of_logits(logits, labels)
    filled = targets.find_filled(slots.weights)
    own = _Bases.of(targets.slots, targets.count, logprobs, filled)
    of_teacher = label_logprobs_of_logits(teacher, targets.labels)
    other = _Bases.of(targets.teacher_slots, targets.count, of_teacher, filled)
    p, q = logits[own.tokens].softmax(-1), teacher[other.tokens].softmax(-1)
    s, t = own.before.exp()[:, None], other.before.exp()[:, None]
    with torch.no_grad():
        value, u = sorted_distance(p, q, s, t)
        by_s, from_common = (u * p).sum(-1), u - u.gather(1, p.argmax(-1, keepdim=True))
    # Their gradients are those of the value, as signs are constant.
    tangent = (from_common * p).sum(-1) + by_s * (s / s.detach())[:, 0]
    kd_sum = (slots.weights[filled] * (value + tangent - tangent.detach())).sum()
    tokens = torch.tensor(len(labels), device=labels.device)
    items = normaliser(num_items, tokens).to(logits.dtype)
    made = slots.made(options, kd_sum, torch.zeros_like(logprobs), ce_mask, logprobs, items)
    correct, entropy = label_metrics(logits.detach(), labels)
    return fused_loss(made.loss, [made.kd_sum.detach(), made.ce_sum.detach(), tokens, correct, entropy])
