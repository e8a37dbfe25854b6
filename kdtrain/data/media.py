"""What rows say of images and sounds under other names than `images`, and what a model makes of it that reads none.

Silence would train a model to answer questions about what it never sees: such a column is read, refused or noted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kdtrain.data.columns import BOX_COLUMN, IMAGE_COLUMNS, PATH_COLUMNS
from kdtrain.data.errors import RowError
from kdtrain.data.parts import AUDIO_COLUMNS, IMAGE_TYPES, NO_SOUNDS, PLACEHOLDER, texts_of
from kdtrain.data.rows import Chat, Pair, PlainText, parse_row

MEDIA_COLUMNS = (*PATH_COLUMNS, *AUDIO_COLUMNS, BOX_COLUMN)
_MEDIA = frozenset(MEDIA_COLUMNS)
_IMAGE_FILE = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|avif|heic|jp2|ppm)$", re.IGNORECASE)
# Sounds and videos share their placeholders with HTML, which closes them.
_HEARD = re.compile(r"<(audio|video)>(?!.*</\1>)", re.DOTALL)
_BOXES = re.compile(r"<(bbox|ref-object)>")
_IMAGE_IN_TEXT = re.compile(r"<img>[^<>]+</img>")  # of the first Qwen-VL; in HTML img has attributes


def parse_media_row(row: Mapping[str, Any], folder: str | None, sees_images: bool) -> Chat | Pair | PlainText:
    """`parse_row` for a model with or without images: nothing that a row says of media is lost without a word."""
    notes: tuple[str, ...] = ()
    if not _MEDIA.isdisjoint(row):
        row, notes = _seen(row) if sees_images else (row, _unread(row))
    parsed = parse_row(row, folder)
    if sees_images:
        _refuse_placeholders(parsed)
    elif any(PLACEHOLDER in text for _, text in _texts(parsed)):
        notes = (*notes, f"the text says {PLACEHOLDER}, which is plain text for a model that reads no images")
    return replace(parsed, notes=parsed.notes + notes) if notes else parsed


def _seen(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The row with the images of other columns as `images`, and notes on columns that are not read."""
    if any(_holds(row.get(column)) for column in AUDIO_COLUMNS):
        raise RowError(NO_SOUNDS)
    notes = ("objects (boxes) is not read: what the model should say of them must stand in the text",)
    named = images_by_name(row)
    images = next(iter(named.values()), [])
    if any(others != images for others in named.values()):
        raise RowError(f"the row has images in {' and '.join(named)}: keep one of the columns")
    return ({**row, "images": images} if images else row), (notes if _holds(row.get(BOX_COLUMN)) else ())


def images_by_name(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The images of a row's `PATH_COLUMNS`, of those that are read: none beside images of another place."""
    if any(_holds(row.get(column)) for column in IMAGE_COLUMNS) or _has_own_images(row):
        return {}
    found = {column: images for column in PATH_COLUMNS if (images := _images_of(column, row.get(column)))}
    local = {column: images for column, images in found.items() if not column.startswith("image_url")}
    return local or found


def _images_of(column: str, value: Any) -> list[Any]:
    many = list(value) if isinstance(value, (list, tuple)) else [value] if _holds(value) else []
    # Text data sets name the files of their rows, too: code, transcripts.
    other = column.startswith("file_name") and not all(isinstance(v, str) and _IMAGE_FILE.search(v) for v in many)
    return [] if other else many


def _has_own_images(row: Mapping[str, Any]) -> bool:
    """Whether a part of a message holds its image itself."""
    messages = [message for column in ("messages", "prompt") for message in _list(row.get(column))]
    contents = (_list(message.get("content")) for message in messages if isinstance(message, Mapping))
    parts = (part for content in contents for part in content if isinstance(part, Mapping))
    keys = (*IMAGE_TYPES, "source", "path", "url", "bytes", "base64")
    return any(_holds(part.get(key)) for part in parts for key in keys)


def _unread(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on columns with media for a model that reads text alone."""
    named = [column for column in PATH_COLUMNS if _images_of(column, row.get(column))]
    named += [column for column in AUDIO_COLUMNS if _holds(row.get(column))]
    return tuple(f"the column {column} is not read: the model reads text alone" for column in named)


def _refuse_placeholders(parsed: Chat | Pair | PlainText) -> None:
    """Refuses text that stands for an image or a sound; what belongs to images has been taken out of it."""
    has_images = isinstance(parsed, Chat) and bool(parsed.images)
    for role, text in _texts(parsed):
        if "<" not in text:
            continue
        if PLACEHOLDER in text:
            raise RowError(_placeholder_problem(role, has_images))
        if found := _IMAGE_IN_TEXT.search(text):
            raise RowError(f"the text says {found[0][:60]}, which is not read: give the image in images or as a part")
        if role != "assistant" and (heard := _HEARD.search(text)):
            raise RowError(f"the text says {heard[0]}, and sounds and videos are not available yet: remove the row")
        if box := _BOXES.search(text):
            raise RowError(f"the text says {box[0]}, and boxes (objects) are not read: write them out in the text")


def _placeholder_problem(role: str, has_images: bool) -> str:
    if role == "assistant":
        return f"an assistant message says {PLACEHOLDER}: the model writes text only. Remove it"
    if has_images:
        return f"the text says {PLACEHOLDER} beside image parts, and only one of the two can be meant: remove it"
    return (
        f"the text says {PLACEHOLDER} and the row has no image: give it in the column images or image, remove the "
        "placeholder, or map the column, for example columns: {messages: messages, image: picture}"
    )


def _texts(parsed: Chat | Pair | PlainText) -> Iterator[tuple[str, str]]:
    """The texts of a row with the roles that say them."""
    if isinstance(parsed, Chat):
        for message in parsed.messages:
            yield from ((message["role"], text) for text in texts_of(message["content"]))
    elif isinstance(parsed, Pair):
        yield "user", parsed.prompt
        if parsed.completion is not None:
            yield "assistant", parsed.completion
    else:
        yield "assistant", parsed.text


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else ()


def _holds(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, bytes, list, tuple, dict)) and not len(value))
