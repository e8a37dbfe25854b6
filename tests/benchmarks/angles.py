"""How far a top-k teacher turns the gradient: its angle to that of the full distributions, for each way with the tail.

No time is measured: the numbers are the same on every machine, but for the last digit.

Shapes: N tokens, V vocabulary, K known tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kdtrain.losses import TopKLogprobs, generalized_jsd, topk_divergence

TAILS = ("bucket", "renormalize", "truncate")
BETAS = {0.0: "forward KL", 0.5: "JSD, β 0.5", 1.0: "reverse KL"}


@dataclass(frozen=True)
class AngleCase:
    """Random logits whose probabilities fall as 1/rank, and a student that differs from them by normal noise."""

    beta: float = 0.0
    gap: float = 1.0
    """Standard deviation of the student's logits around the teacher's; 0.1 is near convergence."""
    k: int = 20
    vocab: int = 32768
    tokens: int = 64
    scatter: float = 0.3
    """Standard deviation of the teacher's logits around −exponent · log rank."""
    exponent: float = 1.0

    def __str__(self) -> str:
        steep = f", 1/rank^{self.exponent:g}" if self.exponent != 1 else ""
        return f"{BETAS[self.beta]}, student {self.gap:g} away, K {self.k}, V {self.vocab}, N {self.tokens}{steep}"


CASES = [AngleCase(beta, gap) for gap in (1.0, 0.1) for beta in BETAS]


def measure_angles(case: AngleCase) -> dict[str, Any]:
    """Degrees between the gradients with respect to the student's logits, those of all tokens taken as one vector."""
    student, teacher = logits(case)
    logprobs, indices = torch.log_softmax(teacher.double(), -1).topk(case.k)
    targets = TopKLogprobs(indices, logprobs.float())
    full = gradient(lambda z: generalized_jsd(z, teacher, case.beta), student)
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "bucket": lambda z: topk_divergence(z, targets, case.beta, tail="bucket"),
        "renormalize": lambda z: topk_divergence(z, targets, case.beta, tail="renormalize"),
        "truncate": lambda z: truncated(z, targets, case.beta),
    }
    return {
        "case": dataclasses.asdict(case),
        "title": str(case),
        "mass": logprobs.exp().sum(-1).mean().item(),
        "divergence": generalized_jsd(student, teacher, case.beta).mean().item(),
        "degrees": {name: angle(gradient(way, student), full) for name, way in ways.items()},
    }


def logits(case: AngleCase) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    by_rank = -case.exponent * torch.log(torch.arange(1, case.vocab + 1).float())
    ranks = torch.stack([torch.randperm(case.vocab, generator=generator) for _ in range(case.tokens)])
    teacher = by_rank[ranks] + case.scatter * torch.randn(ranks.shape, generator=generator)
    return teacher + case.gap * torch.randn(ranks.shape, generator=generator), teacher


def truncated(student: torch.Tensor, targets: TopKLogprobs, beta: float) -> torch.Tensor:
    """The definition's sum over the known tokens alone, as some tools have it: no divergence, it may be negative."""
    log_p = torch.log_softmax(student, -1).gather(1, targets.indices)
    log_q, p, q = targets.logprobs, log_p.exp(), targets.logprobs.exp()
    if beta == 0:
        return (q * (log_q - log_p)).sum(-1)
    if beta == 1:
        return (p * (log_p - log_q)).sum(-1)
    log_m = (beta * q + (1 - beta) * p).log()
    return (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)


def gradient(value: Callable[[torch.Tensor], torch.Tensor], student: torch.Tensor) -> torch.Tensor:
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(value(leaf).sum(), leaf)[0].double().flatten()


def angle(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.rad2deg(torch.acos(torch.cosine_similarity(first, second, dim=0))).item()
