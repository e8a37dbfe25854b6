"""Which tokens of a batch the divergence is taken at (`rlhf.token_selection`), and how many there are.

In each row, which is a document wherever rows share a line, the ⌈keep·n⌉ tokens with the highest score, of equal ones
the earlier; n counts its supervised tokens of weight above 0. So D_kd = Σ ⌈keep·n⌉ is known before any forward. Tokens
that the teacher has not answered for count in n, as they do in D, and cannot be chosen: a row that has too few others
has fewer chosen, and D_kd stays.

Shapes: B rows, T positions, S supervised tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdtrain.config.options import TokenSelection
from kdtrain.data.batch import Batch
from kdtrain.errors import ConfigError
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
    """A batch's part of D_kd, a scalar int64 tensor: found without waiting for the device."""
    return _most_B(candidates(batch), selection).sum()


def chosen_weights(batch: Batch, student: Scores, targets: AnyTargets, selection: TokenSelection) -> torch.Tensor:
    """[S] float32: what the divergence of each supervised token counts, 0 where it is not chosen.

    Args:
        student: its distributions at all of them.
    """
    device = student.outputs.device
    known = scored(targets, batch)
    covered_S = torch.zeros(len(student), dtype=torch.bool, device=device)
    for one in known:
        covered_S |= _tokens(one, student)
    scores_S = _scores(student, known, selection)
    predicts_BT, candidates_BT = batch.predicts_BT.to(device), candidates(batch).to(device)
    may_BT = candidates_BT & predicts_BT.masked_scatter(predicts_BT, covered_S)
    ranks_BT = ranked(scores_S, predicts_BT, may_BT)
    chosen_BT = (ranks_BT < _most_B(candidates_BT, selection)[:, None]) & may_BT
    weights_BT = batch.kd_weights_BT
    chosen = chosen_BT.float() if weights_BT is None else chosen_BT * weights_BT.to(device)
    return chosen[predicts_BT]


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
    """[S] bool: the tokens that a teacher answers for."""
    device = student.outputs.device
    if one.tokens_S is None:
        return torch.ones(len(student), dtype=torch.bool, device=device)
    return one.tokens_S.to(device)


def _scores(student: Scores, known: Sequence[Scored], selection: TokenSelection) -> torch.Tensor:
    """[S]; anything where no teacher says anything, and the score needs it."""
    if selection.by == "student_entropy":
        return token_scores(selection.by, student)
    scores_S: torch.Tensor | None = None
    for one in known:
        teacher, own_S = comparable(one.scores, student.columns), _tokens(one, student)
        if teacher is None:
            raise ConfigError(_DRAWN)
        some = student
        if one.tokens_S is not None:
            some = Scores(student.outputs[own_S], student.head, student.columns)
        if isinstance(teacher, TopKLogprobs):
            teacher = teacher.to(student.outputs.device)
        found = token_scores(selection.by, some, teacher)
        scores_S = found.new_zeros(len(student)) if scores_S is None else scores_S
        scores_S = scores_S.masked_scatter(own_S, found)
    return torch.zeros(len(student), device=student.outputs.device) if scores_S is None else scores_S
