"""Rows as a teacher with another tokenizer reads them: its own chat template, its own tokens, the student's answers.

    row                                              ids of the student, and its conversation
      -> the teacher's template and tokenizer        ids of the teacher
      -> answer by answer (`byte_alignment.align`)   the chunk of each token of both

Of an answer that the student writes while training, the bytes of its tokens are the text that the teacher reads behind
its own prompt. What ends a turn stands for what ends a turn, whatever its text; so does no BOS for a BOS.

Shapes: B rows, T positions of the student, T' of the teacher.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from kdtrain.data.aligned_batch import AlignedRow, with_aligned
from kdtrain.data.batch import Batch
from kdtrain.data.byte_alignment import NONE, TokenBytes, align
from kdtrain.data.chat_template import TemplateOptions
from kdtrain.data.encoded_row import EncodedRow
from kdtrain.data.encoder import RowEncoder
from kdtrain.data.errors import RowError, show
from kdtrain.data.tokens import behind_another, tokenize
from kdtrain.errors import DataError

OPTION = "rlhf.cross_tokenizer"
LEAST_SHARE = 0.5
"""Of an answer's bytes that lie in chunks; a row of the data with less is an error."""

_QUESTION, _ANSWER = "How many?", "Exactly two."


@dataclass(frozen=True)
class _Answer:
    """A run of supervised tokens."""

    start: int
    tokens: list[bytes]
    end: int | None
    """Position of the token that ends the turn."""

    @property
    def text(self) -> bytes:
        return b"".join(self.tokens)


@dataclass(frozen=True)
class _Turn:
    """What a template writes around an answer."""

    lead: list[int]
    """Between the generation prompt and the answer, such as an empty block of reasoning."""
    end: int | None
    """The token behind it."""


class _Side:
    """What is known of one of the two tokenizers."""

    def __init__(self, processing_class: Any, options: TemplateOptions) -> None:
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.bytes = TokenBytes(self.tokenizer)
        self.stops = {self.tokenizer.eos_token_id} - {None}
        self.has_template = bool(self.tokenizer.chat_template or getattr(processing_class, "chat_template", None))
        self.encoder = RowEncoder(processing_class, **vars(options))
        if self.has_template:
            self.stops |= self.encoder.template().stop_ids

    @cached_property
    def turn(self) -> _Turn:
        """Found by an answer that is known; of text without a template nothing stands in front of it."""
        if not self.has_template:
            return _Turn([], self.tokenizer.eos_token_id)
        chat = {"messages": [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]}
        (encoded,) = self.encoder.encode([chat], [None])
        if isinstance(encoded, RowError):
            raise DataError(f"{OPTION}: a chat template cannot be used: {encoded}")
        ids = encoded[-1].input_ids
        answer = self.answers(ids, encoded[-1].labels)[-1]
        ends = list(accumulate(map(len, answer.tokens), initial=0))
        before = answer.text.find(_ANSWER.encode())
        lead = ends.index(before) if before in ends else 0
        return _Turn(ids[answer.start : answer.start + lead], None if answer.end is None else ids[answer.end])

    def without_lead(self, answer: _Answer, ids: Sequence[int]) -> _Answer:
        """An answer of a chat without what the template has written in front of it."""
        lead = self.turn.lead
        if not lead or list(ids[answer.start : answer.start + len(lead)]) != lead:
            return answer
        return replace(answer, start=answer.start + len(lead), tokens=answer.tokens[len(lead) :])

    def answers(self, ids: Sequence[int], labels: Sequence[int]) -> list[_Answer]:
        """The runs of supervised tokens, in order."""
        found, start = list[_Answer](), None
        for position, label in enumerate([*labels, NONE]):
            if label != NONE and start is None:
                start = position
            elif label == NONE and start is not None:
                found.append(self._answer(ids, start, position))
                start = None
        return found

    def _answer(self, ids: Sequence[int], start: int, behind: int) -> _Answer:
        """White space behind what ends a turn is the template's."""
        tokens = self.bytes(ids[start:behind])
        last = len(tokens) - 1
        while last >= 0 and ids[start + last] not in self.stops and not tokens[last].strip():
            last -= 1
        if last >= 0 and ids[start + last] in self.stops:
            return _Answer(start, tokens[:last], start + last)
        return _Answer(start, tokens, None)


class OtherTokenizer:
    """Makes the teacher's tokens of rows, and the chunks that both have in common.

    Args:
        student, teacher: their tokenizers, or processors around them.
        options: how the student's conversations are rendered.
        chat_template_kwargs: the teacher's own arguments, over those of the student.

    Raises:
        DataError: a tokenizer that does not keep every byte, or a template that cannot be used.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        options: TemplateOptions | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        own = options or TemplateOptions()
        self._kwargs = dict(chat_template_kwargs or {})
        template = getattr(teacher, "chat_template", None) or getattr(teacher, "tokenizer", teacher).chat_template or ""
        # Arguments that a template does not know are refused by it, and the student's are of another one.
        known = {name: value for name, value in (own.chat_template_kwargs or {}).items() if name in str(template)}
        cleared = dict.fromkeys(("teacher_chat_template_kwargs", "teacher_prefix", "teacher_prefix_column"))
        own = replace(own, **cleared, turns="auto", train_on="assistant")  # type: ignore[arg-type]
        read = replace(own, chat_template_kwargs=known | self._kwargs)
        self._student, self._teacher, self._template_text = _Side(student, own), _Side(teacher, read), str(template)
        self._composes = "NFC" in str(json.loads(self._student.tokenizer.backend_tokenizer.to_str())["normalizer"])

    # ---- rows of the data --------------------------------------------------------------------------------------------

    def aligned(self, batch: Batch, rows: Sequence[EncodedRow], multiple: int | None) -> Batch:
        """See `Aligner.aligned` and `read`."""
        names = [batch.rows.name(row) for row in range(len(batch))]
        return with_aligned(batch, self.read(rows, batch.rows.chats, names), multiple)

    def read(self, rows: Sequence[EncodedRow], chats: Sequence[str | None], names: Sequence[str]) -> list[AlignedRow]:
        """The rows as both read them.

        Args:
            rows: as the student's tokenizer encodes them, perhaps cut.
            chats: their conversations, as of conversation.py; None of plain text.

        Raises:
            DataError: the teacher's template cannot render a row, or less than half of a row's answers is aligned.
        """
        given = [self._as_given(row, chat) for row, chat in zip(rows, chats, strict=True)]
        found = []
        for row, encoded, name in zip(
            rows, self._teacher.encoder.encode(given, [None] * len(given)), names, strict=True
        ):
            if row.images:
                raise DataError(f"row {name} has images: {OPTION} is for text alone. Leave such rows out.")
            if isinstance(encoded, RowError):
                raise DataError(f"row {name} cannot be read by the teacher ({OPTION}): {encoded}")
            found.append(self._aligned(row, encoded[-1], name))
        return found

    def _as_given(self, row: EncodedRow, chat: str | None) -> dict[str, Any]:
        """The row as a data set would have it."""
        if chat is None:
            ids = row.input_ids
            skipped = self._student.stops | {self._student.tokenizer.bos_token_id}
            text = b"".join(self._student.bytes([i for i in ids if i not in skipped]))
            return {"text": text.decode("utf-8", "ignore")}
        if self._composes:  # as the student's tokens are
            chat = json.dumps(_composed(json.loads(chat)))
        read = json.loads(chat)
        if "messages" not in read:
            return {name: text for name, text in read.items() if text is not None}
        kwargs = {
            name: value for name, value in read.pop("chat_template_kwargs").items() if name in self._template_text
        }
        return {name: value for name, value in read.items() if value is not None} | {
            "chat_template_kwargs": kwargs | self._kwargs
        }

    def _aligned(self, row: EncodedRow, teacher: EncodedRow, name: str) -> AlignedRow:
        own = self._student.answers(row.input_ids, row.labels)
        other = self._teacher.answers(teacher.input_ids, teacher.labels)
        if teacher.kind == "chat":
            own = [self._student.without_lead(answer, row.input_ids) for answer in own]
            other = [self._teacher.without_lead(answer, teacher.input_ids) for answer in other]
        chunks, of_teacher = [NONE] * len(row.input_ids), [NONE] * len(teacher.input_ids)
        count = aligned = 0
        for mine, theirs in _pairs(own, other):
            found = align(mine.tokens, theirs.tokens)
            chunks[mine.start : mine.start + len(found.student)] = _shifted(found.student, count)
            of_teacher[theirs.start : theirs.start + len(found.teacher)] = _shifted(found.teacher, count)
            count, aligned = count + found.chunks, aligned + found.covered
            if mine.end is not None and theirs.end is not None:
                chunks[mine.end] = of_teacher[theirs.end] = count
                count += 1
        length = sum(len(answer.text) for answer in own)
        if aligned < LEAST_SHARE * length:
            raise DataError(_far_apart(name, own, other, aligned, length))
        last = max((i for i, chunk in enumerate(of_teacher) if chunk != NONE), default=-1) + 1
        end = max(last, teacher.prompt_length)
        return AlignedRow(chunks, teacher.input_ids[:end], of_teacher[:end], teacher.prompt_length, aligned, length)

    # ---- what the student writes -------------------------------------------------------------------------------------

    def behind_prompt(self, prompt: Sequence[int], written: Sequence[int], start: int, *, chat: bool) -> AlignedRow:
        """What the student wrote behind the teacher's prompt.

        Bytes that are no UTF-8 end what the teacher reads: they and what follows are in no chunk.

        Args:
            written: the student's tokens.
            start: their first position in its row.
            chat: whether the prompt is a conversation, whose turns end as its template says.
        """
        ended = bool(written) and written[-1] in self._student.stops
        answer = _Answer(0, self._student.bytes(written[: len(written) - ended]), None)
        turn = self._teacher.turn if chat else _Turn([], self._teacher.tokenizer.eos_token_id)
        if chat:
            answer = self._student.without_lead(answer, written)
        tokens, start, lead, end = answer.tokens, start + answer.start, turn.lead, turn.end
        text, whole = _readable(answer.text)
        ids = self._tokens(text)
        found = align(tokens, self._teacher.bytes(ids))
        first = len(prompt) + len(lead)
        row = [*prompt, *lead, *ids]
        of_teacher = [*[NONE] * first, *found.teacher]
        chunks = [*[NONE] * start, *found.student, *[NONE] * ended]
        if ended and whole and end is not None:
            chunks[-1] = found.chunks
            row, of_teacher = [*row, end], [*of_teacher, found.chunks]
        return AlignedRow(chunks, row, of_teacher, len(prompt), found.covered, sum(map(len, tokens)))

    def _tokens(self, text: str) -> list[int]:
        """A text behind a prompt; what looks like a special token is text, for the student wrote it as such."""
        if not text:
            return []
        tokenizer, backend = self._teacher.tokenizer, self._teacher.tokenizer.backend_tokenizer
        as_it_was, tokenizer.split_special_tokens = tokenizer.split_special_tokens, True
        try:
            (tokens,) = tokenize(tokenizer, [text])
            if tokens.begins_with_a_space_of_its_own:
                tokens = behind_another(tokenizer, text)
        finally:
            tokenizer.split_special_tokens = backend.encode_special_tokens = as_it_was
        return list(tokens.ids)

    def with_completions(self, batch: Batch, prompts: Sequence[Sequence[int]], written: Sequence[list[int]]) -> Batch:
        """A batch that has these answers already, with the teacher's tokens of them.

        Args:
            prompts: the teacher's.
        """
        lengths = batch.rows.prompt_lengths
        assert lengths is not None
        chats = [json.loads(chat) if chat else {} for chat in batch.rows.chats or [None] * len(batch)]
        rows = [
            self.behind_prompt(prompt, answer, start, chat="messages" in chat)
            for prompt, answer, start, chat in zip(prompts, written, lengths.tolist(), chats, strict=True)
        ]
        return with_aligned(batch, rows)


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _pairs(own: Sequence[_Answer], other: Sequence[_Answer]) -> list[tuple[_Answer, _Answer]]:
    """The answers that belong together, from the last one on.

    The teacher's text may have more: a row of one turn alone has the others as context, and messages whose loss is
    switched off are answers to it as well.
    """
    if len(own) == len(other):
        return list(zip(own, other, strict=True))
    found, left = list[tuple[_Answer, _Answer]](), list(other)
    for mine in reversed(own):
        same = [i for i, theirs in enumerate(left) if theirs.text == mine.text]
        if not left:
            break
        at = same[-1] if same else len(left) - 1
        found.append((mine, left[at]))
        left = left[:at]
    return found[::-1]


def _shifted(chunks: Sequence[int], by: int) -> list[int]:
    return [chunk if chunk == NONE else chunk + by for chunk in chunks]


def _readable(text: bytes) -> tuple[str, bool]:
    """The text up to the first byte that is no UTF-8, and whether that is all of it."""
    try:
        return text.decode(), True
    except UnicodeDecodeError as error:
        return text[: error.start].decode(), False


def _composed(value: Any) -> Any:
    """Texts in the normal form NFC, which some tokenizers bring them to."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [_composed(one) for one in value]
    return {name: _composed(one) for name, one in value.items()} if isinstance(value, dict) else value


def _far_apart(name: str, own: Sequence[_Answer], other: Sequence[_Answer], aligned: int, length: int) -> str:
    shown = [show(b"".join(answer.text for answer in side).decode("utf-8", "replace"), 80) for side in (own, other)]
    return (
        f"row {name}: {aligned} of the {length} bytes of its answer are the same text for student and teacher, less "
        f"than half ({OPTION}): the student reads {shown[0]}, the teacher's chat template writes {shown[1]}. Give both "
        "the same (chat_template_kwargs, data.reasoning, data.turns: split), or leave the row out."
    )
