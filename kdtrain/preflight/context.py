"""What the teacher alone reads, and how much it changes what the teacher says: asked before the first step.

A prefix (or template arguments) that hardly moves the teacher's distributions leaves nothing to distil, whatever the
loss does afterwards. So both prompts are shown, and the divergence that lies between them.

Shapes: B rows, T positions, S supervised tokens, K known tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kdtrain.config.tree import KeyPath, Problem
from kdtrain.data.batch import Batch
from kdtrain.data.collate import Collator
from kdtrain.data.errors import show
from kdtrain.losses.topk import TopKLogprobs, teacher_tail
from kdtrain.preflight.alignment import FEW_ROWS, LOOKED_AT, few_rows
from kdtrain.teachers.base import Scores, Teacher, targets_of
from kdtrain.teachers.by_row import part_of
from kdtrain.teachers.dependence import log_probabilities

OPTION: KeyPath = ("rlhf", "teacher")
# Nats per token below which there is nothing to distil: a system prompt of one word makes more.
NOTHING_TO_DISTIL = 0.02
_ROWS_AT_ONCE = 64
_SHOWN = 300  # characters of each prompt
_BESIDE = 60  # of them in front of where the two begin to differ
_SHARED_ONLY = (
    "What the teacher reads differs from row to row. A rule that all rows share is learnt into the weights; a hint for "
    "one row often is not (arXiv 2605.11182), and then only its answers are learnt. kdtrain evaluate says how much was."
)


@dataclass(frozen=True)
class Context:
    """What the teacher's own view does on a few rows."""

    kl: float
    """KL(T with it ‖ T without it), the mean in nats per token. Of top-k targets over the tokens that are named and one
    bucket for the rest, which is a lower bound."""
    tokens: int
    rows: int
    differs_by_row: bool
    """Whether most rows have a text of their own that the student does not read, and not a rule that some share."""
    student_prompt: str
    teacher_prompt: str
    """Of the first row in which they differ."""


def rows_with_context(dataset: Any, collator: Any) -> Batch | None:
    """A batch of a few of the first rows that the teacher reads otherwise; None where there are none.

    Short ones with some supervised tokens, or prompts where no row has an answer.
    """
    if "teacher_input_ids" not in (getattr(dataset, "column_names", None) or ()):
        return None
    some = dataset.select(range(min(len(dataset), LOOKED_AT)))
    own = [i for i, ids in enumerate(some["teacher_input_ids"][:]) if ids is not None]
    if not own or not isinstance(collator, Collator):
        return None
    differing = some.select(own)
    return few_rows(differing, collator, FEW_ROWS) or collator([differing[i] for i in range(min(len(own), FEW_ROWS))])


def look_at_context(teacher: Teacher, batch: Batch, tokenizer: Any) -> Context | None:
    """Ask a teacher about a few rows twice: as it reads them, and as the student does.

    Args:
        batch: with supervised tokens, where the teacher will run.

    Returns:
        None where it reads no row otherwise, or answers for a part of the tokens only.

    Raises:
        TeacherError: no usable answer.
    """
    if batch.teacher_tokens is None:
        return None
    alone = replace(batch, teacher_tokens=None)
    teacher.prepare([batch, alone])
    with_it, without = targets_of(teacher, batch), targets_of(teacher, alone)
    if with_it.covered_S is not None or without.covered_S is not None:
        return None
    kl_S = context_kl(with_it.scores, without.scores, teacher.vocab_size)
    pairs = list(zip(_prompts(batch), _prompts(batch.as_teacher_sees_it()), strict=True))
    differing = [(own, other) for own, other in pairs if own != other]
    if not differing or not len(kl_S):
        return None
    prompts = (tokenizer.decode(ids) for ids in differing[0])
    return Context(
        float(kl_S.double().mean()),
        len(kl_S),
        len(batch),
        _are_hints([_own_part(own, other) for own, other in differing]),
        *_around_the_difference(*prompts),
    )


def context_kl(with_it: Scores, without: Scores, vocab_size: int) -> torch.Tensor:
    """KL of two answers of one teacher for the same tokens, [S] nats, float32, on the CPU."""
    parts = [
        _kl(part_of(with_it, rows), part_of(without, rows), vocab_size).cpu()
        for start in range(0, _length(with_it), _ROWS_AT_ONCE)
        for rows in [slice(start, start + _ROWS_AT_ONCE)]
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def _kl(with_it: Scores, without: Scores, vocab_size: int) -> torch.Tensor:
    if not isinstance(with_it, TopKLogprobs):
        log_p, log_q = (torch.log_softmax(_logits(scores).float(), -1) for scores in (with_it, without))
        return _weighted(log_p, log_q).clamp(min=0)
    log_p = with_it.logprobs.float()
    log_q = log_probabilities(without, with_it.indices, vocab_size).to(log_p.device)
    missing = with_it.indices < 0
    log_p, log_q = log_p.masked_fill(missing, -torch.inf), log_q.masked_fill(missing, -torch.inf)
    none = torch.zeros_like(log_p[:, :1], dtype=torch.bool)
    tails = (teacher_tail(one, none) for one in (log_p, log_q))
    return _weighted(*(torch.cat([one, tail], 1) for one, tail in zip((log_p, log_q), tails, strict=True))).clamp(min=0)


def _weighted(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Σ p·(log p − log q); a column without probability counts nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _logits(scores: Any) -> torch.Tensor:
    logits: torch.Tensor = scores if isinstance(scores, torch.Tensor) else scores.logits()
    return logits


def _length(scores: Any) -> int:
    if isinstance(scores, TopKLogprobs):
        return len(scores.indices)
    return len(scores if isinstance(scores, torch.Tensor) else scores.hidden)


# ---- the two prompts -------------------------------------------------------------------------------------------------


def _prompts(batch: Batch) -> list[list[int]]:
    """Each row up to its first supervised token."""
    ids_BT, predicts_BT = batch.model_inputs["input_ids"].tolist(), batch.predicts_BT.tolist()
    rows = zip(ids_BT, predicts_BT, strict=True)
    return [ids[: predicts.index(True) + 1] if any(predicts) else [] for ids, predicts in rows]


def _own_part(student: Sequence[int], teacher: Sequence[int]) -> tuple[int, ...]:
    """The tokens of a teacher's prompt that the student's does not have, but for what both begin and end with."""
    first = _common(student, teacher)
    last = _common(student[first:][::-1], teacher[first:][::-1])
    return tuple(teacher[first : len(teacher) - last])


def _are_hints(parts: Sequence[tuple[int, ...]]) -> bool:
    """A shared rule looks otherwise in rows that have a system message already: so more than a few must differ."""
    return len(parts) > 1 and len(set(parts)) > len(parts) / 2


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many leading items are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _around_the_difference(student: str, teacher: str) -> tuple[str, str]:
    """Some characters of both, from shortly before the first that differs."""
    start = max(0, _common(student, teacher) - _BESIDE)
    return _part(student, start), _part(teacher, start)


def _part(text: str, start: int) -> str:
    return ("…" if start else "") + show(text[start:], _SHOWN)


# ---- what it means ---------------------------------------------------------------------------------------------------


def context_findings(context: Context | None, option: KeyPath = OPTION) -> list[Problem]:
    """What is to be said before a student learns to do without what its teacher reads."""
    if context is None:
        return []
    figure = f"{context.kl:.2g} nats per token (KL, {context.tokens} tokens of {context.rows} rows)"
    both = f"The student reads: {context.student_prompt}\nThe teacher reads: {context.teacher_prompt}"
    message = f"What the teacher alone reads changes its distributions by {figure}.\n{both}"
    findings = [Problem(option, message, level="info")]
    if context.kl < NOTHING_TO_DISTIL:
        findings = [
            Problem(
                option,
                f"There is nothing to distil: what the teacher alone reads changes its distributions by {figure} only, "
                f"less than {NOTHING_TO_DISTIL:g}.\n{both}",
                "Try another prefix; a small model often does not follow one.",
                level="warning",
            )
        ]
    if context.differs_by_row:
        findings.append(Problem(option, _SHARED_ONLY, level="info"))
    return findings
