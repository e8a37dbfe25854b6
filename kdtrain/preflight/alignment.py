"""Whether a teacher's targets stand at the tokens that they are for, asked before the first step.

Targets that are off by one train without a word: the loss falls, and the student learns to predict something else. Two
questions find them, on a few rows of the user's data:

1. Do the targets fit the tokens that they are for better than the tokens on either side of these? Those of a teacher
   that knows such text do, by nats.
2. Where that settles nothing (few tokens, a teacher that has not learnt this data): which token do they depend on? With
   one token of a row changed, the targets up to this token must stay and the next one must move, whatever the teacher
   has learnt.

Shapes: B rows, T positions, S supervised tokens, X ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kdtrain.config.tree import KeyPath, Problem
from kdtrain.data.batch import Batch, received
from kdtrain.data.collate import Collator
from kdtrain.losses.mixture import MixedTopK
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.losses.sampled import SampledTargets, estimated_logprobs
from kdtrain.losses.topk import TopKLogprobs, teacher_tail
from kdtrain.models.probe import OPTION_OF
from kdtrain.teachers.base import Scores, Targets, Teacher, targets_of
from kdtrain.teachers.by_row import part_of
from kdtrain.teachers.dependence import Dependence, dependence, log_probabilities, with_changed_tokens

Side = Literal["before", "after"]

# Nats per token that are far. Tried: teachers of the quickstart example after 250 and 600 steps are 0.8 to 3 nats apart
# from either side; models with random weights are within 0.1 of the token after, and up to 1.1 (2.3 with soft-capped
# logits) *nearer to the token before*, the one they have just read, because its embedding is still in the hidden state
# that a tied head compares with. So one comparison alone can prove that targets are right, but not that they are wrong.
_FAR = 0.5
# Standard errors of the mean difference: 20 tokens of one answer differ by 0.4 nats by chance.
_SURE = 3.0
# Fewer tokens prove nothing: of two the difference may be the same by chance.
FEW = 32
_ROWS_AT_ONCE = 64
# Rows that are asked for, of how many, with how many supervised tokens each if there are such.
FEW_ROWS, LOOKED_AT, _ENOUGH = 8, 256, 16
_LEAST = -30.0
_HOW = (
    "Row i of the targets must be the distribution of supervised token i, given the tokens before it. Logits at "
    "position t predict token t + 1; entry t of an echo or prompt_logprobs reply describes token t itself."
)


@dataclass(frozen=True)
class Gap:
    """How much better targets fit the right token than one beside it, in nats per token."""

    nll: float
    """Of the token beside it."""
    mean: float
    error: float
    """Standard error of the mean."""

    @property
    def is_far(self) -> bool:
        return self.mean >= _FAR and self.mean >= _SURE * self.error

    @property
    def is_reversed(self) -> bool:
        return -self.mean >= _FAR and -self.mean >= _SURE * self.error


@dataclass(frozen=True)
class Alignment:
    """What the targets of a few rows say."""

    tokens: int
    """Compared: those that differ from both of their neighbours."""
    nll: float
    """Mean −log p of the tokens that the targets are for."""
    entropy: float
    """Mean of the targets; the rest of top-k targets is spread evenly, as it is for the NLL."""
    before: Gap
    after: Gap
    finite: bool = True

    @property
    def fits(self) -> bool:
        return self.tokens >= FEW and self.before.is_far and self.after.is_far

    def settles_it(self, vocab_size: int) -> bool:
        """Whether the fit is proof enough: that of a model which knows something, and not more than it can know.

        Targets of a tied model with random weights that have read the token they are for fit it better than their
        entropy says.
        """
        return self.fits and self.nll >= 0.9 * self.entropy and self.entropy <= math.log(vocab_size) - 1

    def __str__(self) -> str:
        return (
            f"{self.nll:.2f} nats per token, against {self.before.nll:.2f} for the token before and "
            f"{self.after.nll:.2f} for the token after ({self.tokens} tokens)"
        )


def compare_with_neighbours(targets: Targets, batch: Batch, vocab_size: int) -> Alignment:
    """The NLL of the supervised tokens, and of those one position before and after them in the row.

    A token that a top-k teacher does not name has its share of the rest, tail / (V − K). Of drawn tokens the rest is
    estimated: what was not drawn is not impossible.
    """
    ids_S3 = neighbours(batch)
    if targets.covered_S is not None:
        ids_S3 = ids_S3[targets.covered_S.to(ids_S3.device)]
    return alignment_with(targets.scores, ids_S3, vocab_size)


def alignment_with(scores: Scores, ids_S3: torch.Tensor, vocab_size: int) -> Alignment:
    """The same, of tokens and those beside them [S, 3], as `neighbours` gives them."""
    nll_S3, entropy_S = _scored(scores, ids_S3, vocab_size)
    before, real, after = ids_S3.cpu().unbind(1)
    telling = (before != real) & (after != real) & (after >= 0)
    nll_S3, entropy_S = nll_S3[telling], entropy_S[telling]
    finite = bool(nll_S3.isfinite().all())
    nll_S3 = nll_S3.clamp(max=-_LEAST)
    return Alignment(
        len(nll_S3),
        _mean(nll_S3[:, 1]),
        _mean(entropy_S),
        gap(nll_S3[:, 0], nll_S3[:, 1]),
        gap(nll_S3[:, 2], nll_S3[:, 1]),
        finite,
    )


def neighbours(batch: Batch) -> torch.Tensor:
    """[S, 3]: for each supervised token the one before it, itself, and the one after it (−1 where the row ends)."""
    seen = batch.as_teacher_sees_it()
    ids_BT, mask_BT = seen.model_inputs["input_ids"], seen.model_inputs.get("attention_mask")
    real_BT = ids_BT if mask_BT is None else ids_BT.masked_fill(mask_BT.to(ids_BT.device) == 0, -1)
    after_BT = torch.nn.functional.pad(real_BT[:, 2:], (0, 1), value=-1)
    three = torch.stack([ids_BT[:, :-1], ids_BT[:, 1:], after_BT], -1)
    return three[seen.predicts_BT.to(ids_BT.device)]


def _scored(scores: Scores, ids_SX: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """−log p of ids [S, X] and the entropy [S], on the CPU; a few rows at a time, for a vocabulary is wide."""
    parts = []
    for start in range(0, len(ids_SX), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        some = part_of(scores, rows)
        nll = -log_probabilities(some, ids_SX[rows], vocab_size)
        parts.append((nll.cpu(), _entropy(some, vocab_size).cpu()))
    if not parts:
        return torch.zeros(ids_SX.shape), torch.zeros(len(ids_SX))
    nlls, entropies = zip(*parts, strict=True)
    return torch.cat(nlls), torch.cat(entropies)


def _entropy(scores: Scores, vocab_size: int) -> torch.Tensor:
    if isinstance(scores, SampledTargets):
        scores = estimated_logprobs(scores)
    if isinstance(scores, MixedTopK):
        scores = scores.at_one(vocab_size)
    if isinstance(scores, TopKLogprobs):
        known = scores.logprobs.float()
        log_tail = teacher_tail(known, torch.zeros_like(known[:, :1], dtype=torch.bool))[:, 0]
        others = (vocab_size - (scores.indices >= 0).sum(-1)).clamp(min=1)
        return -(known.exp() * known.clamp(min=_LEAST)).sum(-1) - log_tail.exp() * (log_tail - others.log())
    log_p = torch.log_softmax((scores if isinstance(scores, torch.Tensor) else scores.logits()).float(), -1)
    return -(log_p.exp() * log_p.clamp(min=_LEAST)).sum(-1)


def _mean(values: torch.Tensor) -> float:
    return float(values.double().mean()) if len(values) else 0.0


def gap(beside_S: torch.Tensor, nll_S: torch.Tensor) -> Gap:
    """How much better targets fit tokens than others, by the −log p of both [S]."""
    difference = (beside_S - nll_S).double()
    error = float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return Gap(_mean(beside_S), _mean(difference), error)


# ---- what it means ---------------------------------------------------------------------------------------------------


def alignment_findings(
    alignment: Alignment, found: Dependence | None, vocab_size: int, option: KeyPath = OPTION_OF["teacher"]
) -> list[Problem]:
    """What a teacher's targets on a few rows of the data say about their alignment.

    Args:
        found: of `dependence`, where it was asked.
    """
    if not alignment.tokens:
        return []
    if not alignment.finite:
        message = "The teacher's targets give NaN, or no probability at all, to tokens of your rows"
        return [Problem(option, f"{message}: {alignment}.", level="warning")]
    side = _suspected(alignment, vocab_size) if found is None else None if found == "aligned" else found
    if side is not None:
        return [Problem(option, _off_by_one(alignment, side), _HOW)]
    if alignment.fits:
        return [Problem(option, f"The teacher's targets fit the tokens that they are for: {alignment}.", level="info")]
    if alignment.tokens < FEW and found == "aligned":
        message = f"The teacher's targets depend on the right tokens. Their fit says little: {alignment}."
        return [Problem(option, message, level="info")]
    return [Problem(option, *_not_learnt(alignment, found), level="warning")]


def _suspected(alignment: Alignment, vocab_size: int) -> Side | None:
    """The side that stored targets belong to: where they fit it better, and as well as their entropy says.

    A model with random weights fits the token before as well: but then less well than its entropy says (weights that
    are large), or its entropy is nearly that of no knowledge at all, log V.
    """
    if alignment.tokens < FEW or alignment.entropy > math.log(vocab_size) - 1:
        return None
    sides: tuple[tuple[Side, Gap], ...] = (("before", alignment.before), ("after", alignment.after))
    for side, beside in sides:
        low, high = 0.75 * alignment.entropy - 0.25, 1.25 * alignment.entropy + 0.25
        if beside.is_reversed and low <= beside.nll <= high:
            return side
    return None


def _off_by_one(alignment: Alignment, side: Side) -> str:
    sees = "so they see the token that they have to predict" if side == "after" else "so they have not read it yet"
    return (
        f"The teacher's targets are off by one: they are those of the token {side} the one that they are for, {sees}. "
        f"On your rows: {alignment}."
    )


def _not_learnt(alignment: Alignment, found: Dependence | None) -> tuple[str, str]:
    checked = "They depend on the right tokens" if found == "aligned" else "Whether they are off by one cannot be seen"
    message = (
        "The teacher's targets fit the tokens that they are for hardly better than the tokens beside them: "
        f"{alignment}. {checked}."
    )
    return message, "Has the teacher learnt such text? Is it the model, the chat template and the data that you mean?"


# ---- asking ----------------------------------------------------------------------------------------------------------


def check_alignment(
    teacher: Teacher,
    batch: Batch,
    *,
    targets: Targets | None = None,
    any_rank: Callable[[bool], bool] = bool,
    option: KeyPath = OPTION_OF["teacher"],
) -> list[Problem]:
    """What a teacher's targets on a few rows say: it is asked once, and once more where that settles nothing.

    Args:
        batch: of `few_rows`, where the teacher will run; the same on all ranks.
        targets: its targets, where it was asked already.
        any_rank: whether something holds on any rank. A teacher in pieces is asked by all of them or by none, and
            rounding may let one of them see another figure.
    """
    if targets is None:
        teacher.prepare([batch])
        targets = targets_of(teacher, batch)
    alignment = compare_with_neighbours(targets, batch, teacher.vocab_size)
    found = None
    if any_rank(not alignment.settles_it(teacher.vocab_size) and alignment.tokens > 0):
        found = _asked_again(teacher, batch, targets)
    return alignment_findings(alignment, found, teacher.vocab_size, option)


def _asked_again(teacher: Teacher, batch: Batch, targets: Targets) -> Dependence | None:
    """What the targets depend on, from the same rows with one token changed in each."""
    if not teacher.answers_anything or batch.num_chunks is not None:
        return None  # a token of the student's is not one of a teacher's that has another tokenizer
    if teacher.waits and batch.has_images:
        return None  # a server is given conversations there, not tokens that can be changed
    changed = with_changed_tokens(batch)
    if changed is None:
        return None
    try:
        teacher.prepare([changed.batch])
        other = targets_of(teacher, changed.batch)
    except Exception:
        if teacher.module is not None or teacher.waits:
            raise
        return None  # a teacher of the user's own that has stored its answers has none for such a row
    return dependence(batch, targets, changed, other, teacher.vocab_size)


def few_rows(dataset: Any, collator: Any, batch_size: int) -> Batch | None:
    """A batch of a few short rows that have some supervised tokens; None where the first rows have none.

    Of rows that are encoded already the shortest are taken, otherwise the first ones. A collator of the user's own gets
    as many as in training.
    """
    columns = getattr(dataset, "column_names", None) or ()
    if isinstance(collator, Collator) and "labels" in columns:
        chosen = _short_rows(dataset)
    else:
        chosen = list(range(min(len(dataset), batch_size if not isinstance(collator, Collator) else FEW_ROWS)))
    if not chosen:
        return None
    batch = received(collator([dataset[i] for i in chosen]), None)
    return batch if len(batch) and int(batch.num_supervised) else None


def _short_rows(dataset: Any) -> list[int]:
    """Numbers of rows with some supervised tokens, the shortest of the first ones."""
    some = dataset.select_columns("labels")[:LOOKED_AT]["labels"]
    counts = [sum(label != IGNORE_INDEX for label in labels) for labels in some]
    enough = [i for i, count in enumerate(counts) if count >= min(_ENOUGH, max(counts))]
    return sorted(sorted(enough, key=lambda i: len(some[i]))[:FEW_ROWS])
