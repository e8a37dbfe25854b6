"""A row's conversation in the words of OpenAI's chat API, with its images in it."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kdtrain.data.images import Image, png
from kdtrain.data.messages import with_text_arguments


def chat_payload(chat: Mapping[str, Any], images: Sequence[Image] = ()) -> dict[str, Any]:
    """`messages` of a request, and `tools` and `chat_template_kwargs` where there are any.

    Args:
        chat: of messages, as of `kdtrain.data.conversation`.
        images: of its image parts, in their order; those behind the last part belong to messages that were cut.

    Raises:
        RowError: an image that cannot be read.
    """
    pictures = map(data_uri, images)
    payload = {"messages": [_message(message, pictures) for message in chat["messages"]]}
    return payload | {name: chat[name] for name in ("tools", "chat_template_kwargs") if chat.get(name)}


def data_uri(image: Image) -> str:
    """The picture as a person sees it and the student's processor gets it, upright and in RGB; as PNG, so unchanged."""
    return "data:image/png;base64," + base64.b64encode(png(image.load())).decode()


def _message(message: Mapping[str, Any], pictures: Iterator[str]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, list):
        content = [_part(part, pictures) for part in content]
    message = {**message, "content": content}
    return with_text_arguments(message) if message.get("tool_calls") else message


def _part(part: Mapping[str, Any], pictures: Iterator[str]) -> dict[str, Any]:
    if part["type"] != "image":
        return dict(part)
    return {"type": "image_url", "image_url": {"url": next(pictures)}}
