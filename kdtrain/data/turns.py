"""Messages as data sets write them, brought to one form: role, content, tool calls, reasoning, what is trained on.

A message of `Turns` has `role` and `content`; where the row says so `tool_calls`, whose `function.arguments` are a
mapping, `reasoning_content`, `name` and `tool_call_id`; and keys that are unknown here, which a chat template may read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdtrain.data.errors import RowError, show, type_name
from kdtrain.data.kd_weights import WEIGHT, read_weight, refuse_in_part
from kdtrain.data.parts import image_part, merge_parts

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# What a message may say about its loss: 0 or false is an answer that is context only. Of OpenAI, Mistral and together
# (weight), ms-swift (loss), LLaMA-Factory (loss_mask), axolotl (train) and verl (trainable).
SWITCHES = ("weight", "loss", "loss_mask", "train", "trainable")
_LOSS = (*SWITCHES, WEIGHT)  # no part of a message's text
REASONING = ("reasoning_content", "reasoning", "thinking")

_CALL = "function_call"  # a turn whose content is the call as JSON text
_ROLES = {
    **{role: role for role in ROLES},
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": _CALL,
    "tool_call": _CALL,
}
SPEAKERS = {**_ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_MEANT = {**SPEAKERS, "model": "assistant", "bot": "assistant", "ai": "assistant", "prompter": "user"}
_PLAIN = frozenset(("role", "content"))
_READ = {*_PLAIN, "name", "tool_call_id", "tool_calls", "function_call", *REASONING}
_MEDIA = ("image", "images", "image_url", "video", "videos", "video_url", "audio", "audios")
_IDS = frozenset(("id", "uuid", "message_id", "parent_id"))  # mean nothing to a model


@dataclass(frozen=True)
class Turns:
    """Messages, and what they say beside their text."""

    messages: list[Message]
    untrained: frozenset[int] = frozenset()  # assistant messages whose loss is switched off
    switched_on: bool = False  # an assistant message says that it is trained on
    weights: Mapping[int, float] = field(default_factory=dict)  # in the divergence, of assistant messages, but for 1
    notes: tuple[str, ...] = ()
    unknown_keys: tuple[str, ...] = ()


def read_messages(value: Any, column: str) -> Turns:
    """Checks the messages of one column: a list, the same as JSON text, or a mapping of lists (one per key)."""
    messages: list[Message] = []
    untrained: set[int] = set()
    weights: dict[int, float] = {}
    switched_on, after_call = False, False
    notes: dict[str, None] = {}
    unknown: dict[str, None] = {}
    for i, raw in enumerate(_listed(value, column)):
        where = f"{column}[{i}]"
        message, others = _message(raw, where)
        is_call = "tool_calls" in message and _is_call(raw) and not others
        if is_call and after_call:  # at inference these are several calls of one message
            messages[-1]["tool_calls"] += message["tool_calls"]
            continue
        after_call = is_call
        messages.append(message)
        if not others:
            continue
        switch, key = _switch(others, where)
        weight = read_weight(others.get(WEIGHT), f"{where}.{WEIGHT}")
        if message["role"] == "assistant":
            switched_on = switched_on or switch is True
            untrained.update([len(messages) - 1] if switch is False else [])
            weights.update({len(messages) - 1: weight} if weight != 1 else {})
        elif switch or weight != 1:
            key = key if switch else WEIGHT
            notes[f"a {message['role']} message has {key}, which is not read: only answers are trained on"] = None
        unknown.update(dict.fromkeys(key for key in others if key not in _LOSS))
    return Turns(messages, frozenset(untrained), switched_on, weights, tuple(notes), tuple(unknown))


def blank(value: Any) -> bool:
    """Null, white space, or a list or mapping of nothing: what tables fill in where a row says nothing."""
    return (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, (list, tuple, Mapping)) and not value)
    )


def from_json(value: Any, where: str) -> Any:
    """The value that JSON text holds, and any other value as it is; None for text without one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where} is not valid JSON: {show(str(error))}") from None


def is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def valid_unicode(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # json.loads makes half a surrogate pair from "\ud800"; tokenizers refuse it
        raise RowError(f"{where} is not valid Unicode: half a surrogate pair at character {error.start}") from None
    return text


def nonempty(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{column} must be text, not {type_name(value)}")
    if not value.strip():
        raise RowError(f"{column} is empty")
    return valid_unicode(value, column)


def read_content(content: Any, where: str) -> str | list[dict[str, Any]]:
    """Text parts are joined without a separator, as the templates of the field that know parts render them."""
    if isinstance(content, str):
        return valid_unicode(content, where)
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
        if isinstance(part, Mapping) and (off := [key for key in SWITCHES if part.get(key, 1) in (0, False)]):
            raise RowError(
                f"{where}.content has a part with {off[0]}: a message is trained on or not, not a part of it"
            )
        if isinstance(part, Mapping):
            refuse_in_part(part, where)
        parts.append({"type": "text", "text": valid_unicode(text, where)})
    return merge_parts(parts)


def _listed(value: Any, column: str) -> Sequence[Any]:
    found = value
    if isinstance(value, str):  # a table's cell can hold nothing else
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{column} must be a list of messages, not text that is no JSON") from None
    if isinstance(found, Mapping):
        found = _transposed(found, column)
    if not is_list(found):
        raise RowError(f"{column} must be a list of messages, not {type_name(found)}")
    if not found:
        raise RowError(f"{column} is empty")
    return list(found)


def _transposed(columns: Mapping[str, Any], column: str) -> list[dict[str, Any]]:
    """Tables may keep a list of mappings as a mapping of lists: {"role": […], "content": […]}."""
    if not columns or not all(is_list(values) for values in columns.values() if values is not None):
        raise RowError(f"{column} must be a list of messages, not a single mapping: put it into a list")
    lengths = {len(values) for values in columns.values() if values is not None}
    if len(lengths) > 1:
        counts = ", ".join(f"{len(values)} {show(key, 40)}" for key, values in columns.items() if values is not None)
        raise RowError(f"{column} is a mapping of lists of different lengths: {counts}")
    return [
        {key: values[i] for key, values in columns.items() if values is not None}
        for i in range(max(lengths, default=0))
    ]


def _message(message: Any, where: str) -> tuple[Message, dict[str, Any]]:
    """A message, and its keys that are no part of one: switches and unknown ones."""
    if not isinstance(message, Mapping):
        raise RowError(f"{where} must be a message with role and content, not {type_name(message)}")
    # Arrow fills the keys that other rows have with null; templates take a null for a value.
    kept = {key: value for key, value in message.items() if value is not None}
    if "from" in kept and "role" not in kept:
        kept = _from_sharegpt(kept, where)
    role = kept["role"] = _role(kept.get("role"), where)
    if kept.keys() <= _PLAIN:
        return _with_content(kept, where), {}
    others = {key: value for key, value in kept.items() if key not in _READ and key not in _IDS and not blank(value)}
    if media := [key for key in _MEDIA if key in others]:
        raise RowError(f"{where} has {media[0]} beside its content: give it as a part of the content, or as a column")
    kept = {key: value for key, value in kept.items() if key in _READ or (key in others and key not in _LOSS)}
    if role in ("assistant", _CALL):
        kept = _acting(kept, where)
    elif misplaced := [key for key in ("tool_calls", "function_call", *REASONING) if not blank(kept.pop(key, None))]:
        raise RowError(f"{where} is a {role} message with {misplaced[0]}, which only the assistant has")
    return _with_content(kept, where), others


def _is_call(message: Mapping[str, Any]) -> bool:
    return SPEAKERS.get(str(message.get("role") or message.get("from")).lower()) == _CALL


def _from_sharegpt(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """{"from": "human", "value": …} as role and content. Some sets write role and content all the same."""
    speaker = turn["from"]
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        raise RowError(f"{where} is from the unknown speaker {show(speaker, 40)} (known: {', '.join(SPEAKERS)})")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**others, "role": role, **({"content": turn["value"]} if "value" in turn else {})}


def _role(role: Any, where: str) -> str:
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        problem = "no role" if role is None else f"the unknown role {show(role, 40)}"
        meant = _MEANT.get(str(role).lower())
        raise RowError(f"{where} has {problem} (known: {', '.join(ROLES)})" + (f"; write {meant}" if meant else ""))
    return known


def _with_content(message: Message, where: str) -> Message:
    role = message["role"]
    if role == _CALL:
        calls = _tool_calls(message.get("content"), where)
        others = {key: value for key, value in message.items() if key not in _PLAIN}
        return {**others, "role": "assistant", "content": "", "tool_calls": calls}
    acts = "tool_calls" in message or "reasoning_content" in message
    if "content" not in message and not acts:
        raise RowError(f"{where} has no content")
    content = read_content(message.get("content", ""), where)
    empty = isinstance(content, str) and not content.strip()
    if role in ("user", "assistant") and empty and not acts:
        raise RowError(f"{where} is an empty {role} message")
    message["content"] = content
    return message


def _acting(message: Message, where: str) -> Message:
    """The calls and the reasoning of an assistant message, each under its one name."""
    calls, legacy = message.pop("tool_calls", None), message.pop("function_call", None)
    if not blank(calls) and not blank(legacy):
        raise RowError(f"{where} has both tool_calls and function_call: keep one of them")
    thoughts = {key: text for key in REASONING if not blank(text := message.pop(key, None))}
    if not blank(calls):
        message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    elif not blank(legacy):
        message["tool_calls"] = _tool_calls(legacy, f"{where}.function_call")
    if thoughts:
        message["reasoning_content"] = _reasoning(thoughts, where)
    return message


def _reasoning(thoughts: dict[str, Any], where: str) -> str:
    for key, text in thoughts.items():
        if not isinstance(text, str):
            raise RowError(f"{where}.{key} must be text, not {type_name(text)}")
    if len(set(thoughts.values())) > 1:
        raise RowError(f"{where} has different texts in {' and '.join(thoughts)}: keep one of them")
    return valid_unicode(next(iter(thoughts.values())), where)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = from_json(value, where)
    if isinstance(calls, Mapping):
        read = [_tool_call(calls, where)]
    elif is_list(calls) and calls:
        read = [_tool_call(from_json(call, f"{where}[{i}]"), f"{where}[{i}]") for i, call in enumerate(calls)]
    else:
        raise RowError(f"{where} must be a list of calls, not {type_name(calls)}")
    valid_unicode(json.dumps(read, ensure_ascii=False, default=str), where)
    return read


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments"}}, also from the bare function that some sets keep."""
    if not isinstance(call, Mapping):
        raise RowError(f"{where} must be a call with a function, not {type_name(call)}")
    if call.get("function") is None and call.get("name") is not None:
        own = {key: call[key] for key in ("name", "arguments", "parameters") if key in call}
        call = {**{key: call[key] for key in call if key not in own}, "type": "function", "function": own}
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise RowError(f"{where} has no function")
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError(f"{where}.function has no name")
    # Llama 3.1 writes parameters where the others say arguments.
    key = "parameters" if function.get("arguments") is None and "parameters" in function else "arguments"
    arguments = _arguments(function.get(key), f"{where}.function.{key}")
    return {**call, "function": {**{k: v for k, v in function.items() if k != key}, "arguments": arguments}}


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    """The wire format has JSON text, templates want the object. A call without arguments has none of them."""
    if blank(arguments):
        return {}
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        shown = show(arguments, 60) if isinstance(arguments, str) else type_name(arguments)
        raise RowError(f"{where} must be a JSON object, or its text: {shown}")
    return dict(found)


def _switch(others: dict[str, Any], where: str) -> tuple[bool | None, str]:
    """Whether the message is trained on, None where it does not say; and the key that says so."""
    found = {key: others[key] for key in SWITCHES if key in others}
    for key, value in found.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            shown = type_name(value) if isinstance(value, str) else show(value, 40)
            raise RowError(f"{where}.{key} is {shown}: a message is trained on (1, true) or not (0, false)")
    if len({bool(value) for value in found.values()}) > 1:
        raise RowError(f"{where} says both that it is trained on and that it is not: {', '.join(found)}")
    return next(((bool(value), key) for key, value in found.items()), (None, ""))
