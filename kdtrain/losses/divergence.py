"""Divergences between two categorical distributions given by logits. Pure maths: no masks, no reduction, no state.

Shapes: V vocabulary, `...` any leading shape. T and S are the teacher's and the student's distributions at the given
temperature, M = β·T + (1−β)·S. All values are nats per token.

All that are built of Kullback-Leibler divergences are sums of `kl_terms`, its element-wise Bregman form. This is the
definition; `tile.py` has the same values with their gradients in closed form, and the tests hold it to this.
"""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch

from kdtrain.losses.kinds import DEFAULT_PARAMS, Divergence, DivergenceParams

# Below this |log p − log q| the closed form p·d − p + q loses digits to cancellation and a series takes over, which at
# the edge leaves out less than 1e-7 of the value.
_SERIES_BELOW = 0.5
# The same for the α-β divergence: where the larger exponent times |log p − log q| is below this.
_AB_SERIES_ABOVE = 0.3
# exp(80) is still finite in float32, and a probability of exp(−80) adds nothing to a sum.
MAX_LOG_RATIO = 80.0
# A logit this far below the largest has a probability of exactly 0 in float32 and float64.
_BELOW_MAX = 1.0e4


def generalized_jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence: Divergence = "jsd",
    params: DivergenceParams = DEFAULT_PARAMS,
    teacher_entropy: torch.Tensor | None = None,
) -> torch.Tensor:
    """Divergence between teacher and student at every position.

    - `jsd`: JSD_β = β·KL(T‖M) + (1−β)·KL(S‖M). β = 0 is KL(T‖S), forward KL; β = 1 is KL(S‖T), reverse KL. Both are
      defined apart, since JSD_β itself tends to 0 at the ends.
    - `jsd_scaled`: JSD_β / (β·(1−β)) inside (0, 1), whose limits at the ends are the two KLs: continuous in β.
    - `mixed_kl`: (1−β)·KL(T‖S) + β·KL(S‖T), what some other tools call JSD.
    - `skew_kl`: KL(T‖αT+(1−α)S), `skew_reverse_kl`: KL(S‖αS+(1−α)T), α = `skew_alpha`; at α = 0 the two KLs. Ko et al.
      2024 (DistiLLM), https://arxiv.org/abs/2402.03898, equation 4.
    - `alpha_beta`: −1/(αβ)·Σ [T^α·S^β − α/(α+β)·T^(α+β) − β/(α+β)·S^(α+β)], α = `ab_alpha`, β = `ab_beta`, with its
      limits where α, β or α + β is 0; (1, 0) is KL(T‖S) and (0, 1) is KL(S‖T). Wang et al. 2025 (ABKD),
      https://arxiv.org/abs/2505.04560, definition 3.1.
    - `entropy_aware`: KL(S‖T), and KL(T‖S) is added where the teacher's entropy at temperature 1 is above
      `entropy_threshold`. https://arxiv.org/abs/2603.07079.
    - `tvd`: ½·Σ |T − S|, in [0, 1]: total variation.

    Args:
        student_logits: [..., V], any float dtype.
        teacher_logits: [..., V], same shape.
        beta: in [0, 1]; the last five take none.
        temperature: > 0; both logits are divided by it. The result is not multiplied by temperature².
        divergence: one of those above.
        params: the numbers of the last five.
        teacher_entropy: [...] nats, what `entropy_aware` compares where the teacher's logits are not those of
            temperature 1 (a mean of softened distributions); None is found from them.

    Returns:
        [...], nats per token, float32 (float64 for float64 logits). Never negative, exactly 0 for equal logits.

    Numerics: computed in float32 whatever the input. A logit of −inf is a probability of 0. The value is exact wherever
    it is finite; where KL(P‖Q) would be infinite because Q is 0 and P is not, P is conditioned on the support of Q, and
    so are the sides of `alpha_beta` where its exponents make it infinite.

    Gradients flow to both arguments; callers run the teacher without a graph.

    Raises:
        ValueError: shapes differ, or β, temperature or divergence is out of range.

    Source of `jsd`: Agarwal et al. 2024, https://arxiv.org/abs/2306.13649, equation 1. Differs from
    `trl.experimental.gkd.GKDTrainer.generalized_jsd_loss`: no reduction, float32, temperature applied, −inf allowed.
    """
    check_divergence_arguments(beta, temperature, divergence)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher logits must have one shape, got {tuple(student_logits.shape)} (student) "
            f"and {tuple(teacher_logits.shape)} (teacher)"
        )
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    if divergence == "mixed_kl":
        value = torch.zeros((), dtype=dtype, device=student.device)
        if beta < 1:
            value = value + (1 - beta) * _kl(teacher, student, temperature)
        if beta > 0:
            value = value + beta * _kl(student, teacher, temperature)
        return value
    if divergence == "skew_kl":
        return _skewed(teacher, student, params.skew_alpha, temperature)
    if divergence == "skew_reverse_kl":
        return _skewed(student, teacher, params.skew_alpha, temperature)
    if divergence == "alpha_beta":
        return _alpha_beta(student, teacher, params.ab_alpha, params.ab_beta, temperature)
    if divergence == "entropy_aware":
        own = entropy(teacher.detach()) if teacher_entropy is None else teacher_entropy
        uncertain = own > params.entropy_threshold
        forward = _kl(teacher, student, temperature)
        return _kl(student, teacher, temperature) + torch.where(uncertain, forward, 0.0)
    if divergence == "tvd":
        s, t = _normalise(student, temperature), _normalise(teacher, temperature)
        return 0.5 * _difference(s.p, t.p, _log_ratio(s, t, temperature)).abs().sum(-1)
    if beta == 0:
        return _kl(teacher, student, temperature)
    if beta == 1:
        return _kl(student, teacher, temperature)
    value = _jsd(student, teacher, beta, temperature)
    return value / (beta * (1 - beta)) if divergence == "jsd_scaled" else value


def check_divergence_arguments(beta: float, temperature: float, divergence: str) -> None:
    """Raise `ValueError` for a β outside [0, 1], a temperature that is not positive, or an unknown divergence."""
    if not 0 <= beta <= 1:  # also false for NaN
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if divergence not in get_args(Divergence):
        raise ValueError(f"divergence must be one of {', '.join(get_args(Divergence))}, got {divergence!r}")


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of softmax(logits), [..., V] -> [...], nats, float32; −inf logits count as probability 0."""
    d = _normalise(logits.to(torch.promote_types(logits.dtype, torch.float32)), 1.0)
    return d.total.log().squeeze(-1) - (d.p * (d.logits - d.largest)).sum(-1)


def kl_terms(p: torch.Tensor, q: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """p·log(p/q) − p + q for every element, given log_ratio = log p − log q; all terms are ≥ 0.

    Over a vocabulary −p + q sums to 0, so the sum is KL(p‖q). Unlike Σ p·log(p/q), whose terms have both signs, it
    cannot come out negative, and an error ε in log_ratio (the rounding of a log-softmax) costs only p·log_ratio·ε: the
    divergence of two nearly equal models keeps its digits in float32.
    """
    d = log_ratio
    small = d.abs() < _SERIES_BELOW
    # Both branches of torch.where take part in the backward pass: keep each finite where the other is chosen.
    s = torch.where(small, d, 0.0)
    tail = 1 / 120 - s * (1 / 720 - s * (1 / 5040 - s / 40320))
    series = p * s * s * (1 / 2 - s * (1 / 6 - s * (1 / 24 - s * tail)))
    return torch.where(small, series, p * d - p + q)


class _Distribution(NamedTuple):
    """softmax(logits/temperature) and what its logarithm is made of: (logits − largest)/temperature − log(total)."""

    logits: torch.Tensor
    """[..., V], finite: −inf became a logit so low that its probability is exactly 0."""
    largest: torch.Tensor
    """[..., 1], no graph."""
    total: torch.Tensor
    """[..., 1], Σ exp((logits − largest)/temperature), from 1 to V."""
    p: torch.Tensor
    """[..., V]."""


def _normalise(logits: torch.Tensor, temperature: float) -> _Distribution:
    largest = logits.detach().amax(-1, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0.0, largest)  # no support at all: uniform rather than NaN
    # Then 0·log 0 is 0, in value and in gradient: 0·inf would be NaN in the backward pass even when masked afterwards.
    finite = torch.where(logits == -torch.inf, largest - _BELOW_MAX * temperature, logits)
    scaled = (finite - largest) / temperature
    return _Distribution(finite, largest, scaled.exp().sum(-1, keepdim=True), torch.softmax(scaled, -1))


def _log_ratio(p: _Distribution, q: _Distribution, temperature: float) -> torch.Tensor:
    """log p − log q, [..., V].

    Differences of like things first: exact where the models nearly agree. The logarithm of each total alone would be a
    number of about ten, with a rounding that all of a row share.
    """
    return ((p.logits - q.logits) - (p.largest - q.largest)) / temperature - (p.total / q.total).log()


def _kl(p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(P‖Q), [..., V] -> [...]; P is conditioned on the support of Q, without which the value would be infinite."""
    p = _normalise(p_logits.masked_fill(q_logits == -torch.inf, -torch.inf), temperature)
    q = _normalise(q_logits, temperature)
    return kl_terms(p.p, q.p, _log_ratio(p, q, temperature)).sum(-1)


def _jsd(student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float, temperature: float) -> torch.Tensor:
    """JSD_β for β inside (0, 1), [..., V] -> [...]. Finite for any pair of supports, since M covers both."""
    s, t = _normalise(student_logits, temperature), _normalise(teacher_logits, temperature)
    m = beta * t.p + (1 - beta) * s.p
    # log(t/m) and log(s/m) from log(t/s) alone: log m taken by itself would cost the digits that matter when s ≈ t.
    log_ts = _log_ratio(t, s, temperature).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    teacher_part = kl_terms(t.p, m, _log_to_mixture(log_ts, beta))
    student_part = kl_terms(s.p, m, _log_to_mixture(-log_ts, 1 - beta))
    return (beta * teacher_part + (1 - beta) * student_part).sum(-1)


def _skewed(p_logits: torch.Tensor, q_logits: torch.Tensor, alpha: float, temperature: float) -> torch.Tensor:
    """KL(P‖α·P + (1−α)·Q), [..., V] -> [...]."""
    if alpha == 0:
        return _kl(p_logits, q_logits, temperature)
    p, q = _normalise(p_logits, temperature), _normalise(q_logits, temperature)
    log_pq = _log_ratio(p, q, temperature).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return kl_terms(p.p, alpha * p.p + (1 - alpha) * q.p, _log_to_mixture(log_pq, alpha)).sum(-1)


def _alpha_beta(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, alpha: float, beta: float, temperature: float
) -> torch.Tensor:
    """The α-β divergence, [..., V] -> [...]."""
    impossible = (student_logits == -torch.inf, teacher_logits == -torch.inf)
    if alpha <= 0:  # infinite where the student finds possible what the teacher does not
        student_logits = student_logits.masked_fill(impossible[1], -torch.inf)
    if beta <= 0:
        teacher_logits = teacher_logits.masked_fill(impossible[0], -torch.inf)
    s, t = _normalise(student_logits, temperature), _normalise(teacher_logits, temperature)
    log_q = (t.logits - t.largest) / temperature - t.total.log()
    terms = alpha_beta_terms(log_q, _log_ratio(t, s, temperature), alpha, beta)
    neither = (student_logits == -torch.inf) & (teacher_logits == -torch.inf)
    return terms.masked_fill(neither, 0.0).sum(-1)


def alpha_beta_terms(log_q: torch.Tensor, log_qp: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """The terms of the α-β divergence from log q and log q − log p, each ≥ 0.

    With n = −|log q/p| and s = α + β a term is max(p, q)^s·h(n), which neither overflows nor, for either exponent near
    0, divides a difference of like numbers: with E(x) = (exp(x·n) − 1)/x and E(0) = n, where p is the larger one

        h = (E(s) − E(α))/β = (exp(α·n)·E(β) − E(s))/α,

    of which the one with the larger divisor is taken, and where q is, α and β change places.
    """
    n = -log_qp.abs()
    if min(alpha, beta) < 0:
        n = n.clamp(min=-MAX_LOG_RATIO)
    largest_s = torch.exp((alpha + beta) * (log_q + (-log_qp).clamp(min=0)))
    if alpha == beta:
        h = _alpha_beta_kernel(n, alpha, beta)
    else:
        h = torch.where(log_qp <= 0, _alpha_beta_kernel(n, alpha, beta), _alpha_beta_kernel(n, beta, alpha))
    return largest_s * h


def _alpha_beta_kernel(n: torch.Tensor, a: float, b: float) -> torch.Tensor:
    """h of `alpha_beta_terms`, ≥ 0; by its series where the difference of the two E would lose their digits."""

    def expm1_over(x: float) -> torch.Tensor:
        return n if x == 0 else torch.expm1(x * n) / x

    small = n * max(abs(a), abs(b), abs(a + b)) > -_AB_SERIES_ABOVE
    m = torch.where(small, n, 0.0)  # both branches of the last line take part in a backward pass
    series = torch.zeros_like(n)
    for k in range(8, 1, -1):  # Σ n^k/k!·(s^(k−1) − a^(k−1))/b, whose quotient is Σ s^i·a^(k−2−i)
        series = series * m + sum((a + b) ** i * a ** (k - 2 - i) for i in range(k - 1)) / math.factorial(k)
    series = series * m * m
    if a == b == 0:
        return series
    if abs(b) >= abs(a):
        h = (expm1_over(a + b) - expm1_over(a)) / b
    else:
        h = (torch.exp(a * n) * expm1_over(b) - expm1_over(a + b)) / a
    return torch.where(small, series, h)


def _difference(p: torch.Tensor, q: torch.Tensor, log_ratio: torch.Tensor) -> torch.Tensor:
    """p − q given log(p/q), [..., V]: from the ratio where that is near 1, so that the difference keeps its digits."""
    near = log_ratio.abs() < _SERIES_BELOW
    return torch.where(near, q * torch.expm1(torch.where(near, log_ratio, 0.0)), p - q)


def _log_to_mixture(log_ratio: torch.Tensor, weight: float) -> torch.Tensor:
    """log(p/m) for m = weight·p + (1−weight)·q, given log(p/q): −log(weight + (1−weight)·q/p)."""
    near = log_ratio.abs() < 0.5
    # log1p keeps the digits where p ≈ q; elsewhere it would lose them, 1 − (1−weight) being a poor small weight.
    by_log1p = torch.log1p((1 - weight) * torch.expm1(-torch.where(near, log_ratio, 0.0)))
    return -torch.where(near, by_log1p, torch.log(weight + (1 - weight) * torch.exp(-log_ratio)))
