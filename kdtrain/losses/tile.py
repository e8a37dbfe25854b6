"""Values and closed-form gradients of all token terms for one block of logits: the inner loop of the fused loss.

Shapes: R rows (tokens) of a block, V vocabulary. z are logits at temperature 1 in float32, p and q the student's and
the teacher's probabilities at the temperature of the divergence, all natural logarithms.

With g the gradient with respect to z/temperature:

| term | value | g |
|---|---|---|
| cross-entropy (temperature 1) | −log p(label) | p − onehot |
| forward KL(T‖S) | Σ q·log(q/p) | p − q |
| forward KL of draws w | Σ w·log(w/p) | p − w |
| reverse KL(S‖T) | Σ p·log(p/q) | p·(log(p/q) − KL) |
| JSD_β | β·Σ q·log(q/m) + (1−β)·Σ p·log(p/m), m = β·q + (1−β)·p | (1−β)·p·(log(p/m) − KL(p‖m)) |
| all others | `derivatives.py` | p·u − p·Σ p·u, u the derivative with respect to p |

log(p/m) = −log(1 + β·(q−p)/p) keeps its digits where p ≈ m; see `_mixture` for β near 1.

The definitions are those of `divergence.py`, and the tests hold this file to them. Of a teacher that is known by some
tokens only, the terms are in `sparse_tile.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from kdtrain.losses.derivatives import STUDENT_IS_BASE, dot, log_to_mixture, value_and_pu
from kdtrain.losses.kinds import DEFAULT_PARAMS, Divergence, DivergenceParams, Stretch, Tail
from kdtrain.losses.workspace import workspace


@dataclass(frozen=True)
class TileOptions:
    """What the terms are and how they are weighted."""

    kd_weight: float
    ce_weight: float
    beta: float
    temperature: float
    divergence: Divergence
    tail: Tail
    params: DivergenceParams = DEFAULT_PARAMS

    def scaled(self, factor: float) -> TileOptions:
        """With both weights, and so the gradient, times a factor; the sums do not know the weights."""
        return replace(self, kd_weight=factor * self.kd_weight, ce_weight=factor * self.ce_weight)

    def of(self, stretch: Stretch) -> TileOptions:
        """Those of some tokens of a call."""
        return replace(self, divergence=stretch.divergence, beta=stretch.beta)

    @property
    def numbers(self) -> Numbers:
        return Numbers(
            kd=self.kd_weight,
            ce=self.ce_weight,
            inverse_temperature=1 / self.temperature,
            forward=self.forward_weight,
            reverse=self.reverse_weight,
            mixture=self.mixture_weight,
            beta=self.beta,
            rest=1 - self.beta,
        )

    @property
    def forward_weight(self) -> float:
        """Weight of a bare KL(T‖S) in the divergence; that of `entropy_aware` is each row's own."""
        if self.divergence == "mixed_kl":
            return 1 - self.beta
        if self.divergence == "skew_kl":
            return float(self.params.skew_alpha == 0)
        return float(self.divergence in ("jsd", "jsd_scaled") and self.beta == 0)

    @property
    def reverse_weight(self) -> float:
        """Weight of a bare KL(S‖T) in the divergence."""
        if self.divergence == "mixed_kl":
            return self.beta
        if self.divergence == "skew_reverse_kl":
            return float(self.params.skew_alpha == 0)
        return float(
            self.divergence == "entropy_aware" or (self.divergence in ("jsd", "jsd_scaled") and self.beta == 1)
        )

    @property
    def mixture_weight(self) -> float:
        """Weight of JSD_β in the divergence."""
        if self.divergence not in ("jsd", "jsd_scaled") or self.beta in (0, 1):
            return 0.0
        return 1 / (self.beta * (1 - self.beta)) if self.divergence == "jsd_scaled" else 1.0


Number = torch.Tensor | float


class Numbers(NamedTuple):
    """What the terms are multiplied by. In generated kernels (`generated.py`) those that are neither 0 nor 1 are
    scalars on the device: one kernel serves all of their values. A float of 0 or 1 leaves a term out."""

    kd: Number
    ce: Number
    inverse_temperature: Number
    forward: Number
    """As `TileOptions.forward_weight`, and so on."""
    reverse: Number
    mixture: Number
    beta: Number
    rest: Number
    """1 − β, which a float32 of β near 1 does not tell."""


def is_number(value: Number, number: float) -> bool:
    """Whether it is known to be `number`; a tensor is not looked at."""
    return not isinstance(value, torch.Tensor) and value == number


@dataclass
class Buffers:
    """Three blocks of scratch: on a CPU they stay in its cache."""

    p: torch.Tensor
    q: torch.Tensor
    work: torch.Tensor

    @classmethod
    def like(cls, logits: torch.Tensor, rows: int) -> Buffers:
        shape = rows, logits.shape[1], logits.dtype, logits.device
        return cls(*(workspace.take(name, *shape) for name in ("p", "q", "work")))

    def rows(self, count: int) -> Buffers:
        return Buffers(self.p[:count], self.q[:count], self.work[:count])


@dataclass(frozen=True)
class RowWeights:
    """What each of the R rows of a block counts in the two terms, [R] beside the weights of the terms; None is 1."""

    kd: torch.Tensor | None = None
    ce: torch.Tensor | None = None

    def __getitem__(self, rows: slice) -> RowWeights:
        return RowWeights(None if self.kd is None else self.kd[rows], None if self.ce is None else self.ce[rows])


@dataclass
class TileSums:
    """Sums over the rows of a block, scalars, those of the two terms by `RowWeights`; None without a teacher, and where
    draws do not tell it."""

    kd: torch.Tensor | None
    ce: torch.Tensor
    correct: torch.Tensor
    agree: torch.Tensor | None
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor | None


def tile_terms(
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    labels: torch.Tensor,
    rows: RowWeights,
    options: TileOptions,
    scratch: Buffers,
    with_gradient: bool,
    softened: torch.Tensor | None = None,
    numbers: Numbers | None = None,
) -> TileSums:
    """Sums of a block, and the gradient of its weighted terms written over the student's logits.

    Args:
        student: [R, V], finite; overwritten with d(kd_weight·Σ kd + ce_weight·Σ ce)/dz if `with_gradient`.
        teacher: [R, V], finite, or None: cross-entropy only. Overwritten.
        labels: [R], all in the vocabulary.
        softened: [R, V], the teacher's logits of the divergence where those at another temperature than 1 are not
            `teacher` (a mean of softened distributions, see `mixture.py`). Overwritten.
        numbers: those of `options`, where some are tensors; `options` then says which formulas.
    """
    numbers = options.numbers if numbers is None else numbers
    p, q, work = scratch.p, scratch.q, scratch.work
    largest = student.amax(-1, keepdim=True)
    # The largest probability is exp(max z − log Z): so log Z without a second pass of exponentials.
    p_largest = softmax_into(p, student, largest)
    log_z = largest - p_largest.log()
    at_label = student.gather(1, labels[:, None])  # read before the gradient is written over the logits
    ce = log_z - at_label
    sums = TileSums(
        kd=None,
        ce=total_of(ce, rows.ce),
        correct=(at_label == largest).sum(),
        agree=None,
        student_entropy=(log_z - dot(p, student, work)).sum(),  # −Σ p·(z − log Z)
        teacher_entropy=None,
    )
    coefficient = coefficient_of(numbers.ce, rows.ce)
    if teacher is None:
        if with_gradient:
            _ce_gradient(student, p, labels, coefficient)
        return sums

    teacher_largest, teacher_top = largest_of(teacher)
    q_largest = softmax_into(q, teacher, teacher_largest, teacher_top)
    teacher_log_z = teacher_largest - q_largest.log()
    sums.agree = (student.gather(1, teacher_top) == largest).sum()
    teacher_entropy = teacher_log_z - dot(q, teacher, work)
    sums.teacher_entropy = teacher_entropy.sum()
    if options.divergence == "entropy_aware":
        numbers = numbers._replace(forward=(teacher_entropy > options.params.entropy_threshold).to(student.dtype))
    if not is_number(numbers.inverse_temperature, 1):
        soft = teacher if softened is None else softened
        sums.kd = _tempered(student, soft, labels, coefficient, rows.kd, numbers, options, scratch, with_gradient)
    elif not is_number(numbers.kd, 0):
        ratio = log_z_ratio(teacher_largest, largest, q_largest, p_largest)
        sums.kd = _divergence(
            student, teacher, ratio, labels, coefficient, rows.kd, numbers, options, scratch, with_gradient
        )
    elif with_gradient:
        _ce_gradient(student, p, labels, coefficient)
    return sums


def _tempered(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    ce_coefficient: Number,
    kd_rows: torch.Tensor | None,
    numbers: Numbers,
    options: TileOptions,
    scratch: Buffers,
    with_gradient: bool,
) -> torch.Tensor:
    """The divergence at another temperature, where the cross-entropy has probabilities and a gradient of its own."""
    p, q = scratch.p, scratch.q
    inverse = numbers.inverse_temperature
    # Of the probabilities at temperature 1, which are about to be overwritten: a block of its own, added at the end.
    ce_gradient = None
    if with_gradient and not is_number(numbers.ce, 0):
        ce_gradient = torch.empty_like(p)
        _ce_gradient(ce_gradient, p, labels, ce_coefficient)
    student.mul_(inverse)
    teacher.mul_(inverse)
    largest, teacher_largest = student.amax(-1, keepdim=True), teacher.amax(-1, keepdim=True)
    p_largest, q_largest = softmax_into(p, student, largest), softmax_into(q, teacher, teacher_largest)
    ratio = log_z_ratio(teacher_largest, largest, q_largest, p_largest)
    # The divergence gives its gradient with respect to z/temperature; with respect to z it is 1/temperature of that.
    of_z = numbers._replace(kd=numbers.kd * inverse)
    kd = _divergence(student, teacher, ratio, labels, 0.0, kd_rows, of_z, options, scratch, with_gradient)
    if ce_gradient is not None:
        student.add_(ce_gradient)
    return kd


def _divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    log_z_ratio: torch.Tensor,
    labels: torch.Tensor,
    ce_coefficient: Number,
    kd_rows: torch.Tensor | None,
    numbers: Numbers,
    options: TileOptions,
    scratch: Buffers,
    with_gradient: bool,
) -> torch.Tensor:
    """Σ divergence of a block; the gradient of divergence and cross-entropy over `student`. p and q are in scratch.

    Args:
        numbers: its `forward` is one number or one per row [R, 1].
    """
    forward, reverse = numbers.forward, numbers.reverse
    p, q, work = scratch.p, scratch.q, scratch.work
    # log(q/p), logits subtracted from logits first: exact where the models nearly agree. It takes the place of the
    # student's logits, which nobody needs any more, and the gradient will take its place.
    log_qp = torch.sub(teacher, student, out=student).sub_(log_z_ratio)
    if not is_number(numbers.mixture, 0):
        return _mixture(p, q, log_qp, work, labels, ce_coefficient, kd_rows, numbers, options, with_gradient)
    kd = coefficient_of(numbers.kd, kd_rows)
    has_forward, has_reverse = not is_number(forward, 0), not is_number(reverse, 0)
    if not has_forward and not has_reverse:
        value, pu = value_and_pu(
            options.divergence, options.params, p, q, log_qp, teacher, work, with_gradient=with_gradient
        )
        if pu is not None:  # kd·(p·u − p·Σ p·u) + c·(p − onehot), with one factor of p
            shift = ce_coefficient - kd * pu.sum(-1, keepdim=True)
            torch.mul(pu, kd, out=student).addcmul_(p, shift)
            subtract_at(student, labels, ce_coefficient)
        return total_of(value.clamp_(min=0), kd_rows)
    value = torch.zeros_like(log_z_ratio)  # [R, 1]
    reverse_kl = None
    if has_forward:
        value += forward * dot(q, log_qp, work)
    if has_reverse:
        reverse_kl = -dot(p, log_qp, work)
        value += reverse * reverse_kl
    if with_gradient:
        of_forward, of_reverse = kd * forward, kd * reverse
        # of_forward·(p − q) + of_reverse·p·(−log(q/p) − KL) + c·(p − onehot), with one factor of p
        if reverse_kl is None:
            torch.mul(p, of_forward + ce_coefficient, out=student)
        else:
            log_qp.mul_(-of_reverse).add_(of_forward + ce_coefficient - of_reverse * reverse_kl).mul_(p)
        if has_forward:
            subtract(student, q, of_forward, out=student)
        subtract_at(student, labels, ce_coefficient)
    return total_of(value.clamp_(min=0), kd_rows)


def _mixture(
    p: torch.Tensor,
    q: torch.Tensor,
    log_qp: torch.Tensor,
    work: torch.Tensor,
    labels: torch.Tensor,
    ce_coefficient: Number,
    kd_rows: torch.Tensor | None,
    numbers: Numbers,
    options: TileOptions,
    with_gradient: bool,
) -> torch.Tensor:
    """JSD_β for β inside (0, 1). All four blocks are overwritten; the gradient ends up in `log_qp`.

    With m = (1−w)·a + w·b, log(m/a) = log(1 + w·(b−a)/a) loses digits as w comes near 1, and log(m/b) =
    log(m/a) + log(a/b) where a and b are far apart. The gradient needs log(m/p): a is p until w = β is near 1.
    """
    beta, rest = numbers.beta, numbers.rest
    a, b, weight = (p, q, beta) if options.beta <= STUDENT_IS_BASE else (q, p, rest)
    log_ma = log_to_mixture(a, b, weight, work)
    # Where a is too small to be divided by, log(m/b) comes out too low. It is never below log w, since m ≥ w·b.
    if a is p:
        log_mp = log_ma
        log_qm = log_qp.sub_(log_ma).clamp_(max=-log_of(weight))
        teacher_kl = dot(q, log_qm, q)  # q is not needed any more, and takes the product
    else:
        log_mp = log_qp.add_(log_ma).clamp_(min=log_of(weight))
        teacher_kl = -dot(q, log_ma, q)
    p_log_mp = dot(p, log_mp, work)
    value = beta * teacher_kl - rest * p_log_mp
    if with_gradient:
        # weight·(1−β)·p·(log(p/m) − KL(p‖m)) + c·(p − onehot), with one factor of p
        factor = coefficient_of(numbers.kd, kd_rows) * (numbers.mixture * rest)
        p_times_log_mp = work  # where the product of the dot above was left
        p.mul_(factor * p_log_mp + ce_coefficient)
        subtract(p, p_times_log_mp, factor, out=log_qp)
        subtract_at(log_qp, labels, ce_coefficient)
    return numbers.mixture * total_of(value.clamp(min=0), kd_rows)


def _ce_gradient(out: torch.Tensor, p: torch.Tensor, labels: torch.Tensor, coefficient: Number) -> None:
    """out = coefficient · (p − onehot)."""
    torch.mul(p, coefficient, out=out)
    subtract_at(out, labels, coefficient)


def largest_of(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row and where it is, [R, 1]."""
    if torch.compiler.is_compiling():  # apart, the first of them is found in one pass with the sum of the softmax
        return logits.amax(-1, keepdim=True), logits.argmax(-1, keepdim=True)
    return logits.max(-1, keepdim=True)


def softmax_into(
    out: torch.Tensor, logits: torch.Tensor, largest: torch.Tensor, top: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(logits) into `out`, and the largest probability of each row, [R, 1].

    Args:
        largest: of the logits, [R, 1].
        top: where that is, [R, 1]; None finds it.
    """
    if torch.compiler.is_compiling():  # one pass less: the largest is the sum's inverse
        torch.exp(logits - largest, out=out)
        largest_p = 1 / out.sum(-1, keepdim=True)
        out.mul_(largest_p)
        return largest_p
    torch.softmax(logits, -1, out=out)
    return out.amax(-1, keepdim=True) if top is None else out.gather(1, top)


def subtract_at(gradient: torch.Tensor, labels: torch.Tensor, coefficient: Number) -> None:
    """gradient[row, labels[row]] −= coefficient."""
    if is_number(coefficient, 0):
        return
    if torch.compiler.is_compiling():  # a scatter wants a gradient in memory, to be read again after it
        columns = torch.arange(gradient.shape[1], device=gradient.device)
        gradient.sub_(torch.where(columns == labels[:, None], coefficient, 0.0))
        return
    if not isinstance(coefficient, torch.Tensor):
        coefficient = gradient.new_full((len(labels), 1), coefficient)
    gradient.scatter_add_(1, labels[:, None], -coefficient)


def subtract(a: torch.Tensor, b: torch.Tensor, factor: Number, out: torch.Tensor) -> None:
    """out = a − factor · b."""
    if isinstance(factor, torch.Tensor):
        torch.addcmul(a, b, factor, value=-1, out=out)
    else:
        torch.sub(a, b, alpha=factor, out=out)


def coefficient_of(weight: Number, rows: torch.Tensor | None) -> Number:
    """Weight of a term: one number, or one per row [R, 1]."""
    return weight if rows is None or is_number(weight, 0) else weight * rows[:, None]


def log_of(weight: Number) -> Number:
    return weight.log() if isinstance(weight, torch.Tensor) else math.log(weight)


def log_z_ratio(
    teacher_largest: torch.Tensor, student_largest: torch.Tensor, q_largest: torch.Tensor, p_largest: torch.Tensor
) -> torch.Tensor:
    """log Z_T − log Z_S, [R, 1], from each model's largest logit and largest probability.

    Differences of like things first: each log Z alone is a number of about ten, whose rounding would be the whole
    divergence of two models that nearly agree.
    """
    return (teacher_largest - student_largest) - (q_largest / p_largest).log()


def log_sum(p: torch.Tensor) -> torch.Tensor:
    """log Σ exp(z − max z), [R, 1], from the probabilities: the largest of them is its exponential's inverse."""
    return -p.amax(-1, keepdim=True).log()


def total_of(values: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Σ over the rows of values [R, 1], by their weights.

    Roundings can leave a divergence below 0 where the models agree to the last digit; it is clamped before this.
    """
    return values.sum() if rows is None else (values * rows[:, None]).sum()
