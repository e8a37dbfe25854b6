"""What a cache was made from, and in what a run differs from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kdtrain.data.errors import show
from kdtrain.errors import DataError
from kdtrain.teachers.cached.shard_file import replace_file
from kdtrain.teachers.cached.store import Format

MANIFEST = "manifest.json"
_VERSION = 1  # of the manifest itself and of what it says; another one is refused
_KIND = "kdtrain cache"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. Nothing in it depends on when it was written, or by how many processes."""

    form: Format
    made_from: Mapping[str, Any]
    """By the words that a message has for it ("chat template", "tokenizer", "teacher", "rlhf.teacher.prefix", …): text,
    numbers, or what `identified` makes of things that are long. A run with other values is refused, and each that
    differs is named."""
    versions: Mapping[str, str]
    """Of kdtrain, torch and transformers: for people; not compared."""
    rows: int
    """In all shards together."""
    rows_per_shard: int
    complete: bool

    def write(self, folder: Path) -> None:
        """Replace the file in one move, on the disk before it returns."""
        content = {"kind": _KIND, "version": _VERSION, **{field.name: getattr(self, field.name) for field in _FIELDS}}
        content["form"] = asdict(self.form)
        text = json.dumps(content, indent=2, ensure_ascii=False, default=dict)
        replace_file(folder / MANIFEST, [f"{text}\n".encode()])

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """
        Raises:
            DataError: it is missing, unreadable, or of another version.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise DataError(
                f"{_shown(folder)} is no cache: it has no {MANIFEST}. Write one with kdtrain cache."
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{_shown(path)} cannot be read: {show(str(error))}. Write the cache anew.") from error
        if not isinstance(content, dict) or content.get("kind") != _KIND:
            raise DataError(f"{_shown(path)} is not that of a cache. Name a folder that kdtrain cache has written.")
        if content.get("version") != _VERSION:
            raise DataError(
                f"{_shown(path)} is of version {show(content.get('version'))}, and this kdtrain reads {_VERSION}: "
                "write the cache anew, or train with the kdtrain that wrote it."
            )
        try:
            return cls(**{f.name: content[f.name] for f in _FIELDS} | {"form": Format(**content["form"])})
        except (KeyError, TypeError) as error:
            raise DataError(f"{_shown(path)} is damaged ({show(str(error))}). Write the cache anew.") from error


_FIELDS = fields(Manifest)


def identified(name: str, content: str) -> dict[str, str]:
    """Something long in `made_from`: a name for people, and a hash of what is in it, which alone is compared."""
    return {"name": name, "content": content}


def differences(cache: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing in which a run differs from what a cache was made from: what, there, here.

    What one of them does not know is not compared: a run from a cache need not have the teacher.
    """
    return [
        _difference(what, cache[what], run[what]) for what in cache if what in run and _differ(cache[what], run[what])
    ]


def _differ(there: Any, here: Any) -> bool:
    return bool(content_of(there) != content_of(here))


def content_of(value: Any) -> Any:
    """What is compared of a value in `made_from`."""
    return value["content"] if isinstance(value, Mapping) and "content" in value else value


def _difference(what: str, there: Any, here: Any) -> str:
    names = [_name(there), _name(here)]
    if names[0] == names[1]:  # the same folder, or the same number of characters, with something else in it
        names = [
            f"{name}, content {str(content_of(value))[:8]}" for name, value in zip(names, (there, here), strict=True)
        ]
    other = f"other {what}" if what == "rows" else f"another {what}"
    return f"This cache was made with {other}: {names[0]}. This run has: {names[1]}."


def _name(value: Any) -> str:
    return show(value["name"] if isinstance(value, Mapping) and "content" in value else value, 200)


def _shown(path: Path) -> str:
    return show(str(path), 400)
