"""A batch in parts: supervised tokens that one teacher answers for and that one divergence compares, together.

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
from kdtrain.host import on_host, rows_of
from kdtrain.losses.kinds import Divergence
from kdtrain.losses.reduce import FusedLoss
from kdtrain.losses.sampled import SampledTargets
from kdtrain.teachers.base import AnyTargets, RoutedTargets, Scores
from kdtrain.teachers.by_row import Scored, part_of, scored

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
    loss: RowLoss
    teacher: str | None
    """Whose targets they are, of several teachers."""
    most_taught: int
    """How many of the tokens have a weight above 0 in the divergence; or more, where it chooses some of them."""


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
    loss: RowLoss
    teacher: str | None


def _groups(batch: Batch, targets: AnyTargets | None, options: DistillationOptions) -> list[_Group]:
    losses = row_losses(batch, options) or [RowLoss(options.divergence, options.beta)]
    if targets is None:
        return [_Group(None, None, losses[0], None)]
    found: list[_Group] = []
    for one in scored(targets, batch):
        found += _by_loss(batch, one, losses)
    answered = [group.tokens_S for group in found if group.tokens_S is not None]
    if len(answered) < len(found):  # all of them
        return found
    return [*found, *_rest(batch, targets, answered, losses[0])]


def _by_loss(batch: Batch, one: Scored, losses: Sequence[RowLoss]) -> list[_Group]:
    """The tokens of one teacher, by how they are compared."""
    kinds = list(dict.fromkeys(losses))
    if len(kinds) == 1:
        return [_Group(one.tokens_S, one.scores, kinds[0], one.teacher)]
    found = []
    for kind in kinds:
        own_S = batch.tokens_of_rows([row for row, loss in enumerate(losses) if loss == kind])
        if one.tokens_S is None:
            found.append(_Group(own_S, part_of(one.scores, own_S), kind, one.teacher))
        else:
            among = own_S[one.tokens_S]
            found.append(_Group(own_S & one.tokens_S, part_of(one.scores, among), kind, one.teacher))
    return found


def _rest(batch: Batch, targets: AnyTargets, answered: Sequence[torch.Tensor], loss: RowLoss) -> list[_Group]:
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
        return [_Group(left_S, None, loss, None)]
    groups = [_Group(left_S & batch.tokens_of_rows(part.rows), None, loss, part.teacher) for part in targets.parts]
    others = [row for row in range(len(batch)) if row not in named]
    return [*groups, _Group(batch.tokens_of_rows(others), None, loss, None)]


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
    device, groups = outputs_S.device, _groups(batch, targets, options)
    labels_S, ce_S = batch.labels_S.to(device), batch.ce_mask_S
    whole = len(groups) == 1 and groups[0].tokens_S is None
    if num_items is None and not whole:
        num_items = len(labels_S)
    found = []
    for group in groups:
        rows_N = None if group.tokens_S is None else rows_of(group.tokens_S, device)

        def taken(values_S: torch.Tensor | None, rows_N: torch.Tensor | None = rows_N) -> torch.Tensor | None:
            return values_S if values_S is None or rows_N is None else values_S.to(device).index_select(0, rows_N)

        outputs, labels = taken(outputs_S), taken(labels_S)
        assert outputs is not None
        assert labels is not None
        part = Part(
            outputs,
            labels,
            taken(ce_S),
            taken(weights_S),
            group.scores,
            num_items,
            group.loss,
            group.teacher,
            _most_taught(batch, group.tokens_S, most_chosen),
        )
        found.append((part, compute(part)))
    return _added(found)


def _most_taught(batch: Batch, tokens_S: torch.Tensor | None, most_chosen: int | None) -> int:
    weigh_S = None if batch.kd_weights_S is None else on_host(batch.kd_weights_S) > 0
    if weigh_S is None:
        count = len(batch.labels_S) if tokens_S is None else int(tokens_S.sum())
    else:
        count = int((weigh_S if tokens_S is None else weigh_S & tokens_S).sum())
    return count if most_chosen is None else min(count, most_chosen)


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
