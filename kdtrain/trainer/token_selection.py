"""Which tokens of a batch the divergence is taken at (`rlhf.token_selection`), and how many there are.

In each row, which is a document wherever rows share a line, the ⌈keep·n⌉ tokens with the highest score, of equal ones
the earlier; n counts its supervised tokens of weight above 0. So D_kd = Σ ⌈keep·n⌉ is known before any forward. Tokens
that the teacher has not answered for count in n, as they do in D, and cannot be chosen: a row that has too few others
has fewer chosen, and D_kd stays.

Shapes: B rows, T positions, S supervised tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from kdtrain.config.options import TokenSelection
from kdtrain.data.batch import Batch
from kdtrain.errors import ConfigError
from kdtrain.host import rows_of, send
from kdtrain.losses.comparison import Scores
from kdtrain.losses.token_scores import token_scores
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.base import AnyTargets
from kdtrain.teachers.by_row import Scored, scored
from kdtrain.trainer.evaluation import comparable

_DRAWN = (
    "rlhf.token_selection.by is disagreement, and the teacher's targets are drawn tokens: choosing tokens by what was "
    "drawn there makes their gradient wrong. Set it to student_entropy."
)


def num_kd_tokens(batch: Batch, selection: TokenSelection | None) -> torch.Tensor:
    """A batch's part of D_kd, a scalar int64 tensor on the CPU."""
    return _most_B(candidates(batch), selection).sum()


def chosen_weights(batch: Batch, student: Scores, targets: AnyTargets, selection: TokenSelection) -> torch.Tensor:
    """[S] float32: what the divergence of each supervised token counts, 0 where it is not chosen.

    Args:
        student: its distributions at all of them.
    """
    device = student.outputs.device
    known = scored(targets, batch)
    candidates_BT = candidates(batch)
    may_S = candidates_BT[batch.predicts_BT]  # on the host, as all that the batch says
    if all(one.tokens_S is not None for one in known):
        may_S = may_S & functools.reduce(torch.logical_or, [_tokens(one, student) for one in known], ~may_S & may_S)
    may_S, positions_S = send(may_S, device), send(batch.positions_S, device)
    scores_S = _scores(student, known, selection).masked_fill(~may_S, -torch.inf)
    scores_BT = torch.full(batch.labels.shape, -torch.inf, dtype=scores_S.dtype, device=device)
    scores_BT = scores_BT.flatten().index_copy(0, positions_S, scores_S).view_as(scores_BT)
    # A stable order: of equal ones the earlier. The rank of a token is its place in it.
    ranks_BT = scores_BT.argsort(dim=1, descending=True, stable=True).argsort(1)
    most_B = send(_most_B(candidates_BT, selection), device)
    chosen_S = (ranks_BT < most_B[:, None]).flatten().index_select(0, positions_S) & may_S
    weights_S = batch.kd_weights_S
    return chosen_S.float() if weights_S is None else chosen_S * weights_S.to(device)


def ranked(scores_S: torch.Tensor, predicts_BT: torch.Tensor, may_BT: torch.Tensor) -> torch.Tensor:
    """[B, T−1] int64: the rank of each token in its row by its score, from 0, of equal ones the earlier first; those
    that may not be chosen, and places of none, come behind all others whose score is finite."""
    scores_BT = torch.full(may_BT.shape, -torch.inf, dtype=scores_S.dtype, device=may_BT.device)
    scores_BT = scores_BT.masked_scatter(predicts_BT, scores_S).masked_fill(~may_BT, -torch.inf)
    # A stable order: the rank of a token is its place in it.
    return scores_BT.argsort(dim=1, descending=True, stable=True).argsort(1)


def share_of(candidates_BT: torch.Tensor, ratio: tuple[int, int]) -> torch.Tensor:
    """[B] int64: this share of each row's candidates, rounded up, and at least one of any."""
    counts_B = candidates_BT.sum(1)
    above, below = ratio
    rounded_up_B = -torch.div(-counts_B * above, below, rounding_mode="floor")
    return torch.maximum(rounded_up_B, counts_B.clamp(max=1))


def candidates(batch: Batch) -> torch.Tensor:
    """[B, T−1] bool: the supervised tokens of weight above 0."""
    weights_BT = batch.kd_weights_BT
    return batch.predicts_BT if weights_BT is None else batch.predicts_BT & (weights_BT > 0)


def _most_B(candidates_BT: torch.Tensor, selection: TokenSelection | None) -> torch.Tensor:
    """[B] int64: how many of a row's tokens count."""
    return candidates_BT.sum(1) if selection is None else share_of(candidates_BT, selection.ratio)


def _tokens(one: Scored, student: Scores) -> torch.Tensor:
    """[S] bool, on the CPU: the tokens that a teacher answers for."""
    return torch.ones(len(student), dtype=torch.bool) if one.tokens_S is None else one.tokens_S


def _scores(student: Scores, known: Sequence[Scored], selection: TokenSelection) -> torch.Tensor:
    """[S]; anything where no teacher says anything, and the score needs it."""
    if selection.by == "student_entropy":
        return token_scores(selection.by, student)
    scores_S: torch.Tensor | None = None
    for one in known:
        teacher = comparable(one.scores, student.columns)
        own_N = rows_of(_tokens(one, student), student.outputs.device)
        if teacher is None:
            raise ConfigError(_DRAWN)
        some = student
        if one.tokens_S is not None:
            some = Scores(student.outputs.index_select(0, own_N), student.head, student.columns)
        if isinstance(teacher, TopKLogprobs):
            teacher = teacher.to(student.outputs.device)
        found = token_scores(selection.by, some, teacher)
        scores_S = found.new_zeros(len(student)) if scores_S is None else scores_S
        scores_S = scores_S.index_copy(0, own_N, found)
    return torch.zeros(len(student), device=student.outputs.device) if scores_S is None else scores_S
