"""How a student's likelihoods of chunks of text compare with a teacher's that has another tokenizer; values and slopes.

Shapes: C chunks.

A chunk is a run of bytes that both models' tokens make up (`kdtrain.data.byte_alignment`); its likelihood is the
product of those of its tokens, by the chain rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

TAU = 100.0
"""τ of `alm`."""

# Nearest to 1 that a likelihood counts as, in nats: float32 cannot tell it from 1.
_LEAST = 1e-7


class ChunkTerms(NamedTuple):
    """Of each chunk, [C]."""

    value: torch.Tensor
    """Nats."""
    slope: torch.Tensor
    """Its derivative with respect to the student's log-likelihood."""


def alm_terms(student_C: torch.Tensor, teacher_C: torch.Tensor, tau: float = TAU) -> ChunkTerms:
    """KL of two coins, teacher to student, that fall on heads with the tempered likelihoods of a chunk.

    With p = P_T^(1/τ), q = P_S^(1/τ):

        KL = p·log(p/q) + (1 − p)·log((1 − p)/(1 − q))        ∂KL/∂log P_S = (q − p) / (1 − q) / τ

    Args:
        student_C, teacher_C: log-likelihoods, ≤ 0; those of less than 1e-7 nats count as that.

    Near P = 1, 1 − q comes from expm1 and q − p from q's logarithm, so that neither is a difference of numbers that are
    nearly the same. Impossible chunks (−inf) have finite values where the teacher's is one; the student's has −inf.

    Source: approximate likelihood matching, Minixhofer et al. 2025, https://arxiv.org/abs/2503.20083, section 3, with
    the binarised KL at τ = 100.
    """
    dtype = torch.float32 if student_C.device.type == "mps" else torch.float64
    log_p, log_q = (x.to(dtype).clamp(max=-_LEAST) / tau for x in (teacher_C, student_C))
    log_p = log_p.clamp(min=-1e30)
    p = log_p.exp()
    heads = torch.where(p > 0, p * (log_p - log_q), 0.0)
    value = heads + -torch.expm1(log_p) * (log_one_minus_exp(log_p) - log_one_minus_exp(log_q))
    slope = torch.where(log_q > log_p, log_q.exp() * -torch.expm1(log_p - log_q), p * torch.expm1(log_q - log_p))
    return ChunkTerms(value.clamp(min=0), slope / -torch.expm1(log_q) / tau)


def log_one_minus_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 − e^x) for x < 0: by expm1 near 0, where 1 − e^x is small, and by log1p elsewhere, where e^x is.

    Source: Mächler 2012, "Accurately computing log(1 − exp(−|a|))", equation 7.
    """
    near = x > -0.6931471805599453
    return torch.where(near, (-torch.expm1(torch.where(near, x, -1.0))).log(), torch.log1p(-x.exp()))
