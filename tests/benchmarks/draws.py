"""What tokens drawn from a teacher do to the gradient of forward KL: nothing in the mean over many draws.

The mean over sets of draws is compared with the gradient of the full distributions, and with what keeping the k most
likely tokens makes of it. How near it comes is a matter of how many draws there are: `expected` is the error that the
mean of so many has if nothing is left out, √(Σ (1 − Σ q²) / draws) of all tokens over the gradient's norm. One set
alone is reported too: its angle is the noise that training averages over steps.

No time is measured: the numbers are the same on every machine, but for the last digit.

Shapes: N tokens, V vocabulary, K known tokens, D draws.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from kdtrain.losses import SampledTargets, TopKLogprobs, generalized_jsd, topk_divergence
from kdtrain.losses.sparse_tile import sampled_tile_terms
from kdtrain.losses.tile import Buffers, RowWeights, TileOptions
from tests.benchmarks.angles import AngleCase, angle, gradient, logits, truncated


@dataclass(frozen=True)
class DrawsCase:
    """The distributions of an `AngleCase`, from which tokens are drawn."""

    distributions: AngleCase
    draws: int = 50
    sets: int = 2000

    def __str__(self) -> str:
        return f"{self.distributions}, {self.sets:,} sets of {self.draws} draws"


# Of top 12. Language models are steeper than 1/rank, whose 20 most likely tokens have a third of the mass.
CASES = [
    DrawsCase(AngleCase(gap=gap, k=12, tokens=16, exponent=exponent))
    for exponent, gap in ((1.5, 2.0), (1.5, 1.5), (1.0, 2.0), (1.0, 1.5))
]
_FORWARD_KL = TileOptions(kd_weight=1.0, ce_weight=0.0, beta=0.0, temperature=1.0, divergence="jsd", tail="bucket")


def measure_draws(case: DrawsCase) -> dict[str, Any]:
    """Angles in degrees, those of all tokens taken as one vector; `error` is by norm, of that of the full gradient."""
    student, teacher = logits(case.distributions)
    full = gradient(lambda z: generalized_jsd(z, teacher, 0.0), student)
    probabilities, generator = torch.softmax(teacher.double(), -1), torch.Generator().manual_seed(1)
    mean, one_set = torch.zeros_like(full), []
    for number in range(case.sets):
        targets = drawn(probabilities, case.draws, generator)
        found = gradient_of_draws(student, targets)
        mean += found / case.sets
        if number < 20:
            one_set.append(angle(found, full))
    spread = (1 - probabilities.square().sum(-1)).sum()
    logprobs, indices = torch.log_softmax(teacher.double(), -1).topk(case.distributions.k)
    known = TopKLogprobs(indices, logprobs.float())
    return {
        "case": dataclasses.asdict(case),
        "title": str(case),
        "divergence": generalized_jsd(student, teacher, 0.0).mean().item(),
        "error": ((mean - full).norm() / full.norm()).item(),
        "expected": (spread / (case.draws * case.sets)).sqrt().item() / full.norm().item(),
        "degrees": {
            "mean of the sets": angle(mean, full),
            "one set": sum(one_set) / len(one_set),
            "truncate": angle(gradient(lambda z: truncated(z, known, 0.0), student), full),
            "bucket": angle(gradient(lambda z: topk_divergence(z, known), student), full),
        },
    }


def gradient_of_draws(student: torch.Tensor, targets: SampledTargets) -> torch.Tensor:
    """That of the fused loss with respect to the logits."""
    block, labels = student.clone(), torch.zeros(len(student), dtype=torch.int64)
    sampled_tile_terms(
        block, targets, labels, RowWeights(), _FORWARD_KL, Buffers.like(block, len(block)), with_gradient=True
    )
    return block.double().flatten()


def drawn(probabilities: torch.Tensor, draws: int, generator: torch.Generator) -> SampledTargets:
    """D draws at every position of [N, V]."""
    tokens = torch.multinomial(probabilities, draws, replacement=True, generator=generator).sort(-1).values
    first = torch.ones_like(tokens, dtype=torch.bool)
    first[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    place = first.cumsum(-1) - 1
    counts = torch.zeros_like(tokens).scatter_add_(1, place, torch.ones_like(tokens))
    return SampledTargets(torch.full_like(tokens, -1).scatter_(1, place, tokens), counts.float() / draws)
