"""How far what is stored of a row is from what its teacher says.

Shapes: S supervised tokens, K entries, D draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kdtrain.losses.sampled import SampledTargets
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.base import DenseTargets
from kdtrain.teachers.cached.chunk_format import RowChunks
from kdtrain.teachers.cached.hidden_format import exact_kl, kl_bound
from kdtrain.teachers.cached.levels import ERROR
from kdtrain.teachers.cached.store import Format, RowTargets

# What a model's numbers change by with the batch that a row is in: of float32 weights, and of half-precision ones.
_NOISE = {"topk": (1e-3, 0.2), "sample": (0.02, 0.1), "hidden": (1e-4, 0.02), "chunks": (2e-3, 0.4)}
_UNITS = {"topk": "nats", "sample": "of the draws", "hidden": "nats a token (KL)", "chunks": "nats a chunk"}
# Nats a token. The most that was measured: 0.0024 on SmolLM2-135M-Instruct (0.0002 on average), 0.022 on made-up states
# with very wide channels. For each token there is a bound: `largest_bound`.
_COST_OF_8_BITS = 0.03


def allowed_difference(form: Format, half_precision: bool) -> tuple[float, str]:
    """The largest difference that storing and computing explain, and its unit; see `largest_difference`."""
    return storing_error(form) + _NOISE[form.mode][half_precision], _UNITS[form.mode]


def storing_error(form: Format) -> float:
    """The largest error that storing a target has, in the unit of its mode."""
    if form.mode == "topk" and not form.exact:
        return ERROR
    return _COST_OF_8_BITS if form.hidden_dtype == "int8" else 0.0


def largest_difference(fresh: RowTargets, stored: TopKLogprobs | SampledTargets | DenseTargets | RowChunks) -> float:
    """Between the targets of one row.

    Of `topk` the largest difference of a log-probability; one that only one side names is compared with the smallest
    that the other names. Of `sample` the share of a token's draws that are of other tokens, mean over the row's tokens.
    Of `hidden` the largest KL divergence of a token's distribution, stored from fresh. Of `chunks` the largest
    difference of a log-likelihood; infinite where their tokens are others.
    """
    if isinstance(stored, RowChunks):
        assert isinstance(fresh, RowChunks)
        if not torch.equal(fresh.numbers, stored.numbers):
            return torch.inf
        same_C = fresh.logprobs == stored.logprobs  # two that are impossible are
        return float(torch.where(same_C, 0.0, fresh.logprobs - stored.logprobs).abs().max()) if len(same_C) else 0.0
    if isinstance(stored, TopKLogprobs):
        assert isinstance(fresh, TopKLogprobs)
        return max(_distance(fresh, stored), _distance(stored, fresh))
    if isinstance(stored, SampledTargets):
        assert isinstance(fresh, SampledTargets)
        return float((1 - _shared(fresh, stored)).mean())
    assert isinstance(fresh, torch.Tensor)
    return _largest_kl(fresh, stored)


def _distance(left: TopKLogprobs, right: TopKLogprobs) -> float:
    """How far the log-probabilities of `left` are from those of the same ids in `right`."""
    least_S1 = right.logprobs.masked_fill(right.indices < 0, torch.inf).amin(-1, keepdim=True)
    found_SK, there_SK = _look_up(left.indices, right.indices, right.logprobs)
    other_SK = torch.where(there_SK, found_SK, least_S1)
    # Two that are impossible are the same.
    difference_SK = torch.where(left.logprobs == other_SK, 0.0, left.logprobs - other_SK).abs()
    return float(difference_SK[left.indices >= 0].amax())


def _shared(left: SampledTargets, right: SampledTargets) -> torch.Tensor:
    """[S]: the share of draws that both have."""
    found_SK, there_SK = _look_up(left.indices, right.indices, right.weights)
    both_SK = torch.minimum(left.weights, torch.where(there_SK, found_SK, 0.0))
    return both_SK.masked_fill(left.indices < 0, 0.0).sum(-1)


def _look_up(ids_SK: torch.Tensor, of_SJ: torch.Tensor, values_SJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values at ids [S, K], and whether they are there."""
    sorted_SJ, order = of_SJ.sort(-1)
    place = torch.searchsorted(sorted_SJ, ids_SK).clamp(max=of_SJ.shape[1] - 1)
    return values_SJ.gather(1, order).gather(1, place), sorted_SJ.gather(1, place) == ids_SK


def largest_bound(fresh: RowTargets, stored: Any) -> float:
    """Nats: what storing hidden states in 8 bits costs any token of a row at most, by `kl_bound`."""
    assert isinstance(fresh, torch.Tensor)
    assert isinstance(stored, DenseTargets)
    return _largest(kl_bound, fresh, stored)


def _largest_kl(fresh_SH: torch.Tensor, stored: DenseTargets) -> float:
    return _largest(exact_kl, fresh_SH, stored)


def _largest(figure: Callable[..., torch.Tensor], fresh_SH: torch.Tensor, stored: DenseTargets) -> float:
    """The largest of a figure of each token, a few tokens at a time: it has float64 logits."""
    parts = zip(fresh_SH.split(128), stored.hidden.split(128), strict=True)
    return max(float(figure(stored.head, *part).amax()) for part in parts)
