"""Divergences between two categorical distributions given by logits. Pure maths: no masks, no reduction, no state.

Shapes: V vocabulary, `...` any leading shape. T and S are the teacher's and the student's distributions at the given
temperature, M = β·T + (1−β)·S. All values are nats per token.

Every divergence here is a sum of `kl_terms`, the element-wise Bregman form of the Kullback-Leibler divergence. This is
the definition; `tile.py` has the same values with their gradients in closed form, and the tests hold it to this.
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch

from kdtrain.losses.kinds import Divergence

# Below this |log p − log q| the closed form p·d − p + q loses digits to cancellation and a series takes over, which at
# the edge leaves out less than 1e-7 of the value.
_SERIES_BELOW = 0.5
# exp(80) is still finite in float32, and a probability of exp(−80) adds nothing to a sum.
_MAX_LOG_RATIO = 80.0
# A logit this far below the largest has a probability of exactly 0 in float32 and float64.
_BELOW_MAX = 1.0e4


def generalized_jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence: Divergence = "jsd",
) -> torch.Tensor:
    """Divergence between teacher and student at every position.

    - `jsd`: JSD_β = β·KL(T‖M) + (1−β)·KL(S‖M). β = 0 is KL(T‖S), forward KL; β = 1 is KL(S‖T), reverse KL. Both are
      defined apart, since JSD_β itself tends to 0 at the ends.
    - `jsd_scaled`: JSD_β / (β·(1−β)) inside (0, 1), whose limits at the ends are the two KLs: continuous in β.
    - `mixed_kl`: (1−β)·KL(T‖S) + β·KL(S‖T), what some other tools call JSD.

    Args:
        student_logits: [..., V], any float dtype.
        teacher_logits: [..., V], same shape.
        beta: in [0, 1].
        temperature: > 0; both logits are divided by it. The result is not multiplied by temperature².
        divergence: one of the three above.

    Returns:
        [...], nats per token, float32 (float64 for float64 logits). Never negative, exactly 0 for equal logits.

    Numerics: computed in float32 whatever the input. A logit of −inf is a probability of 0. The value is exact wherever
    it is finite; where KL(P‖Q) would be infinite because Q is 0 and P is not, P is conditioned on the support of Q.

    Gradients flow to both arguments; callers run the teacher without a graph.

    Raises:
        ValueError: shapes differ, or β, temperature or divergence is out of range.

    Source: Agarwal et al. 2024, https://arxiv.org/abs/2306.13649, equation 1. Differs from
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
    return d.log_sum.squeeze(-1) - (d.p * (d.logits - d.largest)).sum(-1)


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
    """softmax(logits/temperature) and what its logarithm is made of: (logits − largest)/temperature − log_sum."""

    logits: torch.Tensor
    """[..., V], finite: −inf became a logit so low that its probability is exactly 0."""
    largest: torch.Tensor
    """[..., 1], no graph."""
    log_sum: torch.Tensor
    """[..., 1], log Σ exp((logits − largest)/temperature)."""
    p: torch.Tensor
    """[..., V]."""


def _normalise(logits: torch.Tensor, temperature: float) -> _Distribution:
    largest = logits.detach().amax(-1, keepdim=True)
    largest = torch.where(largest == -torch.inf, 0.0, largest)  # no support at all: uniform rather than NaN
    # Then 0·log 0 is 0, in value and in gradient: 0·inf would be NaN in the backward pass even when masked afterwards.
    finite = torch.where(logits == -torch.inf, largest - _BELOW_MAX * temperature, logits)
    scaled = (finite - largest) / temperature
    return _Distribution(finite, largest, torch.logsumexp(scaled, -1, keepdim=True), torch.softmax(scaled, -1))


def _log_ratio(p: _Distribution, q: _Distribution, temperature: float) -> torch.Tensor:
    """log p − log q, [..., V]. Logits are subtracted from logits first: exact where the models nearly agree."""
    return ((p.logits - q.logits) - (p.largest - q.largest)) / temperature - (p.log_sum - q.log_sum)


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
    log_ts = _log_ratio(t, s, temperature).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    teacher_part = kl_terms(t.p, m, _log_to_mixture(log_ts, beta))
    student_part = kl_terms(s.p, m, _log_to_mixture(-log_ts, 1 - beta))
    return (beta * teacher_part + (1 - beta) * student_part).sum(-1)


def _log_to_mixture(log_ratio: torch.Tensor, weight: float) -> torch.Tensor:
    """log(p/m) for m = weight·p + (1−weight)·q, given log(p/q): −log(weight + (1−weight)·q/p)."""
    near = log_ratio.abs() < 0.5
    # log1p keeps the digits where p ≈ q; elsewhere it would lose them, 1 − (1−weight) being a poor small weight.
    by_log1p = torch.log1p((1 - weight) * torch.expm1(-torch.where(near, log_ratio, 0.0)))
    return -torch.where(near, by_log1p, torch.log(weight + (1 - weight) * torch.exp(-log_ratio)))
