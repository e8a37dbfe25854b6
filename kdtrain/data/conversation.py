"""A row's conversation beside its tokens, as JSON text: for a teacher that reads messages in place of token ids.

`{"messages": [...], "tools": [...] | null, "chat_template_kwargs": {...}}` with the messages as `kdtrain.data.rows`
reads them. An image in them is a part `{"type": "image"}`; the row's images belong to these parts in their order. Text
without messages is `{"prompt": ..., "completion": ... | null}`, and plain text has neither.

Where the teacher reads messages that the student does not (prefix.py), also `"prefix": [...]` and `"skips": 0 | 1`:
what it reads in place of the first `skips` messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kdtrain.data.chat_template import TemplateOptions
from kdtrain.data.prefix import PrefixedChat
from kdtrain.data.rows import Chat, Pair


def chat_text(chat: Chat, messages: int, options: TemplateOptions, prefixed: PrefixedChat | None = None) -> str:
    """The first messages of a conversation. Its template arguments are those that the teacher's rendering has."""
    kwargs = {
        **(options.chat_template_kwargs or {}),
        **chat.template_kwargs,
        **(options.teacher_chat_template_kwargs or {}),
    }
    more = {"prefix": list(prefixed.first), "skips": prefixed.skips} if prefixed else {}
    return _text({"messages": chat.messages[:messages], "tools": chat.tools, "chat_template_kwargs": kwargs, **more})


def pair_text(pair: Pair) -> str:
    return _text({"prompt": pair.prompt, "completion": pair.completion})


def first_messages(chat: str, messages: int) -> str:
    """The conversation without what follows its first messages."""
    whole = json.loads(chat)
    return _text({**whole, "messages": whole["messages"][:messages]})


def for_teacher(chat: Mapping[str, Any]) -> dict[str, Any]:
    """The parsed conversation with the messages of the teacher's prefix in their place."""
    read = {key: value for key, value in chat.items() if key not in ("prefix", "skips")}
    if "prefix" in chat:
        read["messages"] = [*chat["prefix"], *chat["messages"][chat["skips"] :]]
    return read


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value)
