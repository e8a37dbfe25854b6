"""What the two tokenizers say of a conversation: one template, thinking on both sides or on neither, an end of a turn.

The teacher reads the student's tokens. Where it was trained on conversations that look otherwise, it answers all the
same, as a model does that reads a foreign format: worse, and nobody is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kdtrain.config.tree import KeyPath, Problem
from kdtrain.data.errors import show
from kdtrain.data.messages import THINK, THINK_END
from kdtrain.data.probed_template import ProbedTemplate
from kdtrain.errors import DataError
from kdtrain.generation.sampling import turn_ends
from kdtrain.models.probe import OPTION_OF

_QUESTION = [{"role": "user", "content": "How many?"}]
_CHAT = [*_QUESTION, {"role": "assistant", "content": "Two."}]
_KWARGS: KeyPath = ("rlhf", "teacher", "chat_template_kwargs")
_SHOWN = 120

Thinking = Literal["no", "open", "closed"]


@dataclass(frozen=True)
class _View:
    """A conversation as one template writes it."""

    prompt: str
    """With the generation prompt."""
    chat: str

    @property
    def thinking(self) -> Thinking:
        """Whether the model is to think: behind an open block it does, behind a closed one it does not."""
        behind = self.prompt.partition(_QUESTION[0]["content"])[2]
        if THINK not in behind:
            return "no"
        return "closed" if THINK_END in behind.rpartition(THINK)[2] else "open"


def template_findings(
    student: Any,
    teacher: Any,
    *,
    chats: bool,
    student_kwargs: Mapping[str, Any],
    teacher_kwargs: Mapping[str, Any],
) -> list[Problem]:
    """How student and teacher write a conversation down.

    Args:
        student, teacher: their tokenizers or processors; the same object where the teacher has none of its own.
        chats: whether rows go through the student's chat template.
        student_kwargs: arguments of the template for the student's text.
        teacher_kwargs: those of the teacher's, the student's included.
    """
    if not chats:
        return _plain_rows(student, teacher)
    own, read = _view(student, student_kwargs), _view(student, teacher_kwargs)
    known = read if teacher is student else _view(teacher, teacher_kwargs)
    if own is None or read is None:
        return []
    if own.thinking != read.thinking:
        return [_thinking(_KWARGS, own.thinking, read.thinking, "reads")]
    if known is None:
        return [_no_template()]
    if read.thinking != known.thinking:
        return [_thinking(OPTION_OF["teacher"], read.thinking, known.thinking, "was trained on")]
    return [] if read == known else [_other_template(read, known)]


def _view(processing: Any, kwargs: Mapping[str, Any]) -> _View | None:
    """None without a template, or with one that takes no such conversation."""
    try:
        template = ProbedTemplate(processing, None, False, kwargs)
        prompt, _ = template.render(_QUESTION, generation_prompt=True)
        return _View(prompt, template.render(_CHAT)[0])
    except DataError:
        return None


def _has_template(processing: Any) -> bool:
    tokenizer = getattr(processing, "tokenizer", processing)
    return bool(tokenizer.chat_template or getattr(processing, "chat_template", None))


def _plain_rows(student: Any, teacher: Any) -> list[Problem]:
    if _has_template(student) or not _has_template(teacher):
        return []
    message = (
        "The teacher is a chat model (its tokenizer has a chat template) and the student is a base model: rows of "
        "plain text reach the teacher without the form that it answers in."
    )
    hint = (
        "Give rows as messages, and copy the teacher's chat_template.jinja into the student's folder; or use the "
        "teacher's base model."
    )
    return [Problem(OPTION_OF["teacher"], message, hint, level="warning")]


def _no_template() -> Problem:
    message = (
        "The teacher's tokenizer has no chat template: it is a base model, which has not learnt to read conversations "
        "nor to end a turn, and the student would learn that from it."
    )
    return Problem(OPTION_OF["teacher"], message, "Use its chat version as the teacher.", level="warning")


_IN_WORDS: Mapping[Thinking, str] = {
    "no": "without a block of reasoning",
    "open": "that begin with a block of reasoning",
    "closed": "with an empty block of reasoning, so without thinking",
}


def _thinking(option: KeyPath, student: Thinking, teacher: Thinking, verb: str) -> Problem:
    message = (
        f"Thinking is on one side only: the student reads prompts {_IN_WORDS[student]}, the teacher {verb} prompts "
        f"{_IN_WORDS[teacher]}."
    )
    hint = (
        "Give both the same, such as data.chat_template_kwargs: {enable_thinking: false}, or choose a teacher of the "
        "same kind."
    )
    return Problem(option, message, hint, level="warning")


def _other_template(read: _View, known: _View) -> Problem:
    at = next((i for i, (a, b) in enumerate(zip(read.chat, known.chat, strict=False)) if a != b), 0)
    if read.chat == known.chat:
        ours, others = (show(one.prompt[-_SHOWN:], _SHOWN) for one in (read, known))
    else:
        ours, others = (show(one.chat[max(0, at - 20) :], _SHOWN) for one in (read, known))
    message = (
        "The teacher has another chat template than the student, and reads every row in the student's, which it was "
        f"not trained on. The student's: {ours} The teacher's: {others}"
    )
    hint = (
        "Copy the chat template of one (chat_template.jinja, or chat_template in tokenizer_config.json) into the "
        "folder of the other: of a base student the teacher's."
    )
    return Problem(OPTION_OF["teacher"], message, hint, level="warning")


# ---- a token that the student cannot learn ---------------------------------------------------------------------------

_SAMPLED = 4096  # rows of the head
_UNTRAINED = 1e-2  # of the median norm: what a base model has never read keeps the norm that it began with, or none


def untrained_findings(model: Any, processing: Any) -> list[Problem]:
    """Tokens that end a turn and that a base student has never read, where its adapter leaves their weights alone.

    Args:
        model: the student, not wrapped but by PEFT.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not _has_template(processing) or weight is None or not weight.is_floating_point() or _is_trained(head):
        return []
    ends = [number for number in turn_ends(processing) if number < len(weight)]
    norms = torch.linalg.vector_norm(weight[:: max(len(weight) // _SAMPLED, 1)].detach().float(), dim=1)
    least = _UNTRAINED * float(norms.median())
    unread = [number for number in ends if float(torch.linalg.vector_norm(weight[number].detach().float())) < least]
    if not ends or len(unread) < len(ends):  # one of them is enough to stop at
        return []
    tokenizer = getattr(processing, "tokenizer", processing)
    names = ", ".join(show(tokenizer.convert_ids_to_tokens(number), 40) for number in unread)
    message = (
        f"The student has never read what ends a turn ({names}: its weights are all but zero, as in a base model), and "
        "its adapter does not train them: it cannot learn to stop."
    )
    hint = "Set tuner.modules_to_save: [embed_tokens, lm_head], train it in full, or begin with its chat version."
    return [Problem(OPTION_OF["student"], message, hint, level="warning")]


def _is_trained(head: Any) -> bool:
    return any(parameter.requires_grad for parameter in head.parameters())
