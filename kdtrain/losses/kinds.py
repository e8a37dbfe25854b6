"""What the losses can be told by name. Free of torch, so that the config reads its choices here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Divergence = Literal[
    "jsd", "jsd_scaled", "mixed_kl", "skew_kl", "skew_reverse_kl", "alpha_beta", "entropy_aware", "tvd"
]
WithBeta = Literal["jsd", "jsd_scaled", "mixed_kl"]
Tail = Literal["bucket", "renormalize"]
TokenScore = Literal["student_entropy", "disagreement"]
Distance = Literal["mse", "cosine"]
Match = Literal["exact", "interpolate"]
VisualTargetName = Literal["vit", "aligner", "deepstack"]

WITH_BETA: tuple[WithBeta, ...] = get_args(WithBeta)
"""Divergences that β has a part in."""
BUCKET_ONLY: tuple[Divergence, ...] = ("tvd", "alpha_beta")
"""Divergences that a top-k teacher without its tail does not serve."""
VISUAL_TARGETS: tuple[VisualTargetName, ...] = get_args(VisualTargetName)


@dataclass(frozen=True)
class DivergenceParams:
    """Numbers that single divergences have beside β and temperature; each is read by its own alone.

    Raises:
        ValueError: a number outside its range.
    """

    skew_alpha: float = 0.1
    """Of `skew_kl` and `skew_reverse_kl`, in [0, 1): the share of the first distribution in the second."""
    ab_alpha: float = 0.2
    """Of `alpha_beta`: the exponent of the teacher. `ab_alpha` + `ab_beta` ≥ 0."""
    ab_beta: float = 0.7
    """Of `alpha_beta`: the exponent of the student."""
    entropy_threshold: float = 0.8
    """Of `entropy_aware`, nats, ≥ 0: above this entropy of the teacher forward KL is added."""

    def __post_init__(self) -> None:
        if not 0 <= self.skew_alpha < 1:  # also false for NaN
            raise ValueError(f"skew_alpha must be in [0, 1), got {self.skew_alpha}")
        if not (abs(self.ab_alpha) < float("inf") and abs(self.ab_beta) < float("inf")):
            raise ValueError(f"ab_alpha and ab_beta must be finite, got {self.ab_alpha} and {self.ab_beta}")
        if self.ab_alpha + self.ab_beta < 0:
            raise ValueError(
                f"ab_alpha + ab_beta must not be negative, got {self.ab_alpha} + {self.ab_beta}: tokens that neither "
                "model finds likely would be the whole divergence"
            )
        if not 0 <= self.entropy_threshold < float("inf"):
            raise ValueError(f"entropy_threshold must be non-negative and finite, got {self.entropy_threshold}")

    def numbers(self, divergence: str, beta: float) -> str:
        """The numbers that a divergence has, in words, such as `beta 0.5`; empty where it has none."""
        if divergence.startswith("skew"):
            return f"alpha {self.skew_alpha:g}"
        if divergence == "alpha_beta":
            return f"alpha {self.ab_alpha:g}, beta {self.ab_beta:g}"
        if divergence == "entropy_aware":
            return f"entropy above {self.entropy_threshold:g} nats"
        return f"beta {beta:g}" if divergence in WITH_BETA else ""


DEFAULT_PARAMS = DivergenceParams()


class Stretch(NamedTuple):
    """Tokens of a call that follow each other, and what compares them with their teacher."""

    tokens: int
    taught: int
    """How many of them have a weight above 0 in the divergence; or more."""
    divergence: Divergence
    beta: float
