"""What a row may look like: turns one raw row into a conversation, a prompt/completion pair or plain text.

Nothing here knows a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdtrain.data.errors import RowError, show, type_name
from kdtrain.data.images import Image
from kdtrain.data.parts import column_images, count_images, image_part, merge_parts, place_images

# In this order: the first one that is present and not null says what kind of row it is. `messages` goes first because
# published chat sets (ultrachat_200k) repeat the first user turn in a `prompt` column.
ROW_COLUMNS = ("messages", "conversations", "prompt", "text")
IMAGE_COLUMNS = ("images", "image")
KNOWN_COLUMNS = (*ROW_COLUMNS, "completion", "tools", *IMAGE_COLUMNS)
ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {
    "user": ("human", "user"),
    "assistant": ("gpt", "assistant", "chatgpt"),
    "system": ("system",),
    "tool": ("tool", "observation"),
}
SHAREGPT_ROLES = {speaker: role for role, speakers in _SPEAKERS.items() for speaker in speakers}


@dataclass(frozen=True)
class Chat:
    """A conversation. Assistant messages before `first_trained`, and those of `untrained`, are never supervised.

    `images` are those of the messages' image parts, in order; `template_kwargs` the row's own arguments for the chat
    template; `notes` what the row says and nothing reads.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    first_trained: int = 0
    images: tuple[Image, ...] = ()
    untrained: frozenset[int] = frozenset()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def prompt_only(self) -> bool:
        return self.messages[-1]["role"] != "assistant"

    @property
    def trained(self) -> list[int]:
        """Positions of the assistant messages that may be supervised."""
        assistants = (i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        return [i for i in assistants if i >= self.first_trained and i not in self.untrained]


@dataclass(frozen=True)
class Pair:
    """Text and what follows it; without a completion, a prompt to generate from."""

    prompt: str
    completion: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlainText:
    """Text of which every token is supervised."""

    text: str
    notes: tuple[str, ...] = ()


def parse_row(row: Mapping[str, Any], folder: str | None = None) -> Chat | Pair | PlainText:
    """Checks one raw row and brings it into one of three forms.

    Rows have `messages`, `conversations` (ShareGPT), `prompt` with or without `completion`, or `text`; conversations
    also `images` or `image`. Null counts as missing and other columns are ignored. `folder` is what the paths of images
    are relative to; None refuses relative paths.
    """
    images = column_images(row)
    kind = next((column for column in ROW_COLUMNS if row.get(column) is not None), None)
    if kind is None:
        found = ", ".join(show(column, 40) for column in row) or "nothing"
        raise RowError(f"none of the columns {', '.join(ROW_COLUMNS)} has a value (found: {found})")
    parsed: Chat | Pair | PlainText
    if kind == "messages":
        parsed = Chat(_messages(row["messages"], "messages"), _tools(row))
    elif kind == "conversations":
        parsed = Chat(_messages(_from_sharegpt(row["conversations"]), "conversations"), _tools(row))
    elif kind == "text":
        parsed = PlainText(_nonempty(row["text"], "text"))
    else:
        parsed = _prompt_row(row)
    if not isinstance(parsed, Chat):
        if images:
            raise RowError("images need a conversation: give messages, or prompt and completion as lists of messages")
        return parsed
    if images or count_images(parsed.messages):
        messages, found_images, notes = place_images(parsed.messages, images, folder)
        parsed = replace(parsed, messages=messages, images=found_images, notes=parsed.notes + notes)
    return _checked(parsed)


def parse_json(text: str, columns: Mapping[str, str] | None) -> dict[str, Any]:
    """A raw row's JSON text as columns under their canonical names."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise RowError(f"invalid JSON: {show(str(error))}") from None
    except RecursionError:
        raise RowError("invalid JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object with columns, found {show(text, 40)}")
    if not columns:
        return row
    # Columns that are not mapped are not read: one may happen to have a canonical name and mean something else.
    if missing := [name for name in columns.values() if name not in row]:
        raise RowError(f"no column {', '.join(show(name, 40) for name in missing)}")
    mapped = {canonical: row[name] for canonical, name in columns.items()}
    # Images are the exception: without them the row would be trained on as text that speaks of what is not there.
    images = {name: row[name] for name in IMAGE_COLUMNS if name in row and columns.keys().isdisjoint(IMAGE_COLUMNS)}
    return {**mapped, **images}


def prompt_of(parsed: Chat | Pair | PlainText) -> Chat | Pair:
    """A row without its own answer, for another model to answer.

    A conversation ends before its last assistant message, or before its completion; one that ends with the user stays
    as it is.
    """
    if isinstance(parsed, PlainText):
        raise RowError("plain text has no prompt that a teacher could answer: give messages, or a prompt column")
    if isinstance(parsed, Pair):
        return Pair(parsed.prompt, notes=parsed.notes)
    if parsed.prompt_only:
        return parsed
    messages = parsed.messages[: parsed.first_trained or len(parsed.messages) - 1]
    if not messages:
        raise RowError("the conversation has nothing before its answer that a teacher could answer")
    cut = replace(parsed, messages=messages, first_trained=0, images=parsed.images[: count_images(messages)])
    if not cut.prompt_only:
        raise RowError("the conversation has two assistant messages at its end: which one to answer is unclear")
    return _checked(cut)


def _prompt_row(row: Mapping[str, Any]) -> Chat | Pair:
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, str):
        if completion is None:
            return Pair(_nonempty(prompt, "prompt"))
        if not isinstance(completion, str):
            found = type_name(completion)
            raise RowError(f"prompt is text, but completion is {found}: both must be text or both messages")
        return Pair(_nonempty(prompt, "prompt"), _nonempty(completion, "completion"))
    messages = _messages(prompt, "prompt")
    if completion is None:
        if messages[-1]["role"] == "assistant":
            raise RowError("prompt ends with an assistant message and there is no completion")
        return Chat(messages, _tools(row))
    if isinstance(completion, str):
        raise RowError("prompt is a list of messages, but completion is text: both must be text or both messages")
    answer = _messages(completion, "completion")
    if answer[-1]["role"] != "assistant":
        raise RowError("completion does not end with an assistant message")
    return Chat(messages + answer, _tools(row), first_trained=len(messages))


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RowError(f"{column} must be a list of messages, not {type_name(value)}")
    if not value:
        raise RowError(f"{column} is empty")
    return [_message(message, f"{column}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RowError(f"{where} must be a message with role and content, not {type_name(message)}")
    # Arrow fills the keys that other rows have with null; templates take a null for a value.
    kept = {key: value for key, value in message.items() if value is not None}
    role = kept.get("role")
    if role not in ROLES:
        problem = "no role" if role is None else f"the unknown role {show(role, 40)}"
        raise RowError(f"{where} has {problem} (known: {', '.join(ROLES)})")
    acts = role == "assistant" and (kept.get("tool_calls") or kept.get("reasoning_content"))
    if "content" not in kept and not acts:
        raise RowError(f"{where} has no content")
    content = _content(kept.get("content", ""), where)
    empty = isinstance(content, str) and not content.strip()
    if role in ("user", "assistant") and empty and not acts:
        raise RowError(f"{where} is an empty {role} message")
    return {**kept, "content": content}


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Text parts are joined without a separator, as the templates of the field that know parts render them."""
    if isinstance(content, str):
        return _unicode(content, where)
    if not isinstance(content, Sequence):
        raise RowError(f"{where}.content must be text or a list of parts, not {type_name(content)}")
    parts = []
    for part in content:
        if (image := image_part(part, where)) is not None:
            parts.append(image)
            continue
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise RowError(f"{where}.content has a part that is {type_name(text)}, not text")
        parts.append({"type": "text", "text": _unicode(text, where)})
    return merge_parts(parts)


def _from_sharegpt(turns: Any) -> Any:
    if not isinstance(turns, Sequence) or isinstance(turns, (str, bytes)):
        return turns  # refused by _messages, with its type
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
        raise RowError(f"tools must be a list of JSON schemas, not {type_name(tools)}")
    return [dict(tool) for tool in tools]


def _checked(chat: Chat) -> Chat:
    if chat.messages[-1]["role"] in ("system", "developer"):
        raise RowError("the conversation ends with a system message: there is nothing to answer")
    return chat


def _nonempty(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{column} must be text, not {type_name(value)}")
    if not value.strip():
        raise RowError(f"{column} is empty")
    return _unicode(value, column)


def _unicode(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # json.loads makes half a surrogate pair from "\ud800"; tokenizers refuse it
        raise RowError(f"{where} is not valid Unicode: half a surrogate pair at character {error.start}") from None
    return text
