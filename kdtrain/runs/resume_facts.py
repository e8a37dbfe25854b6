"""What a run is made from, kept with every checkpoint: `facts` in its manifest, which a resumed run is compared with.

| key | what |
|---|---|
| `config` | the config, defaults filled in |
| `training` | the fields of GKDConfig that may not change unsaid, as they were in force |
| `content` | what options name: models, tokenizer, chat template, cache; each with a name and a hash |
| `data` | of each source of `train` and `eval`: path, rows, and a hash of what was read |

Of models the files `config.json`, `adapter_config.json` and the weights are compared: up to 64 MiB a file whole, of
larger ones the size and 64 pieces of 16 KiB spread over it, for reading 100 GB would take minutes. Of a model of the
hub it is the commit. Of image files it is the size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from kdtrain.config import RunConfig
from kdtrain.config.adapters import adapter_base, is_adapter_folder
from kdtrain.config.changes import compared_fields
from kdtrain.data.multimodal import image_content, reads_images, tokenizer_content
from kdtrain.errors import KdtrainError
from kdtrain.teachers.cached.manifest import MANIFEST as CACHE_MANIFEST
from kdtrain.teachers.cached.manifest import identified

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin
    from trl.experimental.gkd import GKDConfig

    from kdtrain.data import BuildReport
    from kdtrain.runs.build import Given
    from kdtrain.runs.read_data import RunData

_WHOLE = 64 << 20
_PIECES, _PIECE = 64, 16 << 10
_TOKENIZER = ("tokenizer.json", "chat_template.jinja")


def facts_of(config: RunConfig, args: GKDConfig) -> dict[str, Any]:
    """`config` and `training`: what is known before anything is read."""
    training = {name: _plain(getattr(args, name)) for name in compared_fields() if hasattr(args, name)}
    return {"config": config.model_dump(mode="json"), "training": training}


def defaults_of(args: GKDConfig) -> dict[str, Any]:
    """What the fields of `training` are where nobody sets them."""
    return {one.name: _plain(one.default) for one in fields(args) if one.default is not MISSING}


def content_of(
    config: RunConfig, processing: PreTrainedTokenizerBase | ProcessorMixin, given: Given
) -> dict[str, dict[str, str] | None]:
    """`content`: what the options name, by what it is; None where that is not known, as of a model in memory."""
    model = config.model
    tokenizer = getattr(processing, "tokenizer", processing)
    template = processing.chat_template or tokenizer.chat_template or ""
    teachers: dict[str, dict[str, str] | None] = {}
    for name, one in config.by_teacher.items():
        teachers |= _teacher(one, f"teacher {name}".rstrip(), unknown=given.teacher is not None)
    return {
        "student": None if given.model is not None else _model(model.model, model.revision),
        "student's adapter": _model(model.adapter) if model.adapter else _NONE,
        "tokenizer": identified(
            f"{type(tokenizer).__name__} of {len(tokenizer):,} tokens", _hash(tokenizer_content(tokenizer))
        ),
        "chat template": identified(f"{len(template):,} characters", _hash(template)),
        "image processor": (
            identified(type(processing.image_processor).__name__, _hash(image_content(processing)))
            if reads_images(processing)
            else _NONE
        ),
        **teachers,
    }


def _teacher(config: RunConfig, name: str, *, unknown: bool) -> dict[str, dict[str, str] | None]:
    """What is named of a teacher, as `name`."""
    rlhf, teacher = config.rlhf, config.rlhf.teacher
    asked, cached = config.asks_teacher and teacher.backend != "self", teacher.backend == "cache"
    return {
        name: (
            _NONE
            if not asked or cached
            else None
            if unknown
            else _model(rlhf.teacher_model, teacher.revision, _TOKENIZER)
            if rlhf.teacher_model
            else _NONE
        ),
        f"{name}'s adapter": _model(teacher.adapter) if teacher.adapter and asked and not cached else _NONE,
        f"{name}'s cache": _cache(teacher.path) if cached and teacher.path else _NONE,
    }


def data_of(data: RunData) -> dict[str, list[dict[str, Any]]]:
    """`data`: the rows that were read."""
    reports: dict[str, BuildReport | None] = {"train": data.report, "eval": data.evaluation_report}
    return {name: [vars(one) for one in report.contents] for name, report in reports.items() if report is not None}


_NONE = identified("none", "none")


def _model(name: str, revision: str | None = None, more: tuple[str, ...] = ()) -> dict[str, str] | None:
    """A folder by what is in it, wherever it lies, its base's content too where it is an adapter; of the hub a commit.

    None: nothing is known of it.
    """
    folder = Path(name)
    if not folder.is_dir():
        commit = None if folder.is_absolute() else _commit(name, revision)
        return identified(name, f"hub {name}@{commit}") if commit else None
    files = [
        *(folder / one for one in ("config.json", "adapter_config.json", *more)),
        *sorted(folder.glob("*.safetensors")),
        *sorted(folder.glob("*.gguf")),
    ]
    try:
        content = _hash([(file.name, file_fingerprint(file)) for file in files if file.is_file()])
        if not is_adapter_folder(name):
            return identified(name, content)
        base = _model(adapter_base(name), revision)
    except (OSError, KdtrainError):
        return None
    return identified(f"{name} on {base['name']}", _hash([content, base["content"]])) if base else None


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a hub model that is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    return Path(found).parent.name if isinstance(found, str) else None


def file_fingerprint(path: Path) -> str:
    """A hash of a file: of all of it up to 64 MiB, else of its size, and of 64 pieces of 16 KiB from begin to end."""
    size = path.stat().st_size
    digest = xxhash.xxh3_128(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            digest.update(file.read())
            return digest.hexdigest()
        for number in range(_PIECES):
            file.seek((size - _PIECE) * number // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _cache(path: str) -> dict[str, str] | None:
    """The targets of a cache by its manifest, which says what they are, and by the sizes of its files."""
    folder = Path(path)
    try:
        sizes = sorted(
            (file.relative_to(folder).as_posix(), file.stat().st_size) for file in folder.rglob("*.safetensors")
        )
        return identified(path, _hash([(folder / CACHE_MANIFEST).read_text("utf-8"), sizes]))
    except OSError:
        return None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, os.PathLike) or not isinstance(value, str | int | float | bool | None):
        return str(value)
    return value
