"""What a row may look like: turns one raw row into a conversation, a prompt/completion pair or plain text.

Nothing here knows a tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from kdtrain.data.columns import CONTEXT_COLUMNS, ROW_COLUMNS, check_preference, unread_columns, unread_note
from kdtrain.data.context import read_system, read_template_kwargs, read_tools
from kdtrain.data.errors import RowError, show, type_name
from kdtrain.data.images import Image
from kdtrain.data.instructions import instruction_messages, query_messages
from kdtrain.data.kd_weights import WEIGHT, read_weight
from kdtrain.data.parts import column_images, count_images, place_images, texts_of
from kdtrain.data.turns import Message, Turns, blank, nonempty, read_messages


@dataclass(frozen=True)
class Chat:
    """A conversation. Assistant messages before `first_trained`, and those of `untrained`, are never supervised.

    `images` are those of the messages' image parts, in order; `template_kwargs` the row's own arguments for the chat
    template; `notes` what the row says and nothing reads; `unknown_keys` those of messages, which a template may read;
    `kd_weight` what its divergence counts, times `message_weights` of single assistant messages.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    first_trained: int = 0
    images: tuple[Image, ...] = ()
    untrained: frozenset[int] = frozenset()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    unknown_keys: tuple[str, ...] = ()
    kd_weight: float = 1.0
    message_weights: Mapping[int, float] = field(default_factory=dict)

    @property
    def prompt_only(self) -> bool:
        return self.messages[-1]["role"] != "assistant"

    @cached_property
    def trained(self) -> list[int]:
        """Positions of the assistant messages that may be supervised."""
        assistants = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        return [i for i in assistants if i >= self.first_trained and i not in self.untrained]

    def noting_keys(self, template: str) -> Chat:
        """With notes of the messages' keys that are unknown here and that the text of a template does not name."""
        named = r"\.{0}\b|[\['\"(]{0}['\"]"
        unread = (key for key in self.unknown_keys if not re.search(named.format(re.escape(key)), template))
        notes = (f"messages have the key {show(key, 40)}, which is not read" for key in unread)
        return replace(self, notes=(*self.notes, *notes), unknown_keys=())


@dataclass(frozen=True)
class Pair:
    """Text and what follows it; without a completion, a prompt to generate from."""

    prompt: str
    completion: str | None = None
    notes: tuple[str, ...] = ()
    kd_weight: float = 1.0


@dataclass(frozen=True)
class PlainText:
    """Text of which every token is supervised."""

    text: str
    notes: tuple[str, ...] = ()
    kd_weight: float = 1.0


def parse_row(row: Mapping[str, Any], folder: str | None = None) -> Chat | Pair | PlainText:
    """Checks one raw row and brings it into one of three forms.

    Rows have `messages`, `conversations` (ShareGPT), `prompt` with or without `completion`, `instruction` (Alpaca,
    Dolly) or `query` (ms-swift), or `text`. Conversations also have the columns of `CONTEXT_COLUMNS`, and `images` or
    `image`; all of them may have `kd_weight`. Null counts as missing, and columns that mean nothing here are ignored.
    `folder` is what the paths of images are relative to; None refuses relative paths.
    """
    images = column_images(row)
    kind = _kind(row)
    parsed = _read(row, kind)
    if isinstance(parsed, Chat):
        if images or count_images(parsed.messages):
            messages, found_images, notes = place_images(parsed.messages, images, folder)
            parsed = replace(parsed, messages=messages, images=found_images, notes=parsed.notes + notes)
        _check(parsed)
    elif images:
        raise RowError("images need a conversation: give messages, or prompt and completion as lists of messages")
    else:
        parsed = _without_context(parsed, row)
    parsed = _with_notes(parsed, row, kind)
    weight = read_weight(row.get(WEIGHT))
    return parsed if weight == 1 else replace(parsed, kd_weight=weight)


def asked_in(row: Mapping[str, Any]) -> Chat | Pair:
    """What a teacher is asked, of a raw row's text and context alone: its images are not looked for."""
    return prompt_of(_read(row, _kind(row)))


def _kind(row: Mapping[str, Any]) -> str:
    kind = next((column for column in ROW_COLUMNS if row.get(column) is not None), None)
    if kind is None:
        found = ", ".join(show(column, 40) for column in row) or "nothing"
        raise RowError(f"none of the columns {', '.join(ROW_COLUMNS)} has a value (found: {found})")
    return kind


def _read(row: Mapping[str, Any], kind: str) -> Chat | Pair | PlainText:
    parsed = _READERS[kind](row)
    return _with_context(parsed, row) if isinstance(parsed, Chat) else parsed


def prompt_of(parsed: Chat | Pair | PlainText) -> Chat | Pair:
    """A row without its own answer, for another model to answer.

    A conversation ends before the last assistant message that may be trained on, or before its completion; one that
    ends with the user stays as it is.
    """
    if isinstance(parsed, PlainText):
        raise RowError("plain text has no prompt that a teacher could answer: give messages, or a prompt column")
    if isinstance(parsed, Pair):
        return replace(parsed, completion=None)
    if parsed.prompt_only:
        return parsed
    cut = _first_messages(parsed, parsed.trained[0 if parsed.first_trained else -1])
    if not cut.messages:
        raise RowError("the conversation has nothing before its answer that a teacher could answer")
    if not cut.prompt_only:
        raise RowError("the conversation has two assistant messages at its end: which one to answer is unclear")
    _check(cut)
    return replace(cut, first_trained=0)


def answered(parsed: Chat | Pair | PlainText) -> Chat | Pair | PlainText:
    """A row for runs that cannot use a prompt: what follows the last answer is left out, and there has to be one."""
    if _has_answer(parsed):
        return parsed
    if not isinstance(parsed, Chat) or not parsed.trained:
        off = isinstance(parsed, Chat) and parsed.untrained
        raise RowError("; ".join([_ALL_OFF if off else _NO_ANSWER, *parsed.notes]))
    last = max(i for i, message in enumerate(parsed.messages) if message["role"] == "assistant")
    note = "what follows the last answer of a conversation is left out"
    return replace(_first_messages(parsed, last + 1), notes=(*parsed.notes, note))


def _first_messages(chat: Chat, count: int) -> Chat:
    messages = chat.messages[:count]
    return replace(
        chat,
        messages=messages,
        untrained=frozenset(i for i in chat.untrained if i < count),
        message_weights={i: weight for i, weight in chat.message_weights.items() if i < count},
        images=chat.images[: count_images(messages)],
    )


def _chat(turns: Turns, first_trained: int = 0) -> Chat:
    return Chat(
        turns.messages,
        first_trained=first_trained,
        untrained=turns.untrained,
        notes=turns.notes,
        unknown_keys=turns.unknown_keys,
        message_weights=turns.weights,
    )


def _prompt_row(row: Mapping[str, Any]) -> Chat | Pair:
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, str):
        if completion is None:
            return Pair(nonempty(prompt, "prompt"))
        if not isinstance(completion, str):
            found = type_name(completion)
            raise RowError(f"prompt is text, but completion is {found}: both must be text or both messages")
        return Pair(nonempty(prompt, "prompt"), nonempty(completion, "completion"))
    asked = read_messages(prompt, "prompt")
    count = len(asked.messages)
    if asked.switched_on or asked.weights:
        note = "a message of prompt says that it is trained on, which is not read: only the completion is"
        asked = replace(asked, notes=(*asked.notes, note), weights={})
    if completion is None:
        if asked.messages[-1]["role"] == "assistant":
            raise RowError("prompt ends with an assistant message and there is no completion")
        return _chat(asked, first_trained=count)
    if isinstance(completion, str):
        raise RowError("prompt is a list of messages, but completion is text: both must be text or both messages")
    answer = read_messages(completion, "completion")
    if answer.messages[-1]["role"] != "assistant":
        raise RowError("completion does not end with an assistant message")
    whole = Turns(
        asked.messages + answer.messages,
        asked.untrained | {count + i for i in answer.untrained},
        weights={count + i: weight for i, weight in answer.weights.items()},
        notes=(*asked.notes, *answer.notes),
        unknown_keys=tuple(dict.fromkeys([*asked.unknown_keys, *answer.unknown_keys])),
    )
    return _chat(whole, first_trained=count)


def _text_row(row: Mapping[str, Any]) -> PlainText:
    return PlainText(nonempty(row["text"], "text"))


_READERS: dict[str, Callable[[Mapping[str, Any]], Chat | Pair | PlainText]] = {
    "messages": lambda row: _chat(read_messages(row["messages"], "messages")),
    "conversations": lambda row: _chat(read_messages(row["conversations"], "conversations")),
    "prompt": _prompt_row,
    "instruction": lambda row: Chat(instruction_messages(row)),
    "query": lambda row: Chat(query_messages(row)),
    "text": _text_row,
}


def _with_context(chat: Chat, row: Mapping[str, Any]) -> Chat:
    """The conversation with what the columns beside it say."""
    if all(row.get(column) is None for column in CONTEXT_COLUMNS):
        return chat
    chat = replace(chat, tools=read_tools(row)[1] or None, template_kwargs=read_template_kwargs(row))
    column, system = read_system(row)
    first = chat.messages[0]
    if not system or (first["role"] in ("system", "developer") and _same(first["content"], system)):
        return chat
    if first["role"] == "system":
        raise RowError(
            f"the column {column} and the system message have different texts: keep one of them (columns: "
            f"{{{column}: null}} leaves the column out)"
        )
    return replace(
        chat,
        messages=[{"role": "system", "content": system}, *chat.messages],
        first_trained=chat.first_trained and chat.first_trained + 1,
        untrained=frozenset(i + 1 for i in chat.untrained),
        message_weights={i + 1: weight for i, weight in chat.message_weights.items()},
    )


def _same(content: Any, text: str) -> bool:
    return isinstance(content, str) and content.strip() == text.strip()


def _without_context(parsed: Pair | PlainText, row: Mapping[str, Any]) -> Pair | PlainText:
    """Text gets no chat template, which alone could write what stands beside it, but may say it already."""
    if isinstance(parsed, PlainText) or row.keys().isdisjoint(CONTEXT_COLUMNS):
        return parsed
    (system_column, system), (tools_column, tools) = read_system(row), read_tools(row)
    lost = system_column if system not in parsed.prompt else tools_column if tools else ""
    if lost:
        raise RowError(
            f"{lost} beside a prompt that is text and gets no chat template: give prompt and completion as lists of "
            f"messages, map them so that they become one (columns: {{instruction: prompt, output: completion, {lost}: "
            f"{lost}}}), or say that it is not to be read (columns: {{{lost}: null}})"
        )
    if blank(row.get("chat_template_kwargs")):
        return parsed
    return replace(parsed, notes=("chat_template_kwargs is not read beside a prompt that is text",))


def _with_notes(parsed: Chat | Pair | PlainText, row: Mapping[str, Any], kind: str) -> Chat | Pair | PlainText:
    has_answer = _has_answer(parsed)
    check_preference(row, kind, has_answer)
    columns = unread_columns(row, kind)
    if not columns:
        return parsed
    text = _text_of(parsed)
    notes = [unread_note(row[column], column, kind, text, has_answer) for column in columns]
    return replace(parsed, notes=(*parsed.notes, *(note for note in notes if note)))


def _has_answer(parsed: Chat | Pair | PlainText) -> bool:
    if isinstance(parsed, Chat):
        return not parsed.prompt_only
    return isinstance(parsed, PlainText) or parsed.completion is not None


def _text_of(parsed: Chat | Pair | PlainText) -> str:
    if isinstance(parsed, PlainText):
        return parsed.text
    if isinstance(parsed, Pair):
        return f"{parsed.prompt}\n{parsed.completion}"
    said = [text for message in parsed.messages for text in texts_of(message["content"])]
    return "\n".join([*said, *(message.get("reasoning_content", "") for message in parsed.messages)])


def _check(chat: Chat) -> None:
    if chat.messages[-1]["role"] in ("system", "developer"):
        raise RowError("the conversation ends with a system message: there is nothing to answer")
    if chat.untrained and not chat.prompt_only and not chat.trained:
        raise RowError(_ALL_OFF)


_ALL_OFF = "no turn is trained on: every answer says that it is not (weight, loss, loss_mask, train or trainable)"
_NO_ANSWER = (
    "there is no answer: give one, or let the teacher write it (data.train: {path: …, answers: teacher}). Prompts "
    "alone are enough only in data.train, and where all training is on generated answers (rlhf.lmbda: 1 or "
    "rlhf.seq_kd: true)"
)
