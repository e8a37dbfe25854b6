"""One image of a row: where it is, and its pixels when they are wanted.

Rows hold a path, bytes, a data URI or a PIL image. All of them become an `Image`, a path or the bytes of a file, which
travels through the encoding cache; pixels are decoded when a batch is made. Nothing is downloaded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlparse

from kdtrain.data.errors import RowError, show, type_name
from kdtrain.errors import DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FIELDS = "a path, bytes, a data: URI, or a mapping with path or bytes"


@dataclass(frozen=True)
class Image:
    """An image by its absolute path, or as the bytes of an image file; the bytes win where both are there."""

    path: str | None = None
    data: bytes | None = None

    @property
    def record(self) -> dict[str, Any]:
        """As it is stored in the columns of an encoded data set."""
        return {"path": self.path, "bytes": self.data}

    @property
    def identity(self) -> bytes:
        """Changes when the image does: a digest of the bytes, or path, size and modification time of the file."""
        if self.data is not None:
            return hashlib.sha256(self.data).digest()
        try:
            status = os.stat(str(self.path))
        except OSError:
            return f"{self.path}:missing".encode()
        return f"{self.path}:{status.st_size}:{status.st_mtime_ns}".encode()

    def load(self) -> Any:
        """The image as PIL, upright and in RGB, as transformers loads images for inference."""
        pil, ops = _pil()
        name = show(self.path or "given as bytes", 400)
        try:
            with pil.open(io.BytesIO(self.data) if self.data is not None else self.path) as image:
                return ops.exif_transpose(image).convert("RGB")
        except FileNotFoundError:
            raise RowError(f"no such image file: {name}") from None
        except Exception as error:  # each of Pillow's decoders has its own errors for a broken file
            reason = show(str(error) or type(error).__name__)
            raise RowError(f"the image {name} cannot be read: {reason}") from None


def stored_image(record: Mapping[str, Any]) -> Image:
    """The image of an `Image.record`."""
    return Image(record.get("path"), record.get("bytes"))


def parse_image(value: Any, folder: str | None) -> Image:
    """An image of a row: a path, bytes, a `data:` URI, PIL, or a mapping with `path`, `url`, `bytes` or `base64`.

    `folder` is what paths are relative to; None refuses relative ones.
    """
    if isinstance(value, Mapping):
        data = value.get("bytes")
        if isinstance(data, bytes):
            return Image(None, data)
        # How bytes come through JSON, see `kdtrain.data.sources`.
        if isinstance(encoded := (data if isinstance(data, Mapping) else value).get("base64"), str):
            return Image(None, _decode(encoded))
        location = value.get("path") or value.get("url")
        if not isinstance(location, str):
            raise RowError(f"an image has neither path nor bytes: {_FIELDS} is expected")
        return _located(location, folder)
    if isinstance(value, str):
        return _located(value, folder)
    if isinstance(value, bytes):
        return Image(None, value)
    if is_pil(value):
        return Image(None, png(value))
    raise RowError(f"an image is {type_name(value)}: {_FIELDS} is expected")


def _located(location: str, folder: str | None) -> Image:
    if location.startswith("data:"):
        header, comma, content = location.partition(",")
        if not comma or not header.endswith(";base64"):
            raise RowError(f"an image's data: URI must be base64, not {show(header, 60)}")
        return Image(None, _decode(content))
    if location.startswith("file:"):
        location = unquote(urlparse(location).path)
    elif _SCHEME.match(location):
        raise RowError(
            f"the image {show(location)} is not a local file: images are not downloaded during training. Save it "
            "beside the data file and give its path"
        )
    if not location.strip() or "\0" in location:
        raise RowError("an image has an empty path" if not location.strip() else "an image's path holds a null byte")
    if os.path.isabs(location):
        return Image(os.path.normpath(location))
    if folder is None:
        raise RowError(f"the image {show(location)} is a relative path, but its data set is in no local folder")
    return Image(os.path.normpath(os.path.join(folder, location)))


def _decode(encoded: str) -> bytes:
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"an image is not valid base64: {show(str(error))}") from None


def is_pil(value: object) -> bool:
    """Without importing Pillow, which text alone does not need."""
    return any(base.__module__.startswith("PIL.") for base in type(value).__mro__)


def png(image: Any) -> bytes:
    """A PIL image as a PNG file: lossless, upright and in RGB at once, since PNG lacks some of PIL's modes."""
    _, ops = _pil()
    buffer = io.BytesIO()
    try:
        ops.exif_transpose(image).convert("RGB").save(buffer, "PNG", compress_level=1)
    except Exception as error:  # a lazily opened file is only read here
        raise RowError(f"an image cannot be read: {show(str(error) or type(error).__name__)}") from None
    return buffer.getvalue()


def _pil() -> tuple[Any, Any]:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise DataError("rows with images need Pillow: pip install 'kdtrain[vision]'") from None
    return PIL.Image, PIL.ImageOps
