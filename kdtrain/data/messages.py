"""Messages of a conversation in the forms that chat templates are given: with other words, reasoning, arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdtrain.data.parts import texts_of
from kdtrain.data.rows import Chat
from kdtrain.data.turns import Message

THINK, THINK_END = "<think>", "</think>"

# What `probe` writes first of a message.
PROBE_WORDS = ("kdprobe kdprobecontent{}x", "kdprobe kdprobereasoning{}x", "kdprobereasoning{}x", "kdprobecall{}x0x")
_TAGS = re.compile(f"({THINK}|{THINK_END})")
# A thinking block; the first may be opened by the generation prompt.
_THOUGHT = re.compile(f"\\A(?:(?!{THINK}).)*?{THINK_END}|{THINK}(?:(?!{THINK}).)*?{THINK_END}", re.DOTALL)


def form_of(chat: Chat, kwargs: Mapping[str, Any]) -> Any:
    """All that decides what a template leaves out, beside the words; `kwargs` are those that it reads."""
    messages = tuple(map(_form_of, chat.messages))
    arguments = json.dumps(kwargs, sort_keys=True, default=str) if kwargs else ""
    return messages, len(chat.tools or ()), arguments, tuple(chat.trained)


def _form_of(message: Message) -> Any:
    text = message["content"]
    # Nearly all messages are such. Others have more than a name to tell them apart.
    if len(message) == 2 and isinstance(text, str) and "think>" not in text and text and not text.isspace():
        return message["role"]
    return (
        message["role"],
        _kinds(message),
        "reasoning_content" in message,
        bool(message.get("name")),
        len(message.get("tool_calls") or ()),
        isinstance(text, str),
    )


def _kinds(message: Message) -> tuple[str, ...]:
    """What the pieces of a text are: a tag, thinking (what a closing tag follows), content, or nothing."""
    text = text_of(message)
    if THINK not in text and THINK_END not in text:
        return ("",) if not text or text.isspace() else ("content",)
    pieces, kinds = _TAGS.split(text), []
    for i, piece in enumerate(pieces):
        if i % 2:
            kinds.append(piece)
        elif not piece or piece.isspace():
            kinds.append("")
        else:
            closed = message["role"] == "assistant" and pieces[i + 1 : i + 2] == [THINK_END]
            kinds.append("thinking" if closed else "content")
    return tuple(kinds)


def words_of(message: Message, i: int, kind: str) -> list[str]:
    """The words that `probe` writes in place of the pieces of one kind."""
    return [f"kdprobe{kind}{i}x{k}x" for k, found in enumerate(_kinds(message)) if found == kind]


def text_of(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(texts_of(content))


def written(message: Message) -> list[str]:
    """The texts of a message that people or models wrote."""
    texts = texts_of(message["content"])
    return [*texts, str(message["reasoning_content"])] if message.get("reasoning_content") else texts


def has_reasoning(message: Message) -> bool:
    return bool(message.get("reasoning_content")) or "thinking" in _kinds(message)


def probe(message: Message, i: int) -> Message:
    """The message with words of its own in every place."""
    pieces = _TAGS.split(text_of(message))
    for k, kind in enumerate(_kinds(message)):
        if kind in ("thinking", "content"):
            text = pieces[k]
            before, behind = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
            word = f"kdprobereasoning{i}x kdprobe{kind}{i}x{k}x" if kind == "thinking" else f"kdprobe{kind}{i}x{k}x"
            pieces[k] = f"{before}kdprobe {word} kdprobe{behind}"
    content: Any = "".join(pieces)
    if not isinstance(message["content"], str):
        images = [part for part in message["content"] if part["type"] == "image"]
        content = [*images, *([{"type": "text", "text": content}] if content else [])]
    words = {**message, "content": content}
    if message.get("reasoning_content"):
        words["reasoning_content"] = f"kdprobereasoning{i}x"
    if message.get("name") and message["role"] != "tool":
        words["name"] = f"kdprobename{i}x"
    if message.get("tool_calls"):
        words["tool_calls"] = [named_tool(call, f"kdprobecall{i}x{j}x") for j, call in enumerate(message["tool_calls"])]
    return words


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
    before = text_of(message).rpartition(THINK_END)[0]
    in_content = before.partition(THINK)[2] if THINK in before else before
    return str(message.get("reasoning_content") or in_content).strip("\n")


def reasoning_moved(message: Message, keep: bool) -> Message:
    """The message with its reasoning at the beginning of its content, or without it."""
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    reasoning, content = message.get("reasoning_content"), message["content"]
    if not keep and isinstance(content, str):
        content = _THOUGHT.sub("", content).lstrip("\n")
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
