"""A conversation as the teacher reads it, where its template arguments are others than the student's.

The student's supervised tokens are compared with the teacher's predictions one by one. So each answer of the student
has to stand at the end of the same turn in the teacher's text, and its tokens there are the teacher's labels: the same
ids in the same order. What stands in front of it may differ, such as an empty thinking block that only one of the two
prompts has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdtrain.data.chat_template import TemplateOptions
from kdtrain.data.encoded_row import EncodedRow
from kdtrain.data.errors import RowError, show
from kdtrain.data.rendered import Rendered, Turn
from kdtrain.data.rows import Chat

OPTION = "rlhf.teacher.chat_template_kwargs"
NO_EFFECT = f"{OPTION} changes nothing: the teacher reads every row as the student does"
OTHER_ANSWERS = f"{OPTION}: the chat template leaves out an answer for the teacher and not for the student, or reverse"
PROMPT_ALONE = (
    f"{OPTION} changes the generation prompt alone: behind the data's own answer both read the same text, and differ "
    "where answers are generated"
)


@dataclass(frozen=True)
class TeacherText:
    """The teacher's text. The spans of its turns are the student's answers; their starts are its own prompts' ends."""

    rendered: Rendered
    edges: frozenset[int]
    """Characters at which an answer begins with a token of its own, as it does in the student's text."""


def teacher_options(options: TemplateOptions) -> TemplateOptions:
    """How the teacher's template renders: as the student's, but for the arguments that the option names."""
    kwargs = {**(options.chat_template_kwargs or {}), **(options.teacher_chat_template_kwargs or {})}
    return replace(options, chat_template_kwargs=kwargs, teacher_chat_template_kwargs=None)


def as_teacher_reads(chat: Chat, kwargs: Mapping[str, Any]) -> Chat:
    """The conversation with template arguments of its own only where the option does not name them."""
    return replace(chat, template_kwargs={**chat.template_kwargs, **kwargs}) if chat.template_kwargs else chat


def teacher_text(chat: Chat, student: Rendered, teacher: Rendered, train_on: str) -> TeacherText | None:
    """The student's answers in the teacher's text; None where both read the same.

    Raises:
        RowError: an answer is not there.
    """
    if _same(student, teacher):
        return None
    if chat.images:
        raise RowError(f"{OPTION}: rows with images are not supported yet")
    if train_on == "all" and student.turns:
        if student.text != teacher.text:
            raise RowError(
                f"data.train_on: all supervises the prompt as well, which {OPTION} makes another for the teacher: set "
                "data.train_on to assistant or last"
            )
        return TeacherText(teacher, frozenset())
    if len(student.turns) != len(teacher.turns):
        raise RowError(OTHER_ANSWERS)
    turns, edges, previous = [], set(), 0
    for number, (own, other) in enumerate(zip(student.turns, teacher.turns, strict=True), start=1):
        turn = _with_answer(student.text, own, teacher.text, other, previous, number)
        if own.spans and own.spans[0][0] == own.start:
            edges.add(turn.spans[0][0])
        turns.append(turn)
        previous = turn.end
    return TeacherText(replace(teacher, turns=tuple(turns)), frozenset(edges))


def _same(student: Rendered, teacher: Rendered) -> bool:
    return replace(student, notes=()) == replace(teacher, notes=())


def _with_answer(text: str, own: Turn, teacher_text: str, other: Turn, previous: int, number: int) -> Turn:
    """The teacher's turn with the student's spans, as they stand at its end.

    Args:
        previous: where the turn before it ends in the teacher's text.
        number: of the turn, from 1.
    """
    if not own.spans:
        return replace(other, spans=())
    start, end = own.spans[0][0], own.spans[-1][1]
    moved = (other.spans[-1][1] if other.spans else other.end) - end
    first = start + moved
    if first < previous or teacher_text[first : end + moved] != text[start:end]:
        student_shows, teacher_shows = _where_they_differ(text[start:end], teacher_text[: end + moved])
        raise RowError(
            f"{OPTION}: answer {number} is not at the end of the turn that the teacher reads: for the student it has "
            f"{student_shows}, for the teacher {teacher_shows}. Both have to read the same tokens"
        )
    return replace(other, spans=tuple((a + moved, b + moved) for a, b in own.spans))


def _where_they_differ(answer: str, text: str) -> tuple[str, str]:
    """Some characters of both, up to what they end with in common."""
    backwards = enumerate(zip(reversed(answer), reversed(text), strict=False))
    common = next((i for i, (a, b) in backwards if a != b), min(len(answer), len(text)))
    return _shown(answer, common), _shown(text, common)


def _shown(text: str, common: int) -> str:
    at = max(0, len(text) - common - 40)
    return show(text[at : at + 80])


def with_teacher(row: EncodedRow, teacher: EncodedRow) -> EncodedRow:
    """The student's row with the teacher's, unless they are the same.

    Raises:
        RowError: their supervised tokens differ.
    """
    if row.supervised_ids != teacher.supervised_ids:
        raise RowError(
            f"{OPTION}: the answer has other tokens in the text that the teacher reads than in the student's, and "
            "distillation compares them token by token"
        )
    same_text = (row.input_ids, row.labels) == (teacher.input_ids, teacher.labels)
    if same_text and row.prompt_length == teacher.prompt_length:
        return row
    notes = (*row.notes, PROMPT_ALONE) if same_text else row.notes
    return replace(row, teacher=replace(teacher, notes=()), notes=notes)


def teacher_notes(own: tuple[str, ...], teacher: tuple[str, ...]) -> tuple[str, ...]:
    """What is to be said of the teacher's text alone."""
    return tuple(f"for the teacher: {note}" for note in teacher if note not in own)
