"""What both models say of a few of the data's answers: which of them knows these better, how they begin and end.

Shapes: S supervised tokens, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from kdtrain.config.tree import KeyPath, Problem
from kdtrain.data.batch import Batch
from kdtrain.data.errors import show
from kdtrain.losses.sampled import SampledTargets
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.models.probe import OPTION_OF
from kdtrain.preflight.alignment import FEW
from kdtrain.teachers.base import Scores, Targets
from kdtrain.teachers.by_row import part_of
from kdtrain.teachers.dependence import log_probabilities

THINKING = ("<think>", "<thinking>", "<|think|>", "[THINK]", "<reasoning>", "<thought>")
"""Tokens that open a block of reasoning."""

_ROWS_AT_ONCE = 64
# A model that knows something of the rows is this much below log V, in nats per token.
_KNOWS = 1.0
# Standard errors (over rows) and nats per token by which a teacher must be worse before it is said.
_SURE, _WORSE = 3.0, 0.02
# Largest |log p of the teacher − log p of the student| of two models that are one.
_SAME = 1e-4
_MOSTLY, _HARDLY_EVER = 0.5, 0.05


@dataclass(frozen=True)
class Opening:
    """How answers begin: the probability of the token that opens a block of reasoning."""

    token: str
    rows: float
    """Share of answers that begin with it."""
    student: float
    """Mean probability."""
    teacher: float


@dataclass(frozen=True)
class Ending:
    """How answers end."""

    token: str
    """The stop token that most rows end with."""
    teacher: float
    """Its mean probability to the teacher, where an answer ends with it."""
    instead: str | None
    """The special token that the teacher finds most likely there, if it is another."""
    count: int


@dataclass(frozen=True)
class AnswersLook:
    """Both models on the supervised tokens of a few rows."""

    tokens: int
    student_ce: float
    """Nats per token."""
    teacher_ce: float
    """Nats per token; of top-k targets at least this is known to be lost."""
    error: float
    """Standard error of the difference, over rows."""
    largest_difference: float
    """Of the log-probabilities of one token."""
    vocab_size: int
    opening: Opening | None = None
    ending: Ending | None = None

    def knows(self, ce: float) -> bool:
        """Whether a model with this CE knows something of such rows."""
        return ce < math.log(self.vocab_size) - _KNOWS


def look_at_answers(
    student: Scores, targets: Targets, batch: Batch, tokenizer: Any, vocab_size: int
) -> AnswersLook | None:
    """Compare two models on a batch's answers; None of drawn tokens, which are an estimate, and without a token.

    Args:
        vocab_size: leading ids that both share.
    """
    teacher, labels_S = targets.scores, batch.labels_S
    if isinstance(teacher, SampledTargets) or targets.covered_S is not None or not len(labels_S):
        return None
    own_S, other_S = (_most(scores, labels_S, vocab_size) for scores in (student, teacher))
    difference_S = (own_S - other_S).clamp(min=-100, max=100)
    first_S, last_S = _edges(batch)
    return AnswersLook(
        len(labels_S),
        float(-own_S.mean()),
        float(-other_S.mean()),
        _error(difference_S, batch),
        float(difference_S.abs().max()),
        vocab_size,
        _opening(student, teacher, labels_S, first_S, tokenizer, vocab_size),
        _ending(teacher, labels_S, last_S, tokenizer, vocab_size),
    )


def _most(scores: Scores, ids_S: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """log p of one id at each token, [S] float64 on the CPU. Of an id that top-k targets do not name: the most that it
    can have, so that a teacher is not called worse for what is not known of it."""
    if isinstance(scores, TopKLogprobs):
        known = scores.logprobs.double()
        at_id = scores.indices == ids_S[:, None].to(scores.indices.device)
        left = torch.log1p(-known.exp().sum(-1).clamp(max=1 - 1e-12))
        smallest = known.masked_fill(scores.indices < 0, torch.inf).amin(-1)
        named = known.masked_fill(~at_id, -torch.inf).amax(-1)
        return torch.where(at_id.any(-1), named, torch.minimum(left, smallest)).cpu()
    parts = [
        log_probabilities(part_of(scores, rows), ids_S[rows, None], vocab_size)[:, 0].double().cpu()
        for start in range(0, len(ids_S), _ROWS_AT_ONCE)
        for rows in [slice(start, start + _ROWS_AT_ONCE)]
    ]
    return torch.cat(parts)


def _edges(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """[S] bool: the first and the last token of each supervised run of a row."""
    predicts = batch.predicts_BT.cpu()
    none = torch.zeros_like(predicts[:, :1])
    begins = predicts & ~torch.cat([none, predicts[:, :-1]], 1)
    ends = predicts & ~torch.cat([predicts[:, 1:], none], 1)
    return begins[predicts], ends[predicts]


def _error(difference_S: torch.Tensor, batch: Batch) -> float:
    """Standard error of the mean over tokens, with rows as what is drawn: tokens of one row are alike."""
    row_S = batch.predicts_BT.cpu().nonzero()[:, 0]
    if len(row_S.unique()) < 2:
        return math.inf
    centred = difference_S - difference_S.mean()
    sums = torch.zeros(len(batch), dtype=torch.float64).index_add_(0, row_S, centred)
    return float(sums.square().sum().sqrt()) / len(row_S)


def _probability(scores: Scores, chosen_S: torch.Tensor, ids: list[int], vocab_size: int) -> torch.Tensor:
    """[C, ids] at the chosen tokens."""
    places = chosen_S.nonzero()[:, 0].tolist()
    wanted = torch.tensor([ids])
    rows = [log_probabilities(part_of(scores, slice(i, i + 1)), wanted, vocab_size).exp().cpu() for i in places]
    return torch.cat(rows)


def _opening(
    student: Scores, teacher: Scores, labels_S: torch.Tensor, first_S: torch.Tensor, tokenizer: Any, vocab_size: int
) -> Opening | None:
    vocabulary = tokenizer.get_added_vocab()
    known = [(token, vocabulary[token]) for token in THINKING if vocabulary.get(token, vocab_size) < vocab_size]
    if not known or not bool(first_S.any()):
        return None
    ids = [number for _, number in known]
    of_teacher = _probability(teacher, first_S, ids, vocab_size).mean(0)
    of_student = _probability(student, first_S, ids, vocab_size).mean(0)
    at = int((of_teacher + of_student).argmax())
    rows = float((labels_S.cpu()[first_S] == ids[at]).double().mean())
    return Opening(known[at][0], rows, float(of_student[at]), float(of_teacher[at]))


def _ending(
    teacher: Scores, labels_S: torch.Tensor, last_S: torch.Tensor, tokenizer: Any, vocab_size: int
) -> Ending | None:
    special = sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()})
    special = [number for number in special if number < vocab_size]
    ends = labels_S.cpu()[last_S].tolist()
    stops = [number for number in ends if number in set(special)]
    if not stops:
        return None
    stop = max(set(stops), key=stops.count)
    here_S = last_S & (labels_S.cpu() == stop)
    found = _probability(teacher, here_S, special, vocab_size).mean(0)
    likely = special[int(found.argmax())]
    other = None if likely == stop or float(found.max()) < _MOSTLY else _name(tokenizer, likely)
    return Ending(_name(tokenizer, stop), float(found[special.index(stop)]), other, int(here_S.sum()))


def _name(tokenizer: Any, number: int) -> str:
    return show(tokenizer.convert_ids_to_tokens(number), 40)


# ---- what it means ---------------------------------------------------------------------------------------------------


def answer_findings(look: AnswersLook | None, *, itself: bool, option: KeyPath = OPTION_OF["teacher"]) -> list[Problem]:
    """What both models on the data's answers say about a run.

    Args:
        itself: whether the student's own weights are the teacher, which begins equal and reads more.
    """
    if look is None:
        return []
    found = [] if itself else [*_same(look, option), *_worse(look, option)]
    if look.knows(look.teacher_ce):
        found += _endings(look, option)
    found += _openings(look, option)
    if not found and look.knows(look.teacher_ce):
        message = (
            f"On {look.tokens} tokens of your rows the teacher has {look.teacher_ce:.2f} nats per token, the student "
            f"{look.student_ce:.2f}."
        )
        found = [Problem(option, message, level="info")]
    return found


def _same(look: AnswersLook, option: KeyPath) -> list[Problem]:
    if look.largest_difference > _SAME:
        return []
    message = (
        f"Student and teacher say the same of every token of your rows ({look.tokens} tokens): they have the same "
        "weights, and there is nothing to learn from one for the other."
    )
    return [Problem(option, message, "Name another model as the teacher.", level="warning")]


def _worse(look: AnswersLook, option: KeyPath) -> list[Problem]:
    worse = look.teacher_ce - look.student_ce
    if look.tokens < FEW or not look.knows(look.student_ce) or worse < max(_WORSE, _SURE * look.error):
        return []
    message = (
        f"The teacher knows your rows less well than the student does: {look.teacher_ce:.2f} nats per token against "
        f"{look.student_ce:.2f} (± {look.error:.2f}, {look.tokens} tokens). Distillation would pull the student away "
        "from them."
    )
    hint = (
        "Is it the teacher, the chat template and the data that you mean? Train the teacher on such rows first, let it "
        "write the answers (answers: teacher), or choose another."
    )
    return [Problem(option, message, hint, level="warning")]


def _endings(look: AnswersLook, option: KeyPath) -> list[Problem]:
    ending = look.ending
    if ending is None or ending.teacher >= _HARDLY_EVER:
        return []
    instead = f"; it would write {ending.instead}" if ending.instead else ""
    message = (
        f"The teacher does not end an answer where your rows do: to {ending.token} it gives {ending.teacher:.1%} "
        f"({ending.count} answers){instead}. The student would learn not to stop."
    )
    hint = (
        "A base model as the teacher of a chat student, or another chat template than it was trained on? Use its chat "
        "version, or the template that it knows."
    )
    return [Problem(option, message, hint, level="warning")]


def _openings(look: AnswersLook, option: KeyPath) -> list[Problem]:
    opening = look.opening
    if opening is None:
        return []
    found = []
    do = "do" if opening.rows > _MOSTLY else "do not"
    if abs(opening.teacher - opening.rows) > _MOSTLY:
        wants = "begins" if opening.teacher > opening.rows else "does not begin"
        message = (
            f"Thinking is on one side only: the teacher {wants} its answers with {opening.token} "
            f"({opening.teacher:.0%} at the first token), and your rows {do}. Its distributions are those of another "
            "kind of answer."
        )
        found.append(Problem(option, message, _THINKING_HINT, level="warning"))
    if opening.student - opening.rows > _MOSTLY:
        message = (
            f"Thinking is on one side only: the student begins its answers with {opening.token} "
            f"({opening.student:.0%} at the first token), and your rows {do}."
        )
        found.append(Problem(OPTION_OF["student"], message, _THINKING_HINT, level="warning"))
    return found


_THINKING_HINT = (
    "Switch it off for both, data.chat_template_kwargs: {enable_thinking: false} where the template knows it, or train "
    "on rows with reasoning."
)
