"""Messages of a conversation in the forms that chat templates are given: with other words, reasoning, arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdtrain.data.parts import texts_of
from kdtrain.data.rows import Chat

THINK, THINK_END = "<think>", "</think>"

Message = dict[str, Any]

# What `probe` writes first of a message.
PROBE_WORDS = ("kdprobe kdprobecontent{}x", "kdprobereasoning{}x", "kdprobecall{}x0x")


def form_of(chat: Chat) -> Any:
    """All that decides what a template leaves out, beside the words."""
    messages = tuple(
        (
            message["role"],
            has_answer_text(message),
            THINK_END in text_of(message),
            "reasoning_content" in message,
            bool(message.get("name")),
            len(message.get("tool_calls") or ()),
            isinstance(message["content"], str),
        )
        for message in chat.messages
    )
    kwargs = json.dumps(chat.template_kwargs, sort_keys=True, default=str) if chat.template_kwargs else ""
    return messages, len(chat.tools or ()), kwargs, tuple(chat.trained)


def text_of(message: Message) -> str:
    return "".join(texts_of(message["content"]))


def written(message: Message) -> list[str]:
    """The texts of a message that people or models wrote."""
    return [*texts_of(message["content"]), str(message.get("reasoning_content") or "")]


def has_answer_text(message: Message) -> bool:
    return bool(text_of(message).rpartition(THINK_END)[2].strip())


def has_reasoning(message: Message) -> bool:
    return bool(message.get("reasoning_content")) or THINK_END in text_of(message)


def probe(message: Message, i: int) -> Message:
    """The message with words of its own in every place."""
    text = f"kdprobe kdprobecontent{i}x kdprobe" if has_answer_text(message) else ""
    if THINK_END in text_of(message):
        text = f"<think>\nkdprobereasoning{i}x\n</think>\n\n{text}"
    content: Any = text
    if not isinstance(message["content"], str):
        images = [part for part in message["content"] if part["type"] == "image"]
        content = [*images, *([{"type": "text", "text": text}] if text else [])]
    probe = {**message, "content": content}
    if message.get("reasoning_content"):
        probe["reasoning_content"] = f"kdprobereasoning{i}x"
    if message.get("name") and message["role"] != "tool":
        probe["name"] = f"kdprobename{i}x"
    if message.get("tool_calls"):
        probe["tool_calls"] = [named_tool(call, f"kdprobecall{i}x{j}x") for j, call in enumerate(message["tool_calls"])]
    return probe


def named_tool(tool: Message, name: str) -> Message:
    """A tool's schema, or a call of one, under another name."""
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": {**tool["function"], "name": name}}
    return {**tool, "name": name}


def with_text_arguments(message: Message) -> Message:
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), Mapping):
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = {**call, "function": {**function, "arguments": text}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def with_messages(chat: Chat, which: Sequence[int], change: Callable[[Message], Message]) -> Chat:
    messages = [change(message) if i in which else message for i, message in enumerate(chat.messages)]
    return replace(chat, messages=messages)


def reasoning_of(message: Message) -> str:
    in_content = text_of(message).rpartition(THINK_END)[0].partition(THINK)[2]
    return str(message.get("reasoning_content") or in_content).strip("\n")


def reasoning_moved(message: Message, keep: bool) -> Message:
    """The message with its reasoning at the beginning of its content, or without it."""
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    reasoning, content = message.get("reasoning_content"), message["content"]
    if not keep and isinstance(content, str):
        content = content.rpartition(THINK_END)[2].lstrip("\n")
    if keep and reasoning and isinstance(content, str):
        content = f"<think>\n{reasoning}\n{THINK_END}\n\n{content}"
    return {**rest, "content": content}


def rewritten(message: Message, change: Callable[[str], str]) -> Message:
    """The message with another text in every place."""
    content = message["content"]
    if isinstance(content, str):
        content = change(content)
    else:
        content = [{**part, "text": change(part["text"])} if part["type"] == "text" else part for part in content]
    changed = {**message, "content": content}
    if message.get("reasoning_content"):
        changed["reasoning_content"] = change(message["reasoning_content"])
    return changed
