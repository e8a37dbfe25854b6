"""What the losses against a teacher with another tokenizer share: slots of text, their weights and their denominator.

Shapes: S supervised tokens of the student, C slots, V vocabulary.

A slot is a chunk of text that tokens of both models make up, see `kdtrain.data.byte_alignment`; slots may be empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kdtrain.losses.chunks import ChunkedPass
from kdtrain.losses.reduce import FusedLoss, normaliser
from kdtrain.losses.tile import TileOptions


def sums_of_slots(values_S: torch.Tensor, slots_S: torch.Tensor, count: int) -> torch.Tensor:
    """[C]: the values of each slot's tokens, added up."""
    return values_S.new_zeros(count + 1).index_add(0, slots_S, values_S)[:count]


@dataclass(frozen=True)
class Made:
    """What follows from the labels' log-likelihoods."""

    loss: torch.Tensor
    kd_sum: torch.Tensor
    ce_sum: torch.Tensor
    weights: torch.Tensor
    """[S]: ∂ loss / ∂(−log p) of each label, times D."""
    beside: tuple[ChunkedPass, torch.Tensor] | None = None
    """A pass over some tokens, and which these are, that the loss has gradients of beside those of its labels."""


@dataclass(frozen=True)
class Slots:
    """The slots of a batch."""

    slots: torch.Tensor
    """[S] long, C where a token has none."""
    weights: torch.Tensor
    """[C], 0 of an empty one."""
    num_items: torch.Tensor
    """What the divergence is divided by."""

    @classmethod
    def of(
        cls,
        slots: torch.Tensor,
        count: int,
        kd_weights: torch.Tensor | None,
        num_kd_items: torch.Tensor | int | None,
        dtype: torch.dtype,
    ) -> Slots:
        """A slot weighs the mean of its tokens' weights; those of weight 0 are not counted."""
        tokens = sums_of_slots(torch.ones_like(slots, dtype=dtype), slots, count)
        weights = (tokens > 0).to(dtype)
        if kd_weights is not None:
            weights = sums_of_slots(kd_weights.to(dtype), slots, count) / tokens.clamp(min=1)
        own = (weights > 0).sum()
        return cls(slots, weights, normaliser(num_kd_items, own).to(dtype))

    def made(
        self,
        options: TileOptions,
        kd_sum: torch.Tensor,
        slopes_S: torch.Tensor,
        ce_mask: torch.Tensor | None,
        logprobs_S: torch.Tensor,
        items: torch.Tensor,
    ) -> Made:
        """The loss, and what each label's likelihood counts in it.

        Args:
            slopes_S: ∂ kd_sum / ∂ log p of each label.
            items: D.
        """
        kd_sum = kd_sum.to(logprobs_S.dtype)
        in_ce = torch.ones_like(logprobs_S) if ce_mask is None else ce_mask.to(logprobs_S)
        ce_sum = -torch.where(in_ce > 0, logprobs_S * in_ce, 0.0).sum()
        weights = -options.kd_weight * (items / self.num_items) * slopes_S.to(logprobs_S.dtype)
        loss = options.kd_weight * kd_sum / self.num_items
        if options.ce_weight > 0:  # and not 0 · Σ, which may be infinite
            loss, weights = loss + options.ce_weight * ce_sum / items, weights + options.ce_weight * in_ce
        return Made(loss, kd_sum, ce_sum, weights)


def label_metrics(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels that are the likeliest token, and the sum of entropies, of logits [S, V]."""
    log_p = logits.log_softmax(-1)
    entropy = -torch.where(log_p > -torch.inf, log_p * log_p.exp(), 0.0).sum()
    return (logits.gather(1, labels[:, None]) == logits.amax(-1, keepdim=True)).sum(), entropy


def fused_loss(loss: torch.Tensor, sums: Sequence[torch.Tensor]) -> FusedLoss:
    """Of Σ divergence, Σ cross-entropy, tokens, right ones and Σ entropy."""
    kd_sum, ce_sum, tokens, correct, entropy = sums
    return FusedLoss(
        loss=loss,
        kd_sum=kd_sum,
        ce_sum=ce_sum,
        num_tokens=tokens,
        num_correct=correct,
        num_agree=None,  # two vocabularies have no token in common that could be the likeliest of both
        student_entropy_sum=entropy,
        teacher_entropy_sum=None,
    )
