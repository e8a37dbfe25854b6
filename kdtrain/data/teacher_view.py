"""A conversation as the teacher reads it, where it has messages or template arguments that the student does not have.

The student's supervised tokens are compared with the teacher's predictions one by one. So each answer of the student
has to stand at the end of the same turn in the teacher's text, and its tokens there are the teacher's labels: the same
ids in the same order. What stands in front of it may differ, such as a system message, or an empty thinking block that
only one of the two prompts has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdtrain.data.chat_template import ChatTemplate, TemplateOptions
from kdtrain.data.encoded_row import EncodedRow
from kdtrain.data.errors import RowError, show
from kdtrain.data.prefix import NO_SYSTEM, PrefixedChat
from kdtrain.data.prefix import OPTION as PREFIX
from kdtrain.data.rendered import Rendered, Turn
from kdtrain.data.row_notes import OTHER_PROMPT
from kdtrain.data.rows import Chat
from kdtrain.errors import DataError

OPTION = "rlhf.teacher.chat_template_kwargs"
NO_EFFECT = "{option} changes nothing: the teacher reads every row as the student does"
OTHER_ANSWERS = "the chat template leaves out an answer for the teacher and not for the student, or reverse"
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


def teacher_option(options: TemplateOptions) -> str:
    """Which options make the teacher's text another, as messages name them; empty where none does."""
    prefixed = options.teacher_prefix is not None or options.teacher_prefix_column is not None
    named = [OPTION] * bool(options.teacher_chat_template_kwargs) + [PREFIX] * prefixed
    return " and ".join(named)


def teacher_options(options: TemplateOptions) -> TemplateOptions:
    """How the teacher's template renders: as the student's, but for the arguments that the option names."""
    kwargs = {**(options.chat_template_kwargs or {}), **(options.teacher_chat_template_kwargs or {})}
    own = {"teacher_chat_template_kwargs": None, "teacher_prefix": None, "teacher_prefix_column": None}
    return replace(options, chat_template_kwargs=kwargs, **own)  # type: ignore[arg-type]


def as_teacher_reads(chat: Chat, kwargs: Mapping[str, Any]) -> Chat:
    """The conversation with template arguments of its own only where the option does not name them."""
    return replace(chat, template_kwargs={**chat.template_kwargs, **kwargs}) if chat.template_kwargs else chat


def rendered_twice(
    chat: Chat,
    prefixed: PrefixedChat | None,
    template: ChatTemplate,
    of_teacher: ChatTemplate,
    options: TemplateOptions,
    *,
    generated: bool = False,
) -> list[tuple[Rendered, TeacherText | None]]:
    """The texts that a conversation becomes, each with the teacher's where that is another.

    Args:
        prefixed: the conversation with what the teacher alone reads, if there is such.
        of_teacher: made by `teacher_options`.
        generated: other answers take the place of the row's: the prompts alone, where one is not whole with the answer.

    Raises:
        RowError: one of the two cannot be rendered, or the answers are not the same.
        DataError: the template has no place for the prefix of all rows.
    """
    own, option = template.render(chat), teacher_option(options)
    if prefixed and prefixed.first[0]["role"] == "system" and not of_teacher.takes_system:
        # A row's own prefix may do without; that of all rows is wrong for all of them.
        raise RowError(NO_SYSTEM) if options.teacher_prefix_column else DataError(NO_SYSTEM)
    read = as_teacher_reads(prefixed.chat if prefixed else chat, options.teacher_chat_template_kwargs or {})
    try:
        others = of_teacher.render(read)
        if len(others) < len(own):
            others = of_teacher.render(read, split=True)
    except RowError as error:
        raise RowError(f"for the teacher ({option}): {error}") from error
    if len(own) < len(others):
        own = template.render(chat, split=True)
    further = prefixed.further if prefixed else 0
    if [one.messages + further for one in own] != [other.messages for other in others]:
        raise RowError(f"{option}: {OTHER_ANSWERS}")
    pairs = list(zip(own, others, strict=True))
    if generated:
        for i, (one, other) in enumerate(pairs):
            if OTHER_PROMPT in (*one.notes, *other.notes):
                pairs[i] = template.asked(chat, one), of_teacher.asked(read, other)
    return [(one, teacher_text(chat, one, other, options.train_on, option)) for one, other in pairs]


def teacher_text(
    chat: Chat, student: Rendered, teacher: Rendered, train_on: str, option: str = OPTION
) -> TeacherText | None:
    """The student's answers in the teacher's text; None where both read the same.

    Args:
        option: what makes the texts differ, for messages.

    Raises:
        RowError: an answer is not there.
    """
    if _same(student, teacher):
        return None
    if chat.images:
        raise RowError(f"{option}: rows with images are not supported yet")
    if train_on == "all" and student.turns:
        if student.text != teacher.text:
            raise RowError(
                f"data.train_on: all supervises the prompt as well, which {option} makes another for the teacher: set "
                "data.train_on to assistant or last"
            )
        return TeacherText(teacher, frozenset())
    if len(student.turns) != len(teacher.turns):
        raise RowError(f"{option}: {OTHER_ANSWERS}")
    turns, edges, previous = [], set(), 0
    for number, (own, other) in enumerate(zip(student.turns, teacher.turns, strict=True), start=1):
        try:
            turn = _with_answer(student.text, own, teacher.text, other, previous, number)
        except RowError as error:
            raise RowError(f"{option}: {error}") from None
        if own.spans and own.spans[0][0] == own.start:
            edges.add(turn.spans[0][0])
        turns.append(turn)
        previous = turn.end
    return TeacherText(replace(teacher, turns=tuple(turns)), frozenset(edges))


def _same(student: Rendered, teacher: Rendered) -> bool:
    """Whether the texts and what is supervised of them are the same, however many messages they are made of."""
    text, other = (
        replace(one, notes=(), messages=0, turns=tuple(replace(turn, messages=0) for turn in one.turns))
        for one in (student, teacher)
    )
    return text == other


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
            f"answer {number} is not at the end of the turn that the teacher reads: for the student it has "
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


def with_teacher(row: EncodedRow, teacher: EncodedRow, option: str = OPTION) -> EncodedRow:
    """The student's row with the teacher's, unless they are the same.

    Raises:
        RowError: their supervised tokens differ.
    """
    if row.supervised_ids != teacher.supervised_ids:
        raise RowError(
            f"{option}: the answer has other tokens in the text that the teacher reads than in the student's, and "
            "distillation compares them token by token"
        )
    same_text = (row.input_ids, row.labels) == (teacher.input_ids, teacher.labels)
    if same_text and row.prompt_length == teacher.prompt_length:
        return row
    notes = (*row.notes, PROMPT_ALONE) if same_text else row.notes
    return replace(row, teacher=replace(teacher, notes=(), kd_weights=None), notes=notes)


def teacher_notes(own: tuple[str, ...], teacher: tuple[str, ...]) -> tuple[str, ...]:
    """What is to be said of the teacher's text alone."""
    return tuple(f"for the teacher: {note}" for note in teacher if note not in own)
