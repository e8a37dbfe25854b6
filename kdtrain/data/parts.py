"""Content parts: which image stands where in a conversation.

A message's content is text, or a list of parts `{"type": "text", "text": ...}` and `{"type": "image"}` when it holds
images. The images themselves are kept apart, in the order of their parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdtrain.data.errors import RowError, show, type_name
from kdtrain.data.images import Image, only_source, parse_image, refuse_sizes

# What data sets in the manner of LLaVA write into the text where an image belongs.
PLACEHOLDER = "<image>"
VIDEO_COLUMNS = ("videos", "video")
AUDIO_COLUMNS = ("audios", "audio")
IMAGE_TYPES = ("image", "image_url")
NO_VIDEOS = "videos are not available yet: remove the video or take its frames as images"
NO_SOUNDS = "sounds are not available yet: remove the sound, or the row"
# In the words of Hugging Face, OpenAI and Anthropic; the keys of an image that is the part itself stand behind them.
_SOURCES = ("image", "image_url", "source")
_DIRECT = ("bytes", "path", "url", "base64", "data")


def image_part(part: Any, where: str) -> dict[str, Any] | None:
    """A part that is an image; its value is None where the row's image column has it. None for a part that is text."""
    if not isinstance(part, Mapping):
        return None
    type_ = part.get("type")
    if type_ is None and part.get("text") is None:
        type_ = next((name for name in IMAGE_TYPES if part.get(name) is not None), None)
    image = any(not _empty(part.get(name)) for name in IMAGE_TYPES)
    if type_ is None or type_ == "text":
        if image:
            raise RowError(f"{where}.content has a part with text and an image in one: make two parts of it")
        return None
    if type_ not in IMAGE_TYPES:
        named = show(type_, 40)
        if "video" in named or "audio" in named:
            raise RowError(NO_VIDEOS if "video" in named else NO_SOUNDS)
        raise RowError(f"{where}.content has a part of the unknown type {named}")
    if part.get("text"):
        raise RowError(f"{where}.content has a part with an image and text in one: make two parts of it")
    return {"type": "image", "value": _own_image(part), "index": part.get("index")}


def _own_image(part: Mapping[str, Any]) -> Any:
    refuse_sizes(part)
    value = only_source(part, _SOURCES)
    if all(_empty(part.get(key)) for key in _DIRECT):
        return value
    if value is not None and any(part.get(key) not in (None, "", value) for key in _DIRECT):
        raise RowError("an image part has two images: keep the one that is meant")
    return part


def merge_parts(parts: Sequence[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Text parts that follow each other become one; without an image all of it is text."""
    merged: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "text" and merged and merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + part["text"]}
        elif part["type"] == "image" or part["text"]:
            merged.append(part)
    if any(part["type"] == "image" for part in merged):
        return merged
    return merged[0]["text"] if merged else ""


def texts_of(content: str | list[dict[str, Any]]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def count_images(messages: Sequence[Mapping[str, Any]]) -> int:
    return sum(
        part["type"] == "image"
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )


def column_images(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row's `images` or `image` column."""
    if any(row.get(column) not in (None, [], "") for column in VIDEO_COLUMNS):
        raise RowError(NO_VIDEOS)
    many, one = row.get("images"), row.get("image")
    if not _empty(many) and not _empty(one):
        raise RowError("the row has both images and image: keep one of the two columns")
    if not _empty(one):
        many = one if isinstance(one, (list, tuple)) else [one]  # some sets keep a list under the singular
    if _empty(many):
        return []
    if not isinstance(many, Sequence) or isinstance(many, (str, bytes)):
        raise RowError(f"images must be a list, not {type_name(many)}: a single image goes into the column image")
    if any(value is None for value in many):
        raise RowError("images holds a null: every entry must be an image")
    return list(many)


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, list, tuple)) and not len(value))


def place_images(
    messages: list[dict[str, Any]], column: list[Any], folder: str | None
) -> tuple[list[dict[str, Any]], tuple[Image, ...], tuple[str, ...]]:
    """Gives every image part its image and every image of the column its part; also notes.

    Parts without an image of their own take those of the column in order. Without any image part, the text is cut at
    `<image>` if it says so as often as there are images; and if it never does, all images go in front of the first
    user message's text. The parts that are returned are only `{"type": "image"}`, their images stand beside them.
    """
    notes: tuple[str, ...] = ()
    if column and not count_images(messages):
        if any(_BREAKS.search(text) for message in messages for text in texts_of(message["content"])):
            notes = (f"the line break beside {PLACEHOLDER} belongs to it and is left out",)
        messages = _with_parts(messages, len(column))
    images, taken, placed = [], 0, []
    for number, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, str):
            placed.append(message)
            continue
        if message["role"] == "assistant":
            raise RowError(f"message {number} is the assistant's and has an image: the model writes text only")
        for part in content:
            if part["type"] != "image":
                continue
            value = part["value"]
            if value is None:
                if part["index"] not in (None, taken):
                    raise RowError(
                        f"message {number} has an image part of index {show(part['index'], 20)} where {taken} is due: "
                        "parts take the images of the column in order"
                    )
                value = column[taken] if taken < len(column) else None
                taken += 1
            if value is not None:
                images.append(parse_image(value, folder))
        bare = [{"type": "image"} if part["type"] == "image" else part for part in content]
        placed.append({**message, "content": bare})
    if taken != len(column):
        raise RowError(f"the row has {len(column)} images in its column and {taken} places for them in its messages")
    return placed, tuple(images), notes


def _with_parts(messages: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    marks = sum(m["content"].count(PLACEHOLDER) for m in messages if m["role"] != "assistant")
    if marks not in (0, images):
        raise RowError(f"the text says {PLACEHOLDER} {marks} times and the row has {images} images")
    if marks:
        return [m if m["role"] == "assistant" else {**m, "content": _split(m["content"])} for m in messages]
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise RowError("the row has images and no user message that they could belong to")
    parts = [_PART] * images + [{"type": "text", "text": messages[first]["content"]}]
    return [*messages[:first], {**messages[first], "content": parts}, *messages[first + 1 :]]


_PLACE = re.compile(rf"(?:\r?\n)?{PLACEHOLDER}(?:\r?\n)?")
_BREAKS = re.compile(rf"\n{PLACEHOLDER}|{PLACEHOLDER}\r?\n")
_PART = {"type": "image", "value": None, "index": None}


def _split(text: str) -> str | list[dict[str, Any]]:
    """Cuts text at the placeholders.

    Data in the manner of LLaVA set each off with a line break, which is no part of the question: where a model wants
    one there, its chat template writes it.
    """
    pieces = _PLACE.split(text)
    parts: list[dict[str, Any]] = [{"type": "text", "text": pieces[0]}]
    for piece in pieces[1:]:
        parts += [_PART, {"type": "text", "text": piece}]
    return merge_parts(parts)
