"""Figures that a server's answers are judged by.

Shapes: S positions, K known tokens, O = K + 1 outcomes (the known tokens, and any other).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdtrain.losses.topk import TopKLogprobs, teacher_tail

_LEAST = -30.0
_TEMPERATURES = tuple(2 ** (i / 8) for i in range(-24, 25))  # 1/8 to 8


def difference(first: TopKLogprobs, second: TopKLogprobs) -> float:
    """How far two answers for the same positions are apart: the largest of Σ p·|Δ log p|, in nats.

    By probability, since the logarithms of unlikely tokens differ by tenths where a server rounds to bfloat16. A token
    that only one of both names is compared with the least likely one that the other names.
    """
    if not len(first.indices):
        return 0.0
    return max(float(_gap_S(first, second).max()), float(_gap_S(second, first).max()))


def _gap_S(first: TopKLogprobs, second: TopKLogprobs) -> torch.Tensor:
    same_SKK = (first.indices[:, :, None] == second.indices[:, None, :]) & (first.indices >= 0)[:, :, None]
    theirs = second.logprobs.double().clamp(min=_LEAST)
    mine = first.logprobs.double().clamp(min=_LEAST)
    found = torch.where(same_SKK, theirs[:, None, :], -torch.inf).amax(-1)
    least = theirs.amin(-1, keepdim=True)
    gap = torch.where(same_SKK.any(-1), (mine - found).abs(), (mine - least).clamp(min=0))
    return (first.logprobs.double().exp() * gap).sum(-1)


@dataclass(frozen=True)
class SamplingFit:
    """Whether the log-probabilities of written tokens are those that they were drawn by."""

    tokens: int
    z: float
    """(Σ −log p of what was drawn − Σ entropy) in standard deviations: within ±3 where they are."""
    temperature: float
    """The written tokens were drawn as if at this temperature, where the log-probabilities are at 1."""


def sampling_fit(targets: TopKLogprobs, drawn_S: Sequence[int]) -> SamplingFit:
    """Compare the log-probabilities with tokens that the server drew at temperature 1.

    If a token is drawn by p, −log p of it is the entropy of p in the mean, whatever p is; the same holds with all
    tokens beyond the K as one. If the server softens or sharpens what it reports, but not what it draws by, it is not.
    """
    known = targets.logprobs.double().clamp(min=_LEAST)
    log_p_SO = torch.cat([known, teacher_tail(known, torch.zeros_like(known[:, :1], dtype=torch.bool))], 1)
    log_p_SO = torch.log_softmax(log_p_SO, -1)
    named_SK = targets.indices == torch.tensor(drawn_S)[:, None]
    outcome_S = torch.where(named_SK.any(-1), named_SK.int().argmax(-1), known.shape[1])
    p_SO = log_p_SO.exp()
    entropy_S = -(p_SO * log_p_SO).sum(-1)
    variance_S = (p_SO * log_p_SO.square()).sum(-1) - entropy_S.square()
    surprise_S = -log_p_SO.gather(1, outcome_S[:, None])[:, 0]
    z = float((surprise_S - entropy_S).sum()) / max(math.sqrt(float(variance_S.sum())), 1e-6)
    return SamplingFit(len(drawn_S), z, _best_temperature(log_p_SO, outcome_S))


def _best_temperature(log_p_SO: torch.Tensor, outcome_S: torch.Tensor) -> float:
    def likelihood(temperature: float) -> float:
        tempered = torch.log_softmax(log_p_SO / temperature, -1)
        return float(tempered.gather(1, outcome_S[:, None]).sum())

    return max(_TEMPERATURES, key=likelihood)
