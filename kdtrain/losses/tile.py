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

import torch

from kdtrain.losses.derivatives import STUDENT_IS_BASE, dot, log_to_mixture, value_and_pu
from kdtrain.losses.kinds import DEFAULT_PARAMS, Divergence, DivergenceParams, Tail
from kdtrain.losses.workspace import workspace


@dataclass(frozen=True)
class TileOptions:
    """What the terms are and how they are weighted; the same for every block of a call."""

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
) -> TileSums:
    """Sums of a block, and the gradient of its weighted terms written over the student's logits.

    Args:
        student: [R, V], finite; overwritten with d(kd_weight·Σ kd + ce_weight·Σ ce)/dz if `with_gradient`.
        teacher: [R, V], finite, or None: cross-entropy only. Overwritten.
        labels: [R], all in the vocabulary.
        softened: [R, V], the teacher's logits of the divergence where those at another temperature than 1 are not
            `teacher` (a mean of softened distributions, see `mixture.py`). Overwritten.
    """
    p, q, work = scratch.p, scratch.q, scratch.work
    largest = student.amax(-1, keepdim=True)
    torch.softmax(student, -1, out=p)
    # The largest probability is exp(max z − log Z): so log Z without a second pass of exponentials.
    p_largest = p.amax(-1, keepdim=True)
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
    coefficient = coefficient_of(options.ce_weight, rows.ce)
    if teacher is None:
        if with_gradient:
            _ce_gradient(student, p, labels, coefficient)
        return sums

    teacher_largest, teacher_top = teacher.max(-1, keepdim=True)
    torch.softmax(teacher, -1, out=q)
    q_largest = q.gather(1, teacher_top)
    teacher_log_z = teacher_largest - q_largest.log()
    sums.agree = (student.gather(1, teacher_top) == largest).sum()
    teacher_entropy = teacher_log_z - dot(q, teacher, work)
    sums.teacher_entropy = teacher_entropy.sum()
    forward: torch.Tensor | float = options.forward_weight
    if options.divergence == "entropy_aware":
        forward = (teacher_entropy > options.params.entropy_threshold).to(student.dtype)
    if options.temperature != 1:
        soft = teacher if softened is None else softened
        sums.kd = _tempered(student, soft, labels, coefficient, rows.kd, forward, options, scratch, with_gradient)
    elif options.kd_weight > 0:
        ratio = log_z_ratio(teacher_largest, largest, q_largest, p_largest)
        sums.kd = _divergence(
            student, teacher, ratio, labels, coefficient, rows.kd, forward, options, scratch, with_gradient
        )
    elif with_gradient:
        _ce_gradient(student, p, labels, coefficient)
    return sums


def _tempered(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    ce_coefficient: torch.Tensor | float,
    kd_rows: torch.Tensor | None,
    forward: torch.Tensor | float,
    options: TileOptions,
    scratch: Buffers,
    with_gradient: bool,
) -> torch.Tensor:
    """The divergence at another temperature, where the cross-entropy has probabilities and a gradient of its own."""
    p, q = scratch.p, scratch.q
    inverse = 1 / options.temperature
    # Of the probabilities at temperature 1, which are about to be overwritten: a block of its own, added at the end.
    ce_gradient = None
    if with_gradient and options.ce_weight > 0:
        ce_gradient = torch.empty_like(p)
        _ce_gradient(ce_gradient, p, labels, ce_coefficient)
    student.mul_(inverse)
    teacher.mul_(inverse)
    torch.softmax(student, -1, out=p)
    torch.softmax(teacher, -1, out=q)
    largest = [block.amax(-1, keepdim=True) for block in (teacher, student, q, p)]
    ratio = log_z_ratio(*largest)
    # The divergence gives its gradient with respect to z/temperature; with respect to z it is 1/temperature of that.
    softened = replace(options, kd_weight=options.kd_weight * inverse, ce_weight=0.0, temperature=1.0)
    kd = _divergence(student, teacher, ratio, labels, 0.0, kd_rows, forward, softened, scratch, with_gradient)
    if ce_gradient is not None:
        student.add_(ce_gradient)
    return kd


def _divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    log_z_ratio: torch.Tensor,
    labels: torch.Tensor,
    ce_coefficient: torch.Tensor | float,
    kd_rows: torch.Tensor | None,
    forward: torch.Tensor | float,
    options: TileOptions,
    scratch: Buffers,
    with_gradient: bool,
) -> torch.Tensor:
    """Σ divergence of a block; the gradient of divergence and cross-entropy over `student`. p and q are in scratch.

    Args:
        forward: weight of a bare KL(T‖S), one number or one per row [R, 1].
    """
    p, q, work = scratch.p, scratch.q, scratch.work
    # log(q/p), logits subtracted from logits first: exact where the models nearly agree. It takes the place of the
    # student's logits, which nobody needs any more, and the gradient will take its place.
    log_qp = torch.sub(teacher, student, out=student).sub_(log_z_ratio)
    if options.mixture_weight:
        return _mixture(p, q, log_qp, work, labels, ce_coefficient, kd_rows, options, with_gradient)
    kd = coefficient_of(options.kd_weight, kd_rows)
    has_forward = isinstance(forward, torch.Tensor) or forward != 0
    if not has_forward and not options.reverse_weight:
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
    if options.reverse_weight:
        reverse_kl = -dot(p, log_qp, work)
        value += options.reverse_weight * reverse_kl
    if with_gradient:
        of_forward, of_reverse = kd * forward, kd * options.reverse_weight
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
    ce_coefficient: torch.Tensor | float,
    kd_rows: torch.Tensor | None,
    options: TileOptions,
    with_gradient: bool,
) -> torch.Tensor:
    """JSD_β for β inside (0, 1). All four blocks are overwritten; the gradient ends up in `log_qp`.

    With m = (1−w)·a + w·b, log(m/a) = log(1 + w·(b−a)/a) loses digits as w comes near 1, and log(m/b) =
    log(m/a) + log(a/b) where a and b are far apart. The gradient needs log(m/p): a is p until w = β is near 1.
    """
    beta = options.beta
    a, b, weight = (p, q, beta) if beta <= STUDENT_IS_BASE else (q, p, 1 - beta)
    log_ma = log_to_mixture(a, b, weight, work)
    # Where a is too small to be divided by, log(m/b) comes out too low. It is never below log w, since m ≥ w·b.
    if a is p:
        log_mp = log_ma
        log_qm = log_qp.sub_(log_ma).clamp_(max=-math.log(weight))
        teacher_kl = dot(q, log_qm, q)  # q is not needed any more, and takes the product
    else:
        log_mp = log_qp.add_(log_ma).clamp_(min=math.log(weight))
        teacher_kl = -dot(q, log_ma, q)
    p_log_mp = dot(p, log_mp, work)
    value = beta * teacher_kl - (1 - beta) * p_log_mp
    if with_gradient:
        # weight·(1−β)·p·(log(p/m) − KL(p‖m)) + c·(p − onehot), with one factor of p
        factor = coefficient_of(options.kd_weight, kd_rows) * (options.mixture_weight * (1 - beta))
        p_times_log_mp = work  # where the product of the dot above was left
        p.mul_(factor * p_log_mp + ce_coefficient)
        subtract(p, p_times_log_mp, factor, out=log_qp)
        subtract_at(log_qp, labels, ce_coefficient)
    return options.mixture_weight * total_of(value.clamp(min=0), kd_rows)


def _ce_gradient(out: torch.Tensor, p: torch.Tensor, labels: torch.Tensor, coefficient: torch.Tensor | float) -> None:
    """out = coefficient · (p − onehot)."""
    torch.mul(p, coefficient, out=out)
    subtract_at(out, labels, coefficient)


def subtract_at(gradient: torch.Tensor, labels: torch.Tensor, coefficient: torch.Tensor | float) -> None:
    """gradient[row, labels[row]] −= coefficient."""
    if not isinstance(coefficient, torch.Tensor):
        if coefficient == 0:
            return
        coefficient = gradient.new_full((len(labels), 1), coefficient)
    gradient.scatter_add_(1, labels[:, None], -coefficient)


def subtract(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor | float, out: torch.Tensor) -> None:
    """out = a − factor · b."""
    if isinstance(factor, torch.Tensor):
        torch.addcmul(a, b, factor, value=-1, out=out)
    else:
        torch.sub(a, b, alpha=factor, out=out)


def coefficient_of(weight: float, rows: torch.Tensor | None) -> torch.Tensor | float:
    """Weight of a term: one number, or one per row [R, 1]."""
    return weight if rows is None or weight == 0 else weight * rows[:, None]


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
