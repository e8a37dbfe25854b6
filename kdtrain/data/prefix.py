"""`rlhf.teacher.prefix`: messages that the teacher alone reads (context distillation).

    prepend   system of the row + "\n\n" + system of the prefix, the prefix's other messages, the conversation
    system    the prefix, the conversation without its own system message

A system message of the prefix and one of the row become one: most chat templates refuse a second one or leave it out.
A system prompt that a template writes by itself where there is none (Qwen2.5) gives way to the prefix's, as it gives
way to a row's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdtrain.data.errors import RowError, show, type_name
from kdtrain.data.rows import Chat, Pair, PlainText
from kdtrain.data.turns import Message, blank, from_json, is_list, nonempty, read_messages

OPTION = "rlhf.teacher.prefix"
PREFIX_MODES = ("prepend", "system")
SYSTEM = ("system", "developer")
_NO_CHAT = f"{OPTION}: the row is text and gets no chat template, which alone can write the teacher's messages"
_AS_MESSAGES = (
    "give prompt and completion as lists of messages, or make messages of them (columns: {instruction: prompt, output: "
    "completion})"
)
NO_SYSTEM = (
    f"{OPTION} begins with a system message, and the chat template has none: give its text as a user message with an "
    'answer behind it, [{role: user, content: "…"}, {role: assistant, content: "…"}]'
)


@dataclass(frozen=True)
class PrefixedChat:
    """A conversation as the teacher reads it: `first` in place of the first `skips` messages of the student's."""

    chat: Chat
    first: Sequence[Message]
    skips: int

    @property
    def further(self) -> int:
        """By how many messages it is longer than the student's."""
        return len(self.first) - self.skips


def row_prefix(value: Any, column: str, default: Sequence[Message] | None) -> Sequence[Message]:
    """The prefix in a row's column: text (one system message), a list of messages or its JSON text; else the default.

    Raises:
        RowError: neither is there, or no messages that can stand in front of a conversation.
    """
    if blank(value):
        if default is None:
            raise RowError(f"{OPTION}: the column {show(column, 40)} has no value here, and there is no default")
        return default
    where = f"{OPTION}: the column {show(column, 40)}"
    if isinstance(value, str) and not _is_json_list(value):
        return [{"role": "system", "content": nonempty(value, where)}]
    if not isinstance(value, str) and not is_list(value) and not isinstance(value, Mapping):
        raise RowError(f"{where} must be text or a list of messages, not {type_name(value)}")
    messages = read_messages(value, where).messages
    for i, message in enumerate(messages):
        if not isinstance(message["content"], str):
            raise RowError(f"{where}[{i}] has an image: the prefix is text")
        if i and message["role"] in SYSTEM:
            raise RowError(f"{where}[{i}] has the role {message['role']}, which only the first message can have")
    return messages


def refuse_text(parsed: Pair | PlainText) -> None:
    """Raises RowError: there is no conversation for the prefix to stand in."""
    raise RowError(f"{_NO_CHAT}: {_AS_MESSAGES if isinstance(parsed, Pair) else 'give messages'}")


def _is_json_list(text: str) -> bool:
    """Whether a table's cell holds messages, and no text that begins with a bracket."""
    if not text.lstrip().startswith("["):
        return False
    try:
        found = from_json(text, OPTION)
    except RowError:
        return False
    return isinstance(found, list) and bool(found) and all(isinstance(one, Mapping) for one in found)


def with_prefix(chat: Chat, prefix: Sequence[Message], mode: str) -> PrefixedChat:
    """The conversation with the messages that the teacher alone reads; none of them is trained on.

    Raises:
        RowError: `mode` is system, and the prefix has no system message.
    """
    begins, own = prefix[0]["role"] in SYSTEM, chat.messages[0]["role"] in SYSTEM
    if mode == "system" and not begins:
        raise RowError(
            f"{OPTION} begins with a {prefix[0]['role']} message, and rlhf.teacher.prefix_mode: system puts its system "
            "message in place of the row's: begin it with one, or set prefix_mode: prepend"
        )
    first = list(prefix)
    if own and mode == "prepend":
        first = [_joined(chat.messages[0], prefix[0]), *prefix[1:]] if begins else [chat.messages[0], *prefix]
    skips = 1 if own else 0
    further = len(first) - skips
    answers = {i for i, message in enumerate(first) if message["role"] == "assistant"}
    read = replace(
        chat,
        messages=[*first, *chat.messages[skips:]],
        first_trained=chat.first_trained and chat.first_trained + further,
        untrained=frozenset(answers | {i + further for i in chat.untrained}),
        message_weights={i + further: weight for i, weight in chat.message_weights.items()},
    )
    return PrefixedChat(read, first, skips)


def _joined(own: Message, more: Message) -> Message:
    """One system message that says both, with a blank line between."""
    content = own["content"]
    if not isinstance(content, str):
        return {**own, "content": [*content, {"type": "text", "text": f"\n\n{more['content']}"}]}
    return {**own, "content": f"{content}\n\n{more['content']}" if content.strip() else more["content"]}
