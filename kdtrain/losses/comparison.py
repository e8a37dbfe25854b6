"""How well a model predicts given tokens, and how near its distributions are to a teacher's; values, no gradients.

Shapes: N supervised tokens, C of them in a chunk, V vocabulary, K known tokens. T is the teacher's distribution at a
token and S the student's, both at temperature 1.

Values are made in float32 a chunk of tokens at a time, so that the logits of all tokens are never there at once, and
come back one for each token: who adds them up does so in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import torch

from kdtrain.losses.divergence import generalized_jsd
from kdtrain.losses.gemm import autocast_dtype, one_dtype
from kdtrain.losses.head import Head
from kdtrain.losses.mixture import mix_logits
from kdtrain.losses.sizes import chunk_sizes
from kdtrain.losses.topk import TopKLogprobs, coarse_grain, teacher_tail
from kdtrain.losses.workspace import workspace

BINS = 15
"""Of the calibration error; of equal width."""


# Logits of a chunk. Some eight tensors of this size are there at a time: 140 MB on a CPU, 1.1 GB on a GPU.
_CHUNK_VALUES = {"cpu": 2**22, "cuda": 2**25}

_Kind = TypeVar("_Kind", "Predictions", "Comparison")


@dataclass(frozen=True)
class Scores:
    """A model's distributions at N tokens, whose logits are made when they are asked for."""

    outputs: torch.Tensor
    """Hidden states [N, H], with `head`; or logits [N, V]."""
    head: Head | None
    columns: int
    """Leading tokens of the vocabulary that take part; what is behind them is padding."""

    def __len__(self) -> int:
        return len(self.outputs)

    @property
    def finite(self) -> bool:
        """Whether no logit is −inf, as far as that is known without making them."""
        return self.head is not None and not self.head.masks_columns()

    def logits(self, rows: slice, buffer: str | None = None) -> torch.Tensor:
        """[C, columns], float32 (float64 of float64).

        Args:
            buffer: with a head, the name of the workspace's buffer that they are made in; they are then valid until it
                is taken again.
        """
        some = self.outputs[rows]
        if self.head is None:
            return some[:, : self.columns].to(torch.promote_types(some.dtype, torch.float32))
        half = autocast_dtype(some.device)  # as the loss makes them, so that its cross-entropy is this one
        head = self.head.first_columns(self.columns)
        if head.module is not None:
            return head.differentiable_logits(some)
        hidden, weight = one_dtype(some, head.weight, half)
        dtype = torch.promote_types(some.dtype, torch.float32)
        if buffer is None:
            out = torch.empty(len(hidden), len(weight), dtype=dtype, device=hidden.device)
        else:
            out = workspace.take(buffer, len(hidden), len(weight), dtype, hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            return replace(head, weight=weight).logits(hidden, out)


@dataclass(frozen=True)
class MeanScores(Scores):
    """The mean of several models' distributions at the same N tokens."""

    parts: tuple[Scores, ...] = ()
    """The first one's `outputs`, `head` and `columns` are those of this object."""
    shares: tuple[float, ...] = ()

    @classmethod
    def of(cls, parts: Sequence[Scores], shares: Sequence[float]) -> MeanScores:
        first = parts[0]
        return cls(first.outputs, first.head, first.columns, tuple(parts), tuple(shares))

    @property
    def finite(self) -> bool:
        """Whether no logit of any of them is always −inf."""
        return all(part.finite for part in self.parts)

    def logits(self, rows: slice, buffer: str | None = None) -> torch.Tensor:
        """As `Scores.logits`, in memory of its own."""
        return mix_logits([part.logits(rows) for part in self.parts], self.shares, 1.0).at_one


@dataclass(frozen=True)
class Predictions:
    """What one model says of each token, [N]."""

    ce: torch.Tensor
    """−log p(label), nats; 0 where it is not known."""
    ce_known: torch.Tensor
    """bool: whether that is known. A teacher that is known by its top k need not have named the label."""
    correct: torch.Tensor
    """bool: whether the most likely token, of several the one with the lowest id, is the label."""
    confidence: torch.Tensor
    """Its probability."""


@dataclass(frozen=True)
class Comparison:
    """How a student's distribution and its teacher's compare at each token, [N].

    Of a teacher that is known by its top k all outcomes that it has not named are one: KL is then at most what it would
    be over the vocabulary, and `overlap` at least.
    """

    forward_kl: torch.Tensor
    """KL(T‖S), nats."""
    reverse_kl: torch.Tensor
    """KL(S‖T), nats."""
    agree: torch.Tensor
    """bool: whether both have the same most likely token, the lowest id of several."""
    overlap: torch.Tensor
    """Σ min(p, q) = 1 − total variation distance: the chance that speculative decoding accepts a token that S proposes
    to T, or T to S (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, theorem 3.5)."""
    exact: torch.Tensor
    """bool: whether it is over all of the vocabulary."""


@torch.no_grad()
def compare(
    student: Scores,
    labels_N: torch.Tensor,
    teacher: Scores | TopKLogprobs | None = None,
    *,
    chunk_tokens: int | None = None,
) -> tuple[Predictions, Predictions | None, Comparison | None]:
    """The student's predictions, the teacher's, and how they compare; the last two are None without a teacher.

    Args:
        labels_N: the tokens, all of them supervised.
        teacher: row i is its distribution at token i.
        chunk_tokens: C; None chooses. The result does not depend on it.

    Returns:
        Everything on the CPU.
    """
    own: list[Predictions] = []
    of_teacher: list[Predictions] = []
    between: list[Comparison] = []
    for rows in _chunks(student, chunk_tokens):
        logits, labels = student.logits(rows), labels_N[rows].to(student.outputs.device)
        distribution = _Distribution.of(logits)
        own.append(_predictions(distribution, labels))
        if isinstance(teacher, TopKLogprobs):
            known = teacher[rows].to(logits.device)
            of_teacher.append(_predictions_of_topk(known, labels))
            between.append(_with_topk(distribution, known))
        elif teacher is not None:
            other = _Distribution.of(teacher.logits(rows).to(logits.device))
            of_teacher.append(_predictions(other, labels))
            between.append(_with_dense(distribution, other))
    if not own:  # no tokens
        nothing = torch.zeros(0)
        own = [Predictions(nothing, nothing.bool(), nothing.bool(), nothing)]
    return _joined(own), _joined(of_teacher) if of_teacher else None, _joined(between) if between else None


class _Distribution(NamedTuple):
    """Logits of a chunk, and what is made of them more than once."""

    logits: torch.Tensor
    log_p: torch.Tensor
    """[C, V]."""
    top: torch.Tensor
    """[C], of several largest logits the first; their logarithms may be rounded to further ties."""

    @classmethod
    def of(cls, logits: torch.Tensor) -> _Distribution:
        return cls(logits, torch.log_softmax(logits, -1), logits.argmax(-1))


def _predictions(model: _Distribution, labels: torch.Tensor) -> Predictions:
    ce = -model.log_p.gather(1, labels[:, None]).squeeze(1)
    confidence = model.log_p.gather(1, model.top[:, None]).exp().squeeze(1)
    return Predictions(ce, torch.ones_like(labels, dtype=torch.bool), model.top == labels, confidence)


def _predictions_of_topk(teacher: TopKLogprobs, labels: torch.Tensor) -> Predictions:
    """Of a label that is not among the k only a bound is known, and no bound is made up for it."""
    at_label = teacher.indices == labels[:, None]
    known = at_label.any(-1)
    ce = torch.where(at_label, -teacher.logprobs.float(), 0.0).sum(-1)
    top, largest = _named_first(teacher)
    return Predictions(ce, known, top == labels, largest.float().exp())


def _with_dense(student: _Distribution, teacher: _Distribution) -> Comparison:
    p, q = student.log_p.exp(), teacher.log_p.exp()
    log_qp = teacher.log_p - student.log_p
    if log_qp.isfinite().all():
        # Σ q·log(q/p) − q + p, whose last two add up to nothing but roundings: those of log Z, which all terms of a
        # row share, cancel with them. `kl_terms` keeps more digits of nearly equal models, in four times the time.
        surplus = (p - q).sum(-1)
        forward_kl = ((q * log_qp).sum(-1) + surplus).clamp(min=0)
        reverse_kl = (-(p * log_qp).sum(-1) - surplus).clamp(min=0)
    else:  # some tokens are impossible
        forward_kl, reverse_kl = (generalized_jsd(student.logits, teacher.logits, beta=beta) for beta in (0.0, 1.0))
    return Comparison(
        forward_kl=forward_kl,
        reverse_kl=reverse_kl,
        agree=student.top == teacher.top,
        overlap=torch.minimum(p, q).sum(-1),
        exact=torch.ones(len(p), dtype=torch.bool),
    )


def _with_topk(student: _Distribution, teacher: TopKLogprobs) -> Comparison:
    """Over the k tokens and one outcome for all others, whatever tail the loss has."""
    known, named = coarse_grain(student.logits, teacher, "bucket")
    top, _ = _named_first(teacher)
    return Comparison(
        forward_kl=generalized_jsd(known, named, beta=0.0),
        reverse_kl=generalized_jsd(known, named, beta=1.0),
        agree=student.top == top,
        overlap=torch.minimum(known.exp(), named.exp()).sum(-1),
        exact=(teacher.indices >= 0).sum(-1) == student.logits.shape[-1],
    )


def _named_first(teacher: TopKLogprobs) -> tuple[torch.Tensor, torch.Tensor]:
    """The most likely token that was named, of several the lowest id, and its log-probability, [C]."""
    largest = teacher.logprobs.amax(-1, keepdim=True)  # a missing entry has −inf
    above_all = torch.iinfo(teacher.indices.dtype).max
    return torch.where(teacher.logprobs == largest, teacher.indices, above_all).amin(-1), largest.squeeze(1)


@torch.no_grad()
def label_logprobs(model: Scores | TopKLogprobs, labels_N: torch.Tensor, columns: int) -> torch.Tensor:
    """log p(label) of each token at temperature 1, [N] float32 on the model's device, nats.

    Of a model that is known by its top k and has not named a label: what is left of the probability, in equal parts on
    all tokens that it has not named, and never more than the smallest that it has. An estimate, to rank texts by.

    Args:
        columns: leading tokens of the vocabulary that take part.
    """
    if isinstance(model, TopKLogprobs):
        return _topk_label_logprobs(model, labels_N, columns)
    found = [
        torch.log_softmax(model.logits(rows), -1).gather(1, labels_N[rows].to(model.outputs.device)[:, None])
        for rows in _chunks(model, None)
    ]
    return torch.cat(found).squeeze(1).float() if found else torch.zeros(0, device=model.outputs.device)


def _topk_label_logprobs(teacher: TopKLogprobs, labels_N: torch.Tensor, columns: int) -> torch.Tensor:
    logprobs, named = teacher.logprobs.float(), teacher.indices >= 0
    at_label = teacher.indices == labels_N[:, None].to(teacher.indices.device)
    others = (columns - named.sum(-1)).clamp(min=1)
    left = teacher_tail(logprobs, torch.zeros_like(named[:, :1])).squeeze(1) - others.log()
    smallest = logprobs.masked_fill(~named, torch.inf).amin(-1)
    unnamed = torch.minimum(left, smallest)
    return torch.where(at_label.any(-1), logprobs.masked_fill(~at_label, -torch.inf).amax(-1), unnamed)


def _chunks(scores: Scores, chunk_tokens: int | None) -> Iterator[slice]:
    if not len(scores):
        return
    start = 0
    values = _CHUNK_VALUES.get(scores.outputs.device.type, _CHUNK_VALUES["cuda"])
    most = chunk_tokens or max(values // scores.columns, 16)
    for size in chunk_sizes(len(scores), most):
        yield slice(start, start + size)
        start += size


def _joined(parts: list[_Kind]) -> _Kind:
    kind: Any = type(parts[0])
    return kind(**{f.name: torch.cat([getattr(part, f.name).cpu() for part in parts]) for f in fields(kind)})


# ---- calibration -----------------------------------------------------------------------------------------------------


def calibration_sums(confidence_N: torch.Tensor, correct_N: torch.Tensor) -> torch.Tensor:
    """[3, BINS] float64: tokens, right ones and Σ confidence in each bin; sums of parts add up."""
    bins = (confidence_N.double() * BINS).long().clamp(0, BINS - 1)
    counted = torch.stack([torch.ones_like(confidence_N), correct_N, confidence_N]).double()
    return torch.zeros(3, BINS, dtype=torch.float64).index_add_(1, bins, counted)


def calibration_error(sums: torch.Tensor) -> float:
    """Expected calibration error: Σ |bin|/N · |accuracy − mean confidence| over the bins.

    Source: Guo et al. 2017, https://arxiv.org/abs/1706.04599, equation 3.
    """
    tokens, correct, confidence = sums
    return float((correct - confidence).abs().sum() / tokens.sum())
