"""The targets of a batch row by row, and those of a batch that its rows were dealt to.

Shapes: B rows, S supervised tokens, N of them that one teacher answers for, K known tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch.nn import functional

from kdtrain.data.batch import Batch
from kdtrain.host import on_host, rows_of, send
from kdtrain.losses.mixture import MixedTopK
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.base import AnyTargets, DenseTargets, MixedTargets, RoutedPart, RoutedTargets, Scores, Targets


@dataclass(frozen=True)
class Scored:
    """What one teacher says of some supervised tokens of a batch."""

    teacher: str | None
    """Its name, where there are several."""
    scores: Scores
    tokens_S: torch.Tensor | None
    """[S] bool, on the CPU: the N tokens that the distributions are for, in their order; None is all of them."""


def scored(targets: AnyTargets, batch: Batch) -> list[Scored]:
    """What is said of the supervised tokens of a batch, teacher by teacher; no token is in two of them."""
    if isinstance(targets, Targets):
        covered_S = targets.covered_S
        return [Scored(None, targets.scores, None if covered_S is None else on_host(covered_S))]
    found = []
    for part in targets.parts:
        tokens_S = batch.tokens_of_rows(part.rows)
        if part.targets.covered_S is not None:
            tokens_S = tokens_S.clone()
            tokens_S[tokens_S.clone()] = on_host(part.targets.covered_S)
        found.append(Scored(part.teacher, part.targets.scores, tokens_S))
    return found


def num_covered(targets: AnyTargets, batch: Batch) -> torch.Tensor:
    """Supervised tokens that a teacher has answered for, a scalar."""
    parts = scored(targets, batch)
    counts = [batch.num_supervised if part.tokens_S is None else part.tokens_S.sum() for part in parts]
    return (
        torch.stack([count.to(batch.labels.device) for count in counts]).sum() if counts else 0 * batch.num_supervised
    )


def by_row(targets: AnyTargets, batch: Batch) -> list[AnyTargets]:
    """The targets of each row of the batch that they are of; views, not copies."""
    counts = batch.predicts_BT.sum(1).tolist()
    if isinstance(targets, Targets):
        return list(_by_row(targets, counts))
    found: list[AnyTargets] = [RoutedTargets(())] * len(batch)
    for part in targets.parts:
        own = _by_row(part.targets, [counts[row] for row in part.rows])
        for row, one in zip(part.rows, own, strict=True):
            found[row] = RoutedTargets((RoutedPart(part.teacher, (0,), one),))
    return found


def _by_row(targets: Targets, counts: Sequence[int]) -> list[Targets]:
    ends = list(accumulate(counts, initial=0))
    if targets.covered_S is None:
        return [Targets(part_of(targets.scores, slice(a, b))) for a, b in pairwise(ends)]
    covered = [targets.covered_S[a:b] for a, b in pairwise(ends)]
    of_scores = list(accumulate((int(one.sum()) for one in covered), initial=0))
    parts = [part_of(targets.scores, slice(a, b)) for a, b in pairwise(of_scores)]
    return [Targets(*pair) for pair in zip(parts, covered, strict=True)]


def in_one(rows: Sequence[AnyTargets]) -> AnyTargets:
    """The targets of a batch of these rows."""
    if any(isinstance(row, RoutedTargets) for row in rows):
        return _routed(rows)
    return _in_one([row for row in rows if isinstance(row, Targets)])


def _routed(rows: Sequence[AnyTargets]) -> RoutedTargets:
    own: dict[str, list[tuple[int, Targets]]] = {}
    for number, row in enumerate(rows):
        for part in row.parts if isinstance(row, RoutedTargets) else ():
            own.setdefault(part.teacher, []).append((number, part.targets))
    return RoutedTargets(
        tuple(
            RoutedPart(teacher, tuple(number for number, _ in some), _in_one([one for _, one in some]))
            for teacher, some in own.items()
        )
    )


def _in_one(rows: Sequence[Targets]) -> Targets:
    scores = [row.scores for row in rows]
    if all(row.covered_S is None for row in rows):
        return Targets(_joined(scores))
    covered = [row.covered_S if row.covered_S is not None else _all(row.scores) for row in rows]
    return Targets(_joined(scores), torch.cat(covered))


def nothing_of(targets: AnyTargets) -> AnyTargets:
    """Targets of the same kind for no tokens: of a row that has lost its labels."""
    if isinstance(targets, RoutedTargets):
        return RoutedTargets(tuple(replace(part, targets=_nothing_of(part.targets)) for part in targets.parts))
    return _nothing_of(targets)


def _nothing_of(targets: Targets) -> Targets:
    covered = None if targets.covered_S is None else targets.covered_S[:0]
    return Targets(part_of(targets.scores, slice(0, 0)), covered)


def with_one_head(targets: AnyTargets, heads: dict[str | None, DenseTargets]) -> AnyTargets:
    """The targets with the heads of the first ones of each teacher: sharded, each forward makes a copy of its own.

    Args:
        heads: by teacher; the first ones are put into it.
    """
    if isinstance(targets, RoutedTargets):
        parts = [replace(part, targets=_with_head(part.targets, part.teacher, heads)) for part in targets.parts]
        return RoutedTargets(tuple(parts))
    return _with_head(targets, None, heads)


def _with_head(targets: Targets, teacher: str | None, heads: dict[str | None, DenseTargets]) -> Targets:
    scores = targets.scores
    if not isinstance(scores, DenseTargets):
        return targets
    return replace(targets, scores=replace(scores, head=heads.setdefault(teacher, scores).head))


def tokens_of(scores: Scores) -> int:
    """How many tokens they are for."""
    if isinstance(scores, MixedTargets | MixedTopK):
        return tokens_of(scores.parts[0])
    if isinstance(scores, DenseTargets):
        return len(scores.hidden)
    return len(scores if isinstance(scores, torch.Tensor) else scores.indices)


def part_of(scores: Scores, tokens: slice | torch.Tensor) -> Scores:
    """Those of some tokens: a part of their order, or by a mask or by numbers on the CPU."""
    if isinstance(scores, MixedTargets):
        return replace(scores, parts=tuple(_part_of(one, tokens) for one in scores.parts))
    if isinstance(scores, DenseTargets):
        return _part_of(scores, tokens)
    if isinstance(tokens, torch.Tensor):
        tokens = _numbers(tokens, device_of(scores))
    return scores[tokens]


def _part_of(scores: DenseTargets | torch.Tensor, tokens: slice | torch.Tensor) -> DenseTargets | torch.Tensor:
    of = scores if isinstance(scores, torch.Tensor) else scores.hidden
    some = of.index_select(0, _numbers(tokens, of.device)) if isinstance(tokens, torch.Tensor) else of[tokens]
    return some if isinstance(scores, torch.Tensor) else replace(scores, hidden=some)


def _numbers(tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[N] long on a device."""
    return rows_of(tokens, device) if tokens.dtype == torch.bool else send(tokens, device)


def _all(scores: Scores) -> torch.Tensor:
    return torch.ones(tokens_of(scores), dtype=torch.bool, device=device_of(scores))


def device_of(scores: Scores) -> torch.device:
    """Where they are."""
    if isinstance(scores, MixedTargets | MixedTopK):
        return device_of(scores.parts[0])
    return (scores if isinstance(scores, torch.Tensor) else next(iter(vars(scores).values()))).device


def _joined(parts: Sequence[Scores]) -> Scores:
    first = parts[0]
    if isinstance(first, MixedTargets | MixedTopK):
        members = zip(*(part.parts for part in parts if isinstance(part, MixedTargets | MixedTopK)), strict=True)
        joined = tuple(_joined(list(of_one)) for of_one in members)
        return replace(first, parts=joined)  # type: ignore[arg-type]  # of the kinds that they were
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
