"""Divergence from a teacher that is known by tokens drawn from its distribution.

Shapes: N supervised tokens, V vocabulary, K different tokens drawn per position.

Drawing instead of keeping the k most likely tokens leaves nothing out in the mean: the tail is drawn as often as it is
likely (arXiv 2503.16870).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kdtrain.errors import TargetsError
from kdtrain.host import send
from kdtrain.losses.divergence import check_divergence_arguments, generalized_jsd
from kdtrain.losses.kinds import WITH_BETA, Divergence
from kdtrain.losses.mixture import MixedTopK
from kdtrain.losses.topk import TopKLogprobs, check_ids, refuse_wrong, repeated_ids

# Weights of one position may add up to this much more or less than 1: float32 shares of some hundred draws do, and
# half precision rounds each of them by more.
_OFF_BY = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
_LEAST_OFF_BY = 1e-4


@dataclass(frozen=True)
class SampledTargets:
    """Tokens drawn from a teacher's distribution, each with its share of the draws (arXiv 2503.16870).

    They are drawn from the distribution at the temperature of the loss (`kd_temperature`), where other targets are
    those of temperature 1. The mean over draws of the gradient of forward KL is that of the full distribution; of no
    other divergence is it, and the losses refuse them.

    Args:
        indices: [N, K] int64, token ids, different within a row; −1 marks a missing entry.
        weights: [N, K] float, ≥ 0, Σ = 1 in each row; 0 where missing. A sum that is off by a rounding (1e-4; float16
            2e-3, bfloat16 1e-2) is divided out.

    Raises:
        ValueError: shapes or dtypes that do not fit; and, for tensors on a CPU, NaN, a negative weight, an id twice in
            a row, weights that do not add up to 1, or a missing entry with a weight. On another device the values are
            not looked at: the host would wait for it.
    """

    indices: torch.Tensor
    weights: torch.Tensor

    def __post_init__(self) -> None:
        if self.indices.ndim != 2 or self.indices.shape != self.weights.shape:
            raise TargetsError(
                f"expected indices [N, K] and weights [N, K], got {tuple(self.indices.shape)} "
                f"and {tuple(self.weights.shape)}"
            )
        if self.indices.dtype.is_floating_point or not self.weights.dtype.is_floating_point:
            raise TargetsError(
                f"expected integer indices and floating point weights, got {self.indices.dtype} and "
                f"{self.weights.dtype}"
            )
        if self.indices.device.type == self.weights.device.type == "cpu" and len(self.indices):
            object.__setattr__(self, "weights", _checked_weights(self.indices, self.weights))

    def __getitem__(self, rows: torch.Tensor | slice) -> SampledTargets:
        return self._of_checked(self.indices[rows], self.weights[rows])

    def to(self, device: torch.device) -> SampledTargets:
        """The same targets on a device."""
        return self._of_checked(send(self.indices, device), send(self.weights, device))

    @classmethod
    def _of_checked(cls, indices: torch.Tensor, weights: torch.Tensor) -> SampledTargets:
        """Parts and copies of targets need no second look: it sorts every row."""
        targets = object.__new__(cls)
        object.__setattr__(targets, "indices", indices)
        object.__setattr__(targets, "weights", weights)
        return targets


SparseTargets = TopKLogprobs | SampledTargets | MixedTopK
"""A teacher that is known by some tokens at each position, or the mean of several."""


def _checked_weights(indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weights of a position, [N, K]; divided by their sum where that is off by a rounding.

    Raises:
        TargetsError, NonFiniteTargetsError: naming the first position that holds no draws.
    """
    total = weights.double().sum(-1)
    most = _OFF_BY.get(weights.dtype, _LEAST_OFF_BY)
    wrong = {
        "NaN or infinity among the weights": ~weights.isfinite().all(-1),
        "a negative weight": (weights < 0).any(-1),
        "a token id twice": repeated_ids(indices),
        "a missing entry (id −1) with a weight": ((indices < 0) & (weights != 0)).any(-1),
        f"weights that do not add up to 1 within {most:g}": ~((total - 1).abs() <= most),
    }
    refuse_wrong("sampled targets", "weights", wrong, indices, weights)
    if not (total != 1).any():
        return weights
    return (weights.double() / total[:, None]).to(torch.promote_types(weights.dtype, torch.float32))


def sampled_divergence(student_logits: torch.Tensor, targets: SampledTargets, temperature: float = 1.0) -> torch.Tensor:
    """Σ w·log(w/p_S) at every position: forward KL from the draws to the student.

    Args:
        student_logits: [N, V], any float dtype.
        targets: N rows, drawn at `temperature`.
        temperature: > 0; the student's logits are divided by it. The weights are not: they are of the softened
            distribution already.

    Returns:
        [N], nats per token, float32, never negative. **Its value is the KL of the draws**: above KL(T‖S) in the mean,
        by what the draws differ from the teacher they are of, E[KL(w‖T)], which does not depend on the student; with n
        draws it is some (tokens the teacher finds possible)/2n nats where n is large.

    The gradient with respect to logits/temperature is p_S − w, whose mean over draws is that of KL(T‖S), p_S − p_T. It
    flows to all of the student's logits.

    Raises:
        ValueError: shapes, ids or a temperature that do not fit.

    Source: Anshumann et al. 2025, https://arxiv.org/abs/2503.16870.
    """
    check_divergence_arguments(0.0, temperature, "jsd")
    check_sampled_targets(targets, len(student_logits), student_logits.shape[-1])
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    logits = student_logits.to(dtype)
    # As a distribution over the whole vocabulary, so that the one definition of forward KL serves here too.
    weights_NV = torch.zeros_like(logits).scatter_add_(
        1, targets.indices.to(logits.device).clamp(min=0), targets.weights.to(logits.device, dtype)
    )
    return generalized_jsd(logits / temperature, weights_NV.log(), 0.0)


def check_sampled_targets(
    targets: SampledTargets, tokens: int, vocabulary: int, beta: float = 0.0, divergence: Divergence = "jsd"
) -> None:
    """Raise `ValueError` for a wrong number of rows, ids outside the vocabulary, or another divergence than forward KL.

    Ids are looked at on a CPU only.

    Args:
        beta: of the divergence; 0 is forward KL in each of those that have one.
    """
    if divergence not in WITH_BETA or beta != 0:
        what = f"beta is {beta:g}" if divergence in WITH_BETA else f"the divergence is {divergence}"
        raise ValueError(
            f"{what}, and the targets are tokens drawn from the teacher: their gradient is right for forward KL alone. "
            "Use divergence=jsd with beta=0, or a teacher's top-k or full distributions."
        )
    check_ids(targets.indices, "sampled targets", tokens, vocabulary)


def most_drawn(targets: SampledTargets) -> torch.Tensor:
    """[N, 1] the id that was drawn most often, the lowest of those that share this place."""
    largest = targets.weights == targets.weights.amax(-1, keepdim=True)
    beyond = torch.iinfo(targets.indices.dtype).max
    return targets.indices.masked_fill(~largest, beyond).amin(-1, keepdim=True)


def estimated_logprobs(targets: SampledTargets) -> TopKLogprobs:
    """What draws say about the distribution that they are of, with a tail for what was not drawn; for checks alone.

    By Good and Turing: tokens that were not drawn are as likely, together, as those drawn once. How many draws there
    were is taken from the smallest weight of all positions, which is that of a token drawn once.
    """
    weights = targets.weights.float()
    drawn = weights > 0
    once = weights[drawn].amin() if drawn.any() else weights.new_ones(())
    unseen = (weights * (drawn & (weights < 1.5 * once))).sum(-1, keepdim=True)
    unseen = unseen.clamp(min=0.5 * float(once), max=0.5)
    logprobs = (weights * (1 - unseen)).log()
    return TopKLogprobs(torch.where(drawn, targets.indices, -1), logprobs)
