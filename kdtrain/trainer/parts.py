"""A batch in parts: supervised tokens that one teacher answers for, those that one divergence compares side by side.

D and D_kd are the window's for all of them, so that the parts' losses add up to the batch's: which rows share a batch
changes neither loss nor gradient.

Shapes: B rows, S supervised tokens of the batch, N of one part, H hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.host import on_host, send
from kdtrain.losses.kinds import Divergence, Stretch
from kdtrain.losses.reduce import FusedLoss
from kdtrain.losses.sampled import SampledTargets
from kdtrain.teachers.base import AnyTargets, RoutedTargets, Scores
from kdtrain.teachers.by_row import part_of, scored

NumItems = torch.Tensor | int | None


class RowLoss(NamedTuple):
    """How a row is compared with its teacher."""

    divergence: Divergence
    beta: float


class Part(NamedTuple):
    """Supervised tokens that are compared with targets of one kind."""

    outputs: torch.Tensor
    """Of the student: hidden states [N, H], or logits [N, V]."""
    labels: torch.Tensor
    ce_mask: torch.Tensor | None
    kd_weights: torch.Tensor | None
    scores: Scores | None
    """None: cross-entropy alone."""
    num_items: NumItems
    teacher: str | None
    """Whose targets they are, of several teachers."""
    stretches: tuple[Stretch, ...]
    """The tokens in their order, by how they are compared."""


@dataclass
class PartSums(FusedLoss):
    """The token terms of all parts of a batch."""

    num_teacher_tokens: torch.Tensor
    """Supervised tokens that a teacher has answered for."""
    num_entropy_tokens: torch.Tensor
    """Of these, those whose teacher's entropy is known: not of drawn tokens."""
    of_teachers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Of several teachers by name: Σ w · divergence, nats, and the tokens of weight above 0, of its own rows."""


def row_losses(batch: Batch, options: DistillationOptions) -> list[RowLoss]:
    """How each row is compared: as its source says, and answers of the student as `on_policy` says, before that."""
    base = RowLoss(options.divergence, options.beta)
    if options.crosses_tokenizers:  # which compares all of them in one way
        return [base] * len(batch)
    of_rows = batch.rows.losses or [(None, None)] * len(batch)
    found = [_with(base, *own) for own in of_rows]
    if batch.generated_by == "student":
        found = [_with(own, options.on_policy.divergence, options.on_policy.beta) for own in found]
    return found


def _with(base: RowLoss, divergence: Divergence | None, beta: float | None) -> RowLoss:
    return RowLoss(divergence or base.divergence, base.beta if beta is None else beta)


class _Group(NamedTuple):
    """Tokens of a part, before anything of them is taken."""

    tokens_S: torch.Tensor | None
    """[S] bool, on the CPU; None is all."""
    scores: Scores | None
    """Of these tokens, in the batch's order."""
    teacher: str | None


def _groups(batch: Batch, targets: AnyTargets | None) -> list[_Group]:
    if targets is None:
        return [_Group(None, None, None)]
    found = [_Group(one.tokens_S, one.scores, one.teacher) for one in scored(targets, batch)]
    answered = [group.tokens_S for group in found if group.tokens_S is not None]
    if len(answered) < len(found):  # all of them
        return found
    # None of no tokens beside others: a part makes a gradient of the head. A batch without any has one all the same.
    rest = _rest(batch, targets, answered)
    return [*found, *(group for group in rest if group.tokens_S is not None and group.tokens_S.any())] or rest[-1:]


def _rest(batch: Batch, targets: AnyTargets, answered: Sequence[torch.Tensor]) -> list[_Group]:
    """The tokens that no teacher has answered for, which have cross-entropy alone, over their teacher's vocabulary."""
    if isinstance(targets, RoutedTargets):
        covers_rows = all(part.targets.covered_S is None for part in targets.parts)
        named = {row for part in targets.parts for row in part.rows}
        if covers_rows and targets.parts and len(named) == len(batch):
            return []
    left_S = torch.ones(len(batch.labels_S), dtype=torch.bool)
    for tokens_S in answered:
        left_S &= ~tokens_S
    if not isinstance(targets, RoutedTargets):
        return [_Group(left_S, None, None)]
    groups = [_Group(left_S & batch.tokens_of_rows(part.rows), None, part.teacher) for part in targets.parts]
    others = [row for row in range(len(batch)) if row not in named]
    return [*groups, _Group(batch.tokens_of_rows(others), None, None)]


class _Order(NamedTuple):
    """The tokens of a part, those that are compared alike side by side; on the CPU."""

    rows_N: torch.Tensor | None
    """[N] long: which of the batch's supervised tokens they are; None is all, in the batch's order."""
    scores_N: torch.Tensor | None
    """[N] long: which of the group's scores are theirs; None is all, in their order."""
    kinds: tuple[tuple[RowLoss, torch.Tensor], ...]
    """How they are compared, and [S] bool which."""


def _in_order(batch: Batch, group: _Group, losses: Sequence[RowLoss]) -> _Order:
    all_S = torch.ones(len(batch.labels_S), dtype=torch.bool)
    tokens_S = all_S if group.tokens_S is None else group.tokens_S
    kinds = list(dict.fromkeys(losses))
    if len(kinds) == 1 or group.scores is None:
        rows_N = None if group.tokens_S is None else group.tokens_S.nonzero().squeeze(1)
        return _Order(rows_N, None, ((kinds[0], tokens_S),))
    found = []
    for kind in kinds:
        own_S = batch.tokens_of_rows([row for row, loss in enumerate(losses) if loss == kind]) & tokens_S
        if own_S.any():
            found.append((kind, own_S))
    found = found or [(kinds[0], tokens_S)]
    rows_N = torch.cat([own_S.nonzero().squeeze(1) for _, own_S in found])
    return _Order(rows_N, (tokens_S.cumsum(0) - 1)[rows_N], tuple(found))


def sums_of_parts(
    outputs_S: torch.Tensor,
    batch: Batch,
    targets: AnyTargets | None,
    weights_S: torch.Tensor | None,
    num_items: NumItems,
    options: DistillationOptions,
    compute: Callable[[Part], FusedLoss],
    *,
    most_chosen: int | None = None,
) -> PartSums:
    """The token terms of a batch, part by part; of tokens that no teacher has answered for, the cross-entropy alone.

    Args:
        outputs_S: of the student, for the supervised tokens.
        weights_S: of the tokens in the divergence; None is 1.
        num_items: D; None is the batch's own supervised tokens.
        compute: of one part; its `loss` has a graph.
        most_chosen: tokens of `weights_S` above 0 at most, where they were chosen on the device; None is those that
            have a weight in the batch.
    """
    device, groups = outputs_S.device, _groups(batch, targets)
    losses = row_losses(batch, options) or [RowLoss(options.divergence, options.beta)]
    labels_S, ce_S = batch.labels_S.to(device), batch.ce_mask_S
    whole = len(groups) == 1 and groups[0].tokens_S is None
    if num_items is None and not whole:
        num_items = len(labels_S)
    found = []
    for group in groups:
        order = _in_order(batch, group, losses)
        rows_N = None if order.rows_N is None else send(order.rows_N, device)

        def taken(values_S: torch.Tensor | None, rows_N: torch.Tensor | None = rows_N) -> torch.Tensor | None:
            return values_S if values_S is None or rows_N is None else values_S.to(device).index_select(0, rows_N)

        outputs, labels, scores = taken(outputs_S), taken(labels_S), group.scores
        assert outputs is not None
        assert labels is not None
        if scores is not None and order.scores_N is not None:
            scores = part_of(scores, order.scores_N)
        part = Part(
            outputs,
            labels,
            taken(ce_S),
            taken(weights_S),
            scores,
            num_items,
            group.teacher,
            tuple(_stretch(batch, loss, tokens_S, most_chosen) for loss, tokens_S in order.kinds),
        )
        found.append((part, compute(part)))
    return _added(found)


def _stretch(batch: Batch, loss: RowLoss, tokens_S: torch.Tensor, most_chosen: int | None) -> Stretch:
    weigh_S = None if batch.kd_weights_S is None else on_host(batch.kd_weights_S) > 0
    tokens = int(tokens_S.sum())
    taught = tokens if weigh_S is None else int((weigh_S & tokens_S).sum())
    return Stretch(tokens, taught if most_chosen is None else min(taught, most_chosen), *loss)


def _added(found: Sequence[tuple[Part, FusedLoss]]) -> PartSums:
    """Sums that need a teacher are of the parts that have one."""

    def total(name: str) -> torch.Tensor | None:
        values = [value for _, one in found if (value := getattr(one, name)) is not None]
        return None if not values else values[0] if len(values) == 1 else torch.stack(values).sum()

    names = ("kd_sum", "num_agree", "teacher_entropy_sum", "loss", "ce_sum", "num_tokens", "num_correct")
    sums = {name: total(name) for name in (*names, "student_entropy_sum")}
    zero = torch.zeros_like(found[0][1].num_tokens)
    taught = [(part, one.num_tokens) for part, one in found if part.scores is not None]
    known = [count for part, count in taught if not isinstance(part.scores, SampledTargets)]
    of_teachers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for part, one in found:
        if part.teacher is not None and one.kd_sum is not None:
            count = one.num_tokens if part.kd_weights is None else (part.kd_weights > 0).sum()
            before = of_teachers.get(part.teacher, (torch.zeros_like(one.kd_sum), zero))
            of_teachers[part.teacher] = before[0] + one.kd_sum, before[1] + count
    return PartSums(
        **sums,  # type: ignore[arg-type]  # those that are never None
        num_teacher_tokens=sum((count for _, count in taught), zero),
        num_entropy_tokens=sum(known, zero),
        of_teachers=of_teachers,
    )


def with_loss(sums: PartSums, loss: torch.Tensor) -> PartSums:
    """The same sums with another `loss`: what a wrapper has made of it."""
    return replace(sums, loss=loss)
