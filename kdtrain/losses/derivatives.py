"""Divergences of a block of logits whose gradient comes from a derivative with respect to the probabilities.

Shapes and names are those of `tile.py`. With u the derivative with respect to the student's p, the gradient with
respect to z/temperature is p·u − p·Σ p·u; a number that is added to all of u changes nothing.

| divergence | value | p·u |
|---|---|---|
| skew KL | Σ q·log(q/m), m = α·q + (1−α)·p | −(1−α)·p·(q/m − 1) |
| skew reverse KL | Σ p·log(p/m), m = α·p + (1−α)·q | p·(log(p/m) − α·(p/m − 1)) |
| α-β divergence, s = α+β | `alpha_beta_terms` | −p^s·(exp(α·log(q/p)) − 1)/α |
| total variation | ½·Σ abs(p − q) | −½·p·sign(log(q/p)) |
"""

from __future__ import annotations

import math

import torch

from kdtrain.losses.divergence import MAX_LOG_RATIO
from kdtrain.losses.kinds import Divergence, DivergenceParams
from kdtrain.losses.workspace import workspace

# Below the smallest normal float32 a probability is taken for this one where it is divided by.
_TINY = torch.finfo(torch.float32).tiny
# Largest share of the teacher in m at which log(m/p) is taken from p itself.
STUDENT_IS_BASE = 0.85
# Largest exponent whose exponential is finite in float32.
_LARGEST_EXPONENT = 88.0


def value_and_pu(
    divergence: Divergence,
    params: DivergenceParams,
    p: torch.Tensor,
    q: torch.Tensor,
    log_qp: torch.Tensor,
    teacher: torch.Tensor,
    work: torch.Tensor,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The divergence of each row, [R, 1], and p·u, [R, V], in one of the blocks; all but p are overwritten.

    Args:
        log_qp: log(q/p), [R, V].
        teacher: logits over temperature, [R, V].
    """
    if divergence == "skew_kl":
        return _skew(p, q, log_qp, work, params.skew_alpha, with_gradient)
    if divergence == "skew_reverse_kl":
        return _skew_reverse(p, q, log_qp, work, params.skew_alpha, with_gradient)
    if divergence == "alpha_beta":
        return _alpha_beta(q, log_qp, teacher, work, params.ab_alpha, params.ab_beta, with_gradient)
    value = 0.5 * torch.sub(p, q, out=work).abs_().sum(-1, keepdim=True)
    return value, log_qp.sign_().mul_(p).mul_(-0.5) if with_gradient else None


def _skew(
    p: torch.Tensor, q: torch.Tensor, log_qp: torch.Tensor, work: torch.Tensor, alpha: float, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if alpha <= STUDENT_IS_BASE:
        # Where p is too small to be divided by, log(q/m) comes out too high. It is never above −log α, since m ≥ α·q.
        log_qm = log_qp.sub_(log_to_mixture(p, q, alpha, work)).clamp_(max=-math.log(alpha))
    else:
        log_qm = log_to_mixture(q, p, 1 - alpha, work).neg_()
    value = (q * log_qm).sum(-1, keepdim=True)
    return value, log_qm.expm1_().mul_(p).mul_(alpha - 1) if with_gradient else None


def _skew_reverse(
    p: torch.Tensor, q: torch.Tensor, log_qp: torch.Tensor, work: torch.Tensor, alpha: float, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if 1 - alpha <= STUDENT_IS_BASE:
        log_pm = log_to_mixture(p, q, 1 - alpha, work).neg_()
    else:
        log_pm = log_qp.add_(log_to_mixture(q, p, alpha, work)).clamp_(min=math.log(alpha)).neg_()
    value = (p * log_pm).sum(-1, keepdim=True)
    return value, log_pm.sub_(log_pm.expm1(), alpha=alpha).mul_(p) if with_gradient else None


def _alpha_beta(
    q: torch.Tensor,
    log_qp: torch.Tensor,
    teacher: torch.Tensor,
    work: torch.Tensor,
    alpha: float,
    beta: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `alpha_beta_terms`, without its series: a term may be off by 1e-7·|log(q/p)| times the larger probability."""
    if 0 < alpha <= 2 * beta:
        return _alpha_beta_of_powers(q, log_qp, teacher, work, alpha, beta, with_gradient)
    s = alpha + beta
    log_q = teacher.sub_(teacher.amax(-1, keepdim=True)).add_(q.amax(-1, keepdim=True).log())
    n = torch.abs(log_qp, out=work).neg_()
    if min(alpha, beta) < 0:
        n.clamp_(min=-MAX_LOG_RATIO)
    h = _alpha_beta_kernel(n, log_qp, alpha, beta, q)
    largest_s = torch.neg(log_qp, out=work).clamp_(min=0).add_(log_q).mul_(s).exp_()
    value = dot(h, largest_s, work)
    if not with_gradient:
        return value, None
    log_ps = torch.sub(log_q, log_qp, out=teacher).mul_(s)
    if alpha == 0:
        return value, log_ps.exp_().mul_(log_qp).neg_()
    # p^s·(exp(y) − 1) as exp(s·log p + max(y, 0))·(1 − exp(−|y|))·sign(y): neither factor overflows where the product
    # does not, and p^s = 0 does not hide a q that is not.
    y = log_qp.mul_(alpha)
    pu = log_ps.add_(torch.clamp(y, min=0, out=work)).clamp_(max=_LARGEST_EXPONENT).exp_()
    pu.mul_(torch.sign(y, out=work))
    return value, pu.mul_(y.abs_().neg_().expm1_()).mul_(1 / alpha)


def _alpha_beta_of_powers(
    q: torch.Tensor,
    log_qp: torch.Tensor,
    teacher: torch.Tensor,
    work: torch.Tensor,
    alpha: float,
    beta: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same where α and β are above 0 and α not much the larger: half the work, since three powers are all of it.

    With n = −|log(q/p)|, L the larger of p and q, σ the sign of log(q/p), a = e^(αn) − 1 and b = e^(βn) − 1, let
    t = a·(1 + b) where q is larger and a where p is. Then e^(sn) − 1 = a·(1 + b) + b, a term of the divergence is
    σ·L^s·(t − α/s·(e^(sn) − 1))/(αβ), and p·u is σ·L^s·t/α.
    """
    s = alpha + beta
    # L^s/α as one exponential; log L = log q − min(log(q/p), 0).
    shift = teacher.amax(-1, keepdim=True) - q.amax(-1, keepdim=True).log() + math.log(alpha) / s
    weight = teacher.sub_(shift).sub_(torch.clamp(log_qp, max=0, out=work)).mul_(s).exp_().copysign_(log_qp)
    n = torch.abs(log_qp, out=work).neg_()
    a = torch.mul(n, alpha, out=q).expm1_()
    b = n.mul_(beta).expm1_()
    of_s = _fourth_block(q)
    torch.addcmul(a, a, b, out=of_s).add_(b)
    # By arithmetic: a choice between two blocks takes as long as four exponentials.
    teacher_is_larger = log_qp.sign_().add_(1).mul_(0.5)
    t = torch.addcmul(a, a, b.mul_(teacher_is_larger), out=q)
    value = dot(torch.sub(t, of_s, alpha=alpha / s, out=work), weight, work) / beta
    return value, t.mul_(weight) if with_gradient else None


def _alpha_beta_kernel(
    n: torch.Tensor, log_qp: torch.Tensor, alpha: float, beta: float, out: torch.Tensor
) -> torch.Tensor:
    """h of `alpha_beta_terms`, [R, V]; n is overwritten.

    With c the larger exponent and d the other, it is (E(s) − E(d))/c where the larger probability has the exponent d
    in h, and (exp(c·n)·E(d) − E(s))/c where it has c.
    """
    c, d = (beta, alpha) if abs(beta) >= abs(alpha) else (alpha, beta)
    if c == 0:
        return torch.mul(n, n, out=out).mul_(0.5)
    s = c + d
    of_d = torch.mul(n, d, out=out).expm1_().div_(d) if d else out.copy_(n)
    of_s = _fourth_block(n)
    of_s = torch.mul(n, s, out=of_s).expm1_().div_(s) if s else of_s.copy_(n)
    student_is_larger = log_qp <= 0
    with_c = n.mul_(c).exp_().mul_(of_d).sub_(of_s)
    with_d = of_s.sub_(of_d)
    return torch.where(student_is_larger if d == alpha else ~student_is_larger, with_d, with_c).mul_(1 / c)


def _fourth_block(like: torch.Tensor) -> torch.Tensor:
    """Scratch, [R, V]; in generated kernels a value, and no memory."""
    if torch.compiler.is_compiling():
        return torch.empty_like(like)
    return workspace.take("alpha_beta", like.shape[0], like.shape[1], like.dtype, like.device)


def log_to_mixture(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor | float, out: torch.Tensor) -> torch.Tensor:
    """log(m/a) for m = (1−weight)·a + weight·b, all digits of it where a ≈ b; a is overwritten where it is tiny."""
    return torch.sub(b, a, out=out).div_(a.clamp_(min=_TINY)).mul_(weight).log1p_()


def dot(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Σ a·b over the vocabulary, [R, 1]. As product and sum: faster here than any batched dot product."""
    return torch.mul(a, b, out=out).sum(-1, keepdim=True)
