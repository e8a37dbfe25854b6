"""The targets of a batch row by row, and those of a batch that its rows were dealt to.

Shapes: B rows, S supervised tokens, K known tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch.nn import functional

from kdtrain.data.batch import Batch
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.base import DenseTargets, Scores, Targets


def by_row(targets: Targets, batch: Batch) -> list[Targets]:
    """The targets of each row of the batch that they are of; views, not copies."""
    ends = list(accumulate(batch.predicts_BT.sum(1).tolist(), initial=0))
    if targets.covered_S is None:
        return [Targets(_part(targets.scores, a, b)) for a, b in pairwise(ends)]
    covered = [targets.covered_S[a:b] for a, b in pairwise(ends)]
    of_scores = list(accumulate((int(one.sum()) for one in covered), initial=0))
    parts = [_part(targets.scores, a, b) for a, b in pairwise(of_scores)]
    return [Targets(*pair) for pair in zip(parts, covered, strict=True)]


def in_one(rows: Sequence[Targets]) -> Targets:
    """The targets of a batch of these rows, of one teacher."""
    scores = [row.scores for row in rows]
    if all(row.covered_S is None for row in rows):
        return Targets(_joined(scores))
    covered = [row.covered_S if row.covered_S is not None else _all(row.scores) for row in rows]
    return Targets(_joined(scores), torch.cat(covered))


def nothing_of(targets: Targets) -> Targets:
    """Targets of the same kind for no tokens: of a row that has lost its labels."""
    covered = None if targets.covered_S is None else targets.covered_S[:0]
    return Targets(_part(targets.scores, 0, 0), covered)


def tokens_of(scores: Scores) -> int:
    """How many tokens they are for."""
    if isinstance(scores, DenseTargets):
        return len(scores.hidden)
    return len(scores if isinstance(scores, torch.Tensor) else scores.indices)


def _all(scores: Scores) -> torch.Tensor:
    device = (scores if isinstance(scores, torch.Tensor) else next(iter(vars(scores).values()))).device
    return torch.ones(tokens_of(scores), dtype=torch.bool, device=device)


def _part(scores: Scores, start: int, end: int) -> Scores:
    if isinstance(scores, DenseTargets):
        return replace(scores, hidden=scores.hidden[start:end])
    return scores[start:end]


def _joined(parts: Sequence[Scores]) -> Scores:
    first = parts[0]
    if isinstance(first, DenseTargets):
        return replace(first, hidden=torch.cat([part.hidden for part in parts if isinstance(part, DenseTargets)]))
    if isinstance(first, TopKLogprobs):
        return _joined_topk([part for part in parts if isinstance(part, TopKLogprobs)])
    assert isinstance(first, torch.Tensor), "drawn tokens are those of stored answers, of which there are no samples"
    return torch.cat([part for part in parts if isinstance(part, torch.Tensor)])


def _joined_topk(parts: Sequence[TopKLogprobs]) -> TopKLogprobs:
    """Filled up with missing entries where some have fewer columns."""
    columns = max(part.indices.shape[1] for part in parts)

    def filled(values: torch.Tensor, fill: float) -> torch.Tensor:
        return functional.pad(values, (0, columns - values.shape[1]), value=fill)

    indices = torch.cat([filled(part.indices, -1) for part in parts])
    return TopKLogprobs(indices, torch.cat([filled(part.logprobs, -torch.inf) for part in parts]))
