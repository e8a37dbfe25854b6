"""What a row may look like: turns one raw row into a conversation, a prompt/completion pair or plain text.

Nothing here knows a tokenizer. Everything wrong with a row is a `RowError`, which the loader counts and shows; a
plain `DataError` means that no row could work (a tokenizer without a chat template), and stops the run at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdtrain.errors import DataError

# In this order: the first one that is present and not null says what kind of row it is. `messages` goes first because
# published chat sets (ultrachat_200k) repeat the first user turn in a `prompt` column.
ROW_COLUMNS = ("messages", "conversations", "prompt", "text")
KNOWN_COLUMNS = (*ROW_COLUMNS, "completion", "tools", "images", "image")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
NO_IMAGES = "images are not available yet: remove the image or take a text-only data set"


class RowError(DataError):
    """One row that cannot be trained on; the message is the reason, without the place."""


@dataclass(frozen=True)
class Chat:
    """A conversation. Assistant messages before `first_trained` are context and never supervised."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    first_trained: int = 0

    @property
    def prompt_only(self) -> bool:
        return self.messages[-1]["role"] != "assistant"

    @property
    def trained(self) -> list[int]:
        """Positions of the assistant messages that may be supervised."""
        return [
            i for i, message in enumerate(self.messages) if i >= self.first_trained and message["role"] == "assistant"
        ]


@dataclass(frozen=True)
class Pair:
    """Text and what follows it; without a completion, a prompt to generate from."""

    prompt: str
    completion: str | None = None


@dataclass(frozen=True)
class Plain:
    """Text of which every token is supervised."""

    text: str


def show(value: object, limit: int = 160) -> str:
    """One line that is safe to print: control, bidirectional and other invisible characters are escaped."""
    text = value if isinstance(value, str) else repr(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def parse_row(row: Mapping[str, Any]) -> Chat | Pair | Plain:
    """Checks one raw row and brings it into one of three forms.

    Args:
        row: `messages`, `conversations` (ShareGPT), `prompt` with or without `completion`, or `text`; null counts as
            missing and other columns are ignored.

    Raises:
        RowError: missing or empty values, wrong types, unknown roles, images.
    """
    for column in ("images", "image"):
        if row.get(column) not in (None, [], ""):
            raise RowError(NO_IMAGES)
    kind = next((column for column in ROW_COLUMNS if row.get(column) is not None), None)
    if kind is None:
        found = ", ".join(show(column, 40) for column in row) or "nothing"
        raise RowError(f"none of the columns {', '.join(ROW_COLUMNS)} has a value (found: {found})")
    if kind == "messages":
        return _checked(Chat(_messages(row["messages"], "messages"), _tools(row)))
    if kind == "conversations":
        return _checked(Chat(_messages(_from_sharegpt(row["conversations"]), "conversations"), _tools(row)))
    if kind == "text":
        return Plain(_nonempty(row["text"], "text"))
    return _prompt_row(row)


def _prompt_row(row: Mapping[str, Any]) -> Chat | Pair:
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, str):
        if completion is None:
            return Pair(_nonempty(prompt, "prompt"))
        if not isinstance(completion, str):
            raise RowError(f"prompt is text, but completion is {_kind(completion)}: both must be text or both messages")
        return Pair(_nonempty(prompt, "prompt"), _nonempty(completion, "completion"))
    messages = _messages(prompt, "prompt")
    if completion is None:
        if messages[-1]["role"] == "assistant":
            raise RowError("prompt ends with an assistant message and there is no completion")
        return _checked(Chat(messages, _tools(row)))
    if isinstance(completion, str):
        raise RowError("prompt is a list of messages, but completion is text: both must be text or both messages")
    answer = _messages(completion, "completion")
    if answer[-1]["role"] != "assistant":
        raise RowError("completion does not end with an assistant message")
    return _checked(Chat(messages + answer, _tools(row), first_trained=len(messages)))


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RowError(f"{column} must be a list of messages, not {_kind(value)}")
    if not value:
        raise RowError(f"{column} is empty")
    return [_message(message, f"{column}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowError(f"{where} must be a message with role and content, not {_kind(message)}")
    # Arrow fills the keys that other rows have with null; templates take a null for a value.
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if role not in ROLES:
        problem = "no role" if role is None else f"the unknown role {show(role, 40)}"
        raise RowError(f"{where} has {problem} (known: {', '.join(ROLES)})")
    speaks_otherwise = role == "assistant" and (kept.get("tool_calls") or kept.get("reasoning_content"))
    if "content" not in kept and not speaks_otherwise:
        raise RowError(f"{where} has no content")
    content = _content(kept.get("content", ""), where)
    if role in ("user", "assistant") and not content.strip() and not speaks_otherwise:
        raise RowError(f"{where} is an empty {role} message")
    return {**kept, "content": content}


def _content(content: Any, where: str) -> str:
    """Text parts are joined without a separator, as the templates of the field that know parts render them."""
    if isinstance(content, str):
        return _unicode(content, where)
    if not isinstance(content, Sequence):
        raise RowError(f"{where}.content must be text or a list of parts, not {_kind(content)}")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            kind = show(part.get("type"), 40)
            raise RowError(NO_IMAGES if "image" in kind else f"{where}.content has a part of the unknown type {kind}")
        if not isinstance(text, str):
            raise RowError(f"{where}.content has a part that is {_kind(text)}, not text")
        texts.append(text)
    return _unicode("".join(texts), where)


def _from_sharegpt(turns: Any) -> Any:
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)):
        return turns  # _messages names the type
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or "from" not in turn:
            messages.append(turn)  # some sets call the column `conversations` and use role/content all the same
            continue
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise RowError(f"conversations[{i}] is from the unknown speaker {show(speaker, 40)} (known: {known})")
        messages.append({"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")})
    return messages


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # published tool sets store the schemas as JSON text, since Arrow wants one type
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise RowError(f"tools is not valid JSON: {show(str(error))}") from error
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RowError(f"tools must be a list of JSON schemas, not {_kind(tools)}")
    return [dict(tool) for tool in tools]


def _checked(chat: Chat) -> Chat:
    if chat.messages[-1]["role"] in ("system", "developer"):
        raise RowError("the conversation ends with a system message: there is nothing to answer")
    return chat


def _nonempty(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{column} must be text, not {_kind(value)}")
    if not value.strip():
        raise RowError(f"{column} is empty")
    return _unicode(value, column)


def _unicode(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # json.loads makes half a surrogate pair from "\ud800"; tokenizers refuse it
        raise RowError(f"{where} is not valid Unicode: half a surrogate pair at character {error.start}") from None
    return text


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "text", dict: "a mapping"}
    return names.get(type(value), "a list" if isinstance(value, (list, tuple)) else type(value).__name__)
