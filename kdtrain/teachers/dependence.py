"""Which token of a row a teacher's targets depend on, whatever it has learnt.

With one supervised token of a row changed, the targets up to this token must stay as they are, for they are made of the
tokens before it; and the next one must move.

Shapes: B rows, T positions, S supervised tokens, K known tokens, X ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from kdtrain.data.batch import Batch
from kdtrain.losses.mixture import MixedTopK
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.losses.sampled import SampledTargets, estimated_logprobs
from kdtrain.losses.topk import TopKLogprobs, teacher_tail
from kdtrain.teachers.base import Scores, Targets
from kdtrain.teachers.by_row import part_of

Dependence = Literal["aligned", "before", "after"]

# A change of a log-probability that is none: rounding, measured at positions that cannot change, or a tenth of what the
# changed token moves elsewhere.
_UNMOVED, _ROUNDING, _SHARE = 0.02, 5.0, 0.1
_LEAST = -30.0
# Tokens that are compared at each position: so many of the row, and so many of the most likely before and after.
_LIKELY = 8


def log_probabilities(scores: Scores, ids_SX: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """[S, X] log p of ids under the targets, float32; ids below 0 get any number.

    Those of drawn tokens are estimated (`estimated_logprobs`).
    """
    if isinstance(scores, SampledTargets):
        scores = estimated_logprobs(scores)
    if isinstance(scores, MixedTopK):
        scores = scores.at_one(vocab_size)
    if isinstance(scores, TopKLogprobs):
        indices, known = scores.indices.to(ids_SX.device), scores.logprobs.float().to(ids_SX.device)
        named_SXK = ids_SX[:, :, None] == indices[:, None, :]
        others = (vocab_size - (indices >= 0).sum(-1, keepdim=True)).clamp(min=1)
        rest = teacher_tail(known, torch.zeros_like(known[:, :1], dtype=torch.bool)) - others.log()
        found = torch.where(named_SXK, known[:, None, :], -torch.inf).amax(-1)
        return torch.where(named_SXK.any(-1), found, rest)
    logits = scores if isinstance(scores, torch.Tensor) else scores.logits()
    ids = ids_SX.to(logits.device).clamp(min=0, max=logits.shape[1] - 1)
    return torch.log_softmax(logits.float(), -1).gather(1, ids)


@dataclass(frozen=True)
class ChangedBatch:
    """A batch with one supervised token of each row replaced by another one of the row."""

    batch: Batch
    changed: Sequence[int | None]
    """For each row the number of the changed token among its supervised ones; None where a row is too short."""


def with_changed_tokens(batch: Batch) -> ChangedBatch | None:
    """Rows in which one token is another, with two supervised tokens behind it; None where no row has room for it."""
    changes = [_change(labels) for labels in batch.labels[:, 1:]]
    if not any(changes):
        return None
    labels, ids = _replaced(batch.labels, batch.model_inputs["input_ids"], changes)
    tokens = batch.teacher_tokens
    if tokens is not None:
        own_labels, own_ids = _replaced(tokens.labels, tokens.input_ids, changes)
        tokens = replace(tokens, labels=own_labels, input_ids=own_ids)
    inputs = {**batch.model_inputs, "input_ids": ids}
    changed = replace(batch, model_inputs=inputs, labels=labels, teacher_tokens=tokens)
    return ChangedBatch(changed, [change and change[0] for change in changes])


def _change(labels_T: torch.Tensor) -> tuple[int, int] | None:
    """The number, among a row's supervised tokens, of the one to change, and what it becomes: another one of the row.

    It has two more right behind it, and as many as may be before it, which show how exact the targets are.
    """
    columns = (labels_T != IGNORE_INDEX).nonzero()[:, 0].tolist()
    row = labels_T[labels_T != IGNORE_INDEX].tolist()
    fits = [j for j in range(len(columns) - 2) if columns[j + 2] == columns[j] + 2]
    if not fits or len(set(row)) == 1:
        return None
    j = fits[len(fits) // 2]
    return j, next(token for token in row if token != row[j])


def _replaced(
    labels_BT: torch.Tensor, ids_BT: torch.Tensor, changes: Sequence[tuple[int, int] | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    labels_BT, ids_BT = labels_BT.clone(), ids_BT.clone()
    for row, change in enumerate(changes):
        if change is not None:
            j, token = change
            column = (labels_BT[row, 1:] != IGNORE_INDEX).nonzero()[j, 0] + 1
            labels_BT[row, column] = ids_BT[row, column] = token
    return labels_BT, ids_BT


def dependence(
    batch: Batch, targets: Targets, changed: ChangedBatch, other: Targets, vocab_size: int
) -> Dependence | None:
    """Which token the targets depend on; None where nothing moves (answers that were stored by row) or rows disagree.

    Returns:
        `aligned`: on the token before the one that they are for. `before`: only on those before that. `after`: on the
        very token that they have to predict.
    """
    if targets.covered_S is not None or other.covered_S is not None:
        return None  # which of them belong together is the teacher's to say
    if isinstance(targets.scores, SampledTargets) or isinstance(other.scores, SampledTargets):
        return None  # draws differ from one time to the next, whatever they depend on
    found: list[Dependence] = []
    first = 0
    for row, count in enumerate(batch.predicts_BT.sum(1).tolist()):
        j, own = changed.changed[row], slice(first, first + count)
        first += count
        if j is None:
            continue
        scores = part_of(targets.scores, own), part_of(other.scores, own)
        if (verdict := dependence_of_row(*scores, batch.labels_S[own], j, vocab_size)) is not None:
            found.append(verdict)
    most = Counter(found).most_common(1)
    return most[0][0] if most and most[0][1] > len(found) / 2 else None


def _likely(scores: Scores) -> torch.Tensor:
    """[S, X] ids that have the most of the mass, on the CPU."""
    if isinstance(scores, SampledTargets):
        scores = estimated_logprobs(scores)
    if isinstance(scores, MixedTopK):
        scores = scores.parts[0]
    if isinstance(scores, TopKLogprobs):
        order = scores.logprobs.topk(min(_LIKELY, scores.logprobs.shape[1]), -1).indices
        return scores.indices.gather(1, order).cpu()
    logits = scores if isinstance(scores, torch.Tensor) else scores.logits()
    return logits.topk(min(_LIKELY, logits.shape[1]), -1).indices.cpu()


def dependence_of_row(
    first: Scores, second: Scores, labels_S: torch.Tensor, j: int, vocab_size: int
) -> Dependence | None:
    """The same of one row: its targets before and after token j was changed."""
    row = labels_S.unique()[:_LIKELY].expand(len(labels_S), -1).cpu()
    ids = torch.cat([row, _likely(first), _likely(second)], 1)
    before, after = (log_probabilities(one, ids, vocab_size).cpu().clamp(min=_LEAST) for one in (first, second))
    moved_S = (before - after).abs().amax(1)
    rounding = float(moved_S[:j].max()) if j else 0.0
    three = moved_S[j : j + 3]
    threshold = max(_UNMOVED, _ROUNDING * rounding, _SHARE * float(three.max()))
    own, behind, next_but_one = (three > threshold).tolist()
    return "after" if own else "aligned" if behind else "before" if next_but_one else None
