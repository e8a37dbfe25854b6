"""Figures that a server's answers are judged by.

Shapes: S positions, K known tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdtrain.losses.topk import TopKLogprobs

_LEAST = -30.0
_LEAST_VARIANCE = 0.1


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
    """Standard deviations: within ±3 where they are. Above, the tokens were drawn from something flatter (at a higher
    temperature) than what is reported; below, from something sharper."""


def sampling_fit(targets: TopKLogprobs, drawn_S: Sequence[int]) -> SamplingFit:
    """Compare the log-probabilities with tokens that the server drew at temperature 1.

    Whatever p is, if tokens are drawn by it: they are among the K as often as the mass of these says, and for those
    that are, −log p is in the mean the entropy of p among the K. Both in standard deviations, and their mean in its
    own; what a server softens or sharpens when it reports moves both in the same direction.
    """
    known_SK = targets.logprobs.double().clamp(min=_LEAST)
    named_SK = targets.indices == torch.tensor(drawn_S)[:, None]
    named_S = named_SK.any(-1)
    mass_S = known_SK.exp().sum(-1).clamp(max=1.0)
    outside = _in_deviations((~named_S).double() - (1 - mass_S), mass_S * (1 - mass_S))

    log_p_SK = torch.log_softmax(known_SK[named_S], -1)
    p_SK = log_p_SK.exp()
    entropy_S = -(p_SK * log_p_SK).sum(-1)
    surprise_S = -(log_p_SK * named_SK[named_S]).sum(-1)
    among = _in_deviations(surprise_S - entropy_S, (p_SK * log_p_SK.square()).sum(-1) - entropy_S.square())
    found = [z for z in (outside, among) if z is not None]
    return SamplingFit(len(drawn_S), sum(found) / math.sqrt(max(len(found), 1)))


def _in_deviations(deviation_S: torch.Tensor, variance_S: torch.Tensor) -> float | None:
    """None where nothing can vary, and nothing does: every token is known, or one alone."""
    variance, deviation = float(variance_S.clamp(min=0).sum()), float(deviation_S.sum())
    if variance <= _LEAST_VARIANCE and abs(deviation) < 1:
        return None
    return deviation / math.sqrt(max(variance, _LEAST_VARIANCE))
