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
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from kdtrain.data.errors import RowError, show, type_name
from kdtrain.errors import DataError

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_FIELDS = "a path, bytes, a data: URI, or a mapping with path or bytes"
_TEXTS = ("path", "url", "base64", "data")
_SIZE_KEYS = ("max_pixels", "min_pixels", "resized_height", "resized_width", "detail")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
_BASE64_SIGNATURES = ("/9j/", "iVBORw0K", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")
_LONGEST_NAME = 255  # bytes of a name in a path, on all usual file systems
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")
TRANSPARENT = "transparent parts of images were filled with white"
FIRST_FRAME = "of images with several frames or pages the first one is read"
DEEP = "greyscale images of 16 bits were brought to 8"


class ImageError(RowError):
    """An image that could not be read: tomorrow it may be, so that nothing remembers it as bad."""


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
        """Changes when the image does: a digest of the bytes, or path, size and times of the file.

        The time of the last change counts beside that of the last modification, which copies bring along.
        """
        if self.data is not None:
            return hashlib.sha256(self.data).digest()
        try:
            status = os.stat(str(self.path))
        except OSError:
            return f"{self.path}:missing".encode()
        return f"{self.path}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}".encode()

    def content(self) -> bytes:
        """The bytes of the image file."""
        if self.data is not None:
            return self.data
        with open(str(self.path), "rb") as file:
            return file.read()

    def load(self) -> Any:
        """The image as PIL, upright and in RGB, as transformers prepares a picture for inference."""
        return self.load_noted()[0]

    def load_noted(self) -> tuple[Any, tuple[str, ...]]:
        """`load`, and notes on what was changed to come to RGB."""
        pil, _ = _pil()
        name = show(self.path or "given as bytes", 400)
        try:
            with pil.open(io.BytesIO(self.data) if self.data is not None else self.path) as image:
                several = getattr(image, "is_animated", False) and image.format != "MPO"  # a photo and its preview
                pixels, notes = _upright_rgb(image)
                return pixels, (*notes, *((FIRST_FRAME,) if several else ()))
        except FileNotFoundError:
            raise ImageError(f"no such image file: {name}") from None
        except RowError as error:
            raise ImageError(f"the image {name} cannot be used: {error}") from None
        except Exception as error:  # each of Pillow's decoders has its own errors for a broken file
            unknown = type(error).__name__ == "UnidentifiedImageError"  # its text is the address of an object
            reason = "its format is unknown" if unknown else show(str(error) or type(error).__name__)
            raise ImageError(f"the image {name} cannot be read: {reason}") from None


def of_mean_colour(image: Any) -> Any:
    """A PIL image in RGB of the same size, all of it in the mean colour of another one."""
    from PIL import ImageStat

    colour = tuple(round(value) for value in ImageStat.Stat(image).mean)
    return _pil()[0].new("RGB", image.size, colour)


def stored_image(record: Mapping[str, Any]) -> Image:
    """The image of an `Image.record`."""
    return Image(record.get("path"), record.get("bytes"))


def parse_image(value: Any, folder: str | None) -> Image:
    """An image of a row: a path, bytes, base64, a `data:` URI, PIL, or a mapping that holds one of them.

    `folder` is what paths are relative to; None refuses relative ones.
    """
    if isinstance(value, Mapping):
        return _mapped(value, folder)
    if isinstance(value, str):
        return _located(value, folder)
    if isinstance(value, bytes):
        return Image(None, value)
    if is_pil(value):
        return Image(None, png(value))
    raise RowError(f"an image is {type_name(value)}: {_FIELDS} is expected")


def refuse_sizes(entry: Mapping[str, Any]) -> None:
    """Refuses keys that ask for another size than the processor's own: boxes and counts would no longer fit."""
    for key in _SIZE_KEYS:
        if entry.get(key) not in (None, "auto"):
            raise RowError(
                f"an image has {key}: the sizes of single images are not read. Remove it, and set the processor's "
                "sizes for the whole run in data.processor_kwargs"
            )


def only_source(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value of the one of `names` that an entry has, None without any; several must have the same."""
    found = {name: entry[name] for name in names if entry.get(name) not in (None, "")}
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        raise RowError(f"an image has {' and '.join(found)}: keep the one that is meant")
    return values[0] if values else None


def _mapped(entry: Mapping[str, Any], folder: str | None) -> Image:
    refuse_sizes(entry)
    data = entry.get("bytes")
    if isinstance(data, Mapping):  # how bytes come through JSON, see `kdtrain.data.sources`
        data = _decode(str(data.get("base64")))
    if isinstance(data, bytes):
        _check_beside_bytes(entry, data, folder)
        return Image(None, data)
    location = only_source(entry, _TEXTS)
    if not isinstance(location, str):
        raise RowError(f"an image has neither path nor bytes: {_FIELDS} is expected")
    # Anthropic's form says base64 in the type and has the characters in `data`.
    encoded = entry.get("base64") or entry.get("data")
    if location == encoded and not _is_uri(location):
        return Image(None, _decode(location))
    return _located(location, folder)


def _check_beside_bytes(entry: Mapping[str, Any], data: bytes, folder: str | None) -> None:
    """Tables of `datasets` keep the name of the file that the bytes came from as the path beside them."""
    if (other := only_source(entry, _TEXTS)) is None:
        return
    if other != entry.get("path") or not isinstance(other, str):
        raise RowError("an image has bytes and another source beside them: keep the one that is meant")
    path = _joined(folder or os.sep, other)
    if os.path.isfile(path) and Image(path).content() != data:
        raise RowError(f"an image has bytes, and its path {show(path)} is another image: keep the one that is meant")


def _is_uri(location: str) -> bool:
    return location[:5].lower() == "data:"


def _located(location: str, folder: str | None) -> Image:
    if _is_uri(location):
        header, comma, content = location.partition(",")
        if not comma or not header.rstrip().lower().endswith(";base64"):
            raise RowError(f"an image's data: URI must be base64, not {show(header, 60)}")
        return Image(None, _decode(unquote(content)))
    if location.startswith(_BASE64_SIGNATURES) and (data := _bare_base64(location)) is not None:
        return Image(None, data)
    if location.startswith("file:"):
        # Also file://a.png, which people write for a relative path.
        location = unquote(location.removeprefix("file:").removeprefix("//"))
        location = location.removeprefix("localhost") if location.startswith("localhost/") else location
    elif _SCHEME.match(location):
        raise RowError(
            f"the image {show(location)} is not a local file: images are not downloaded during training. Save it "
            "beside the data file and give its path"
        )
    if not location.strip() or "\0" in location:
        raise RowError("an image has an empty path" if not location.strip() else "an image's path holds a null byte")
    if any(len(os.fsencode(name)) > _LONGEST_NAME for name in location.split(os.sep)):
        raise RowError(
            f"an image is {len(location)} characters of text, {show(location, 40)}, which are neither a path nor an "
            "image in base64"
        )
    if folder is None and not os.path.isabs(location):
        raise RowError(f"the image {show(location)} is a relative path, but its data set is in no local folder")
    return Image(_existing(folder or "", location))


def _existing(folder: str, location: str) -> str:
    """The absolute path, whichever of Unicode's two forms the file's name is written in.

    `..` stays: behind a symbolic link it is another folder than the text alone would say.
    """
    path = _joined(folder, location)
    if location.isascii() or os.path.exists(path):
        return path
    forms = (_joined(folder, unicodedata.normalize(form, location)) for form in ("NFC", "NFD"))
    return next((form for form in forms if os.path.exists(form)), path)


def _joined(folder: str, location: str) -> str:
    path = os.path.join(folder, location)
    return os.path.normpath(path) if os.pardir not in path else path


def _bare_base64(text: str) -> bytes | None:
    """The bytes of base64 without `data:` in front, if they begin as an image does; a JPEG's looks like a path."""
    try:
        data = _decode(text)
    except RowError:
        return None
    return data if len(text) >= 64 and data.startswith(_SIGNATURES) else None


def _decode(encoded: str) -> bytes:
    """Base64 in any of its forms: with line breaks, URL-safe, without its padding."""
    packed = "".join(encoded.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(f"an image is not valid base64: {show(str(error))}") from None


def is_pil(value: object) -> bool:
    """Without importing Pillow, which text alone does not need."""
    return any(base.__module__.startswith("PIL.") for base in type(value).__mro__)


def png(image: Any) -> bytes:
    """A PIL image as a PNG file: lossless, upright and in RGB at once, since PNG lacks some of PIL's modes.

    What is transparent or of 16 bits stays so, for `Image.load` to treat and note as it does those of files.
    """
    _, ops = _pil()
    buffer = io.BytesIO()
    try:
        image = ops.exif_transpose(image)
        if image.mode not in _SIXTEEN_BITS:
            image = image.convert("RGBA" if image.has_transparency_data else _rgb_or_float(image))
        image.save(buffer, "PNG", compress_level=1)
    except RowError:
        raise
    except Exception as error:  # a lazily opened file is only read here
        raise RowError(f"an image cannot be read: {show(str(error) or type(error).__name__)}") from None
    return buffer.getvalue()


def blanked(image: Image) -> Image:
    """An image of the same size in one colour: its mean, or another where it has only one colour itself."""
    pil, _ = _pil()
    pixels = image.load()
    colour = pixels.resize((1, 1), pil.Resampling.BOX).getpixel((0, 0))
    if all(low == high for low, high in pixels.getextrema()):
        colour = tuple(0 if value > 127 else 255 for value in colour)
    return Image(None, png(pil.new("RGB", pixels.size, colour)))


def _upright_rgb(image: Any) -> tuple[Any, tuple[str, ...]]:
    pil, ops = _pil()
    image = ops.exif_transpose(image)
    if image.mode in _SIXTEEN_BITS:
        return _eight_bits(image).convert("RGB"), (DEEP,)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            white = pil.new("RGBA", image.size, "white")
            return pil.alpha_composite(white, image).convert("RGB"), (TRANSPARENT,)
    return image.convert(_rgb_or_float(image)), ()


def _rgb_or_float(image: Any) -> str:
    """The mode to convert to: RGB."""
    if image.mode == "F":
        raise RowError("its pixels are floating-point numbers, and it is not known which is white: save it with 8 bits")
    return "RGB"


def _eight_bits(image: Any) -> Any:
    """Greyscale of 16 bits: Pillow's own conversion would cut at 255 and make nearly all of it white."""
    image = image.convert("I")
    if image.getextrema()[1] > 65535 or image.getextrema()[0] < 0:
        raise RowError("its pixels are 32-bit numbers, and it is not known which is white: save it with 8 bits")
    return image.point(lambda value: value * (1 / 256) + 0).convert("L")


def _pil() -> tuple[Any, Any]:
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError:
        raise DataError("rows with images need Pillow: pip install 'kdtrain[vision]'") from None
    return PIL.Image, PIL.ImageOps
