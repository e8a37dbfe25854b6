"""The mean of several teachers' distributions, in probability space: T = Σ share · T_i, each at the loss's temperature.

Shapes: N tokens, V vocabulary, K known tokens of one teacher, U tokens that any of them has named.

The losses divide a teacher's logits by the temperature. A mean of softened distributions is no softened mean, so here
it is made first, and given to them as temperature · log T: divided by the temperature, that is T again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from kdtrain.losses.head import Head
from kdtrain.losses.topk import TopKLogprobs, teacher_tail


class Mixed(NamedTuple):
    """One distribution for each row, as logits; no graph."""

    at_one: torch.Tensor
    """Of the mean at temperature 1: what entropy and agreement are of."""
    softened: torch.Tensor
    """temperature · log of the mean of the softened ones; the same tensor at temperature 1."""


class Accumulator:
    """Adds up distributions one teacher at a time, in buffers [R, V] that are overwritten: log Σ share · softmax(z/τ).

    By `logaddexp`, for a probability that is 0 in float32 would have no logarithm.
    """

    def __init__(self, at_one: torch.Tensor, softened: torch.Tensor | None, temperature: float) -> None:
        self._blocks = [(at_one, 1.0)] if softened is None else [(at_one, 1.0), (softened, temperature)]
        self._begun = False

    def add(self, logits: torch.Tensor, share: float) -> None:
        """One teacher's logits, which stay as they are."""
        for block, temperature in self._blocks:
            weighted = torch.log_softmax(logits / temperature, -1).add_(math.log(share))
            if self._begun:
                torch.logaddexp(block, weighted, out=block)
            else:
                block.copy_(weighted)
        self._begun = True

    def finish(self) -> None:
        """The mean of the softened ones becomes logits that the loss will divide by the temperature."""
        for block, temperature in self._blocks[1:]:
            block.mul_(temperature)


def mix_logits(logits: Sequence[torch.Tensor], shares: Sequence[float], temperature: float) -> Mixed:
    """The mean of distributions that are given by logits.

    Args:
        logits: of each teacher, [N, V], over the same tokens; any float dtype.
        shares: of each one, > 0; they add up to 1.

    Returns:
        [N, V] each, float32 (float64 of float64).
    """
    dtype = torch.promote_types(logits[0].dtype, torch.float32)
    at_one = torch.empty_like(logits[0], dtype=dtype)
    softened = None if temperature == 1 else torch.empty_like(at_one)
    run = Accumulator(at_one, softened, temperature)
    for some, share in zip(logits, shares, strict=True):
        run.add(some.to(device=at_one.device, dtype=dtype), share)
    run.finish()
    return Mixed(at_one, at_one if softened is None else softened)


@dataclass(frozen=True)
class MixedHeads:
    """Teachers that are known by hidden states and a head each; without a graph."""

    hidden: tuple[torch.Tensor, ...]
    """Of each one [N, H_i], for the same N tokens."""
    heads: tuple[Head, ...]
    """Over the same vocabulary."""
    shares: tuple[float, ...]


@dataclass(frozen=True)
class MixedTopK:
    """Teachers that are known by their most likely tokens, [N, K_i] each, for the same N tokens."""

    parts: tuple[TopKLogprobs, ...]
    shares: tuple[float, ...]

    @property
    def indices(self) -> torch.Tensor:
        """All ids that any of them has named, [N, ΣK]; some twice, −1 where missing."""
        return torch.cat([part.indices for part in self.parts], -1)

    def __getitem__(self, rows: torch.Tensor | slice) -> MixedTopK:
        return MixedTopK(tuple(part[rows] for part in self.parts), self.shares)

    def to(self, device: torch.device) -> MixedTopK:
        """The same targets on a device."""
        return MixedTopK(tuple(part.to(device) for part in self.parts), self.shares)

    def known(self, vocabulary: int, temperature: float) -> tuple[torch.Tensor, Mixed]:
        """The mean over the union of what they have named, and one bucket for all other tokens.

        A token that teacher i has not named, and another one has, gets an equal part of what i has left,
        tail_i / (V − K_i), and never more than the smallest that i has named. What is then left of i is its bucket.
        Each is softened as a distribution over U + 1 outcomes, as `topk_divergence` does with one teacher.

        Returns:
            Ids [N, U], U = ΣK_i, −1 where fewer are named; and logits [N, U + 1], the bucket last.
        """
        ids_NU, places = _union([part.indices for part in self.parts])
        unused_NU = ids_NU < 0
        everything_N1 = (~unused_NU).sum(-1, keepdim=True) == vocabulary
        logits = [
            _over_union(part, place_NK, unused_NU, everything_N1, vocabulary)
            for part, place_NK in zip(self.parts, places, strict=True)
        ]
        return ids_NU, mix_logits(logits, self.shares, temperature)

    def at_one(self, vocabulary: int) -> TopKLogprobs:
        """The mean at temperature 1 as one top-k teacher."""
        ids_NU, mixed = self.known(vocabulary, 1.0)
        logprobs = mixed.at_one[:, :-1].masked_fill(ids_NU < 0, -torch.inf)
        return TopKLogprobs._of_checked(ids_NU, logprobs)


def _union(indices: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The different ids of each row, [N, ΣK] with −1 behind them, and where each teacher's [N, K_i] stand there.

    Missing ones (−1) stand behind all columns.
    """
    all_NU = torch.cat(list(indices), -1)
    # Missing ones to the end, so that the union begins each row.
    beyond = torch.iinfo(all_NU.dtype).max
    keyed = torch.where(all_NU < 0, beyond, all_NU)
    in_order, order = keyed.sort(-1)
    new = torch.ones_like(in_order, dtype=torch.bool)
    new[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    place_in_order = new.cumsum(-1) - 1
    columns = all_NU.shape[1]
    place_in_order = torch.where(in_order == beyond, columns, place_in_order)
    padded = torch.full((len(all_NU), columns + 1), -1, dtype=all_NU.dtype, device=all_NU.device)
    padded.scatter_(1, place_in_order, torch.where(in_order == beyond, -1, in_order))
    place_NU = torch.empty_like(place_in_order).scatter_(1, order, place_in_order)
    return padded[:, :columns], list(place_NU.split([one.shape[1] for one in indices], -1))


def _over_union(
    part: TopKLogprobs, place_NK: torch.Tensor, unused_NU: torch.Tensor, everything_N1: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """One teacher's log-probabilities of the union and of its bucket, [N, U + 1]; −inf where there is no outcome."""
    logprobs = part.logprobs.to(torch.promote_types(part.logprobs.dtype, torch.float32))
    named = part.indices >= 0
    count_N1 = named.sum(-1, keepdim=True)
    tail = teacher_tail(logprobs, count_N1 == vocabulary)
    each = tail - (vocabulary - count_N1).clamp(min=1).log()
    smallest = logprobs.masked_fill(~named, torch.inf).amin(-1, keepdim=True)
    unnamed_N1 = torch.minimum(each, smallest)
    columns = unused_NU.shape[1]
    over = unnamed_N1.expand(-1, columns + 1).clone()
    over.scatter_(1, place_NK, logprobs)  # missing ones go to the last column, which is cut off
    over = over[:, :columns].masked_fill(unused_NU, -torch.inf)
    others_N1 = (~unused_NU).sum(-1, keepdim=True) - count_N1
    # What is left: the tail without what the others' tokens have taken of it, which has more digits than 1 − Σ.
    left = tail.exp() - others_N1 * unnamed_N1.exp()
    least = torch.finfo(over.dtype).tiny
    bucket = torch.where(others_N1 > 0, left.clamp(min=least).log(), tail).masked_fill(everything_N1, -torch.inf)
    return torch.cat([over, bucket], 1)
