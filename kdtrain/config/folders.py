"""Local folders: where a run writes, never over a model or data, and whether the models in them can be loaded."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdtrain.config.adapters import is_adapter_folder, levels, model_below
from kdtrain.config.model_folder import ADAPTER_CONFIG, INDEX, WEIGHTS, findings
from kdtrain.config.other_weights import without_config, without_weights
from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import KeyPath, Problem, Written
from kdtrain.errors import PreflightError

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def _models(config: RunConfig) -> Iterator[tuple[KeyPath, str, Mapping[str, Any]]]:
    """The models in use: option, name, and other arguments of `from_pretrained`."""
    rlhf = config.rlhf
    yield ("model", "model"), config.model.model, config.model.init_kwargs
    if config.asks_teacher and rlhf.teacher.backend == "hf" and rlhf.teacher_model:
        yield ("rlhf", "teacher_model"), rlhf.teacher_model, rlhf.teacher_model_init_kwargs or {}


def broken_models(config: RunConfig) -> Iterator[Problem]:
    """What keeps the local models in use from being loaded, as far as their files show it."""
    for path, named, loading in _models(config):
        try:
            name = model_below(named)
        except PreflightError:
            continue  # found by another rule
        folder = Path(name)
        if not folder.is_absolute() or not (folder / "config.json").is_file():
            continue  # a hub id, or found by another rule
        for found in findings(folder):
            yield replace(found, path=path, message=f"cannot be loaded: {found.message}")
        has_weights = (folder / WEIGHTS).exists() or (folder / INDEX).exists()
        if not has_weights and not {"variant", "subfolder"} & loading.keys():
            yield Problem(path, *without_weights(folder))
        if not has_tokenizer(folder):
            yield Problem(path, f"has no tokenizer: {name}", "save the tokenizer that it was trained with beside it")


def model_folders(config: RunConfig, written: Written) -> Iterator[Problem]:
    """A local model must be a model folder; only those in use are checked."""
    used = [(path, name, "config.json") for path, name, _ in _models(config)]
    if config.rlhf.teacher.is_served and config.asks_teacher:
        yield from _tokenizer_folder(config)
    if config.model.adapter:
        used.append((("model", "adapter"), config.model.adapter, ADAPTER_CONFIG))
    if config.rlhf.teacher.adapter and config.rlhf.teacher.backend != "cache":  # which does without the teacher
        used.append((("rlhf", "teacher", "adapter"), config.rlhf.teacher.adapter, ADAPTER_CONFIG))
    for path, name, file in used:
        folder = Path(name)
        if file == "config.json" and is_adapter_folder(name):
            yield from _base_of_adapter(path, name)
        elif not folder.is_absolute() or (folder / file).is_file():
            continue
        elif not folder.exists():
            yield Problem(path, f"no such folder: {name}", _neighbour(folder) or "give a model folder or a hub id")
        elif not folder.is_dir():
            yield Problem(path, f"a file, not a model folder: {name}", f"give the folder with its {file}")
        elif file == "config.json":
            yield Problem(path, *without_config(folder))
        else:
            yield Problem(path, f"not the folder of an adapter, it has no {file}: {name}", "give the folder with it")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the files of one: transformers makes an empty one of a folder without."""
    return any((folder / file).exists() for file in _TOKENIZERS)


def _neighbour(folder: Path) -> str:
    """What was probably meant by a folder that is not there."""
    try:
        names = sorted(entry.name for entry in folder.parent.iterdir() if entry.is_dir())
    except OSError:
        return ""
    near = difflib.get_close_matches(folder.name, names, n=1)
    return f"did you mean {folder.parent / near[0]}?" if near else ""


def _tokenizer_folder(config: RunConfig) -> Iterator[Problem]:
    """Of a teacher on a server, `teacher_model` names the tokenizer alone."""
    folder = Path(config.rlhf.teacher_model or "")
    if folder.is_absolute() and not has_tokenizer(folder):
        message = f"{'has no tokenizer' if folder.is_dir() else 'no such folder'}: {folder}"
        hint = "give the folder or hub id of the served model's tokenizer, or remove it where that is the student's"
        yield Problem(("rlhf", "teacher_model"), message, hint)


def _base_of_adapter(path: KeyPath, name: str) -> Iterator[Problem]:
    """What is wrong with the base that an adapter's folder names."""
    try:
        model_below(name)
    except PreflightError as error:
        yield Problem(path, str(error))


def output_folder(config: RunConfig, written: Written) -> Iterator[Problem]:
    """`training.output_dir` must not be, lie in, or hold anything that the run reads."""
    name = config.training.get("output_dir")
    output = _real(name) if isinstance(name, str) and name else None
    for option, what, path in _read(config) if output else ():
        source = _real(path)
        if output is None or source is None:
            continue
        if option in _SHARED and not _same(output, source):
            continue
        if _same(output, source):
            relation = "is"
        elif any(_same(parent, source) for parent in output.parents):
            relation = "lies in"
        elif any(_same(parent, output) for parent in source.parents):
            relation = "holds"
        else:
            continue
        message = f"{relation} what this run reads, and would write over or into it: {what} {path} ({option})"
        yield Problem(("training", "output_dir"), message, "name a folder of the run's own, such as runs/first")
        return


# Folders that may hold others, a run's own too.
_SHARED = ("data.image_root", "data.cache_dir")


def _read(config: RunConfig) -> Iterator[tuple[str, str, str]]:
    """Option, kind and path of everything on this machine that a run reads."""
    teacher = config.rlhf.teacher
    models = (
        ("model.model", "the student", config.model.model),
        ("model.adapter", "the student's adapter", config.model.adapter),
        ("rlhf.teacher_model", "the teacher", config.rlhf.teacher_model),
        ("rlhf.teacher.adapter", "the teacher's adapter", teacher.adapter),
        ("rlhf.teacher.path", "the teacher's cache", teacher.path),
    )
    for option, what, name in models:
        if name and os.path.isabs(name):  # local paths are absolute once loaded
            yield option, what, name
            yield from ((option, "the model below an adapter,", base) for base in _below(name))
    for part, sources in (("train", config.data.train), ("eval", config.data.eval_sources)):
        for number, source in enumerate(sources):
            if source.is_local:
                yield f"data.{part}[{number}]" if len(sources) > 1 else f"data.{part}", "the data", source.path
    for option, what, folder in zip(
        _SHARED, ("images", "encoded rows"), (config.data.image_root, config.data.cache_dir), strict=True
    ):
        if folder:
            yield option, what, folder


def _below(name: str) -> list[str]:
    """The local models that an adapter stands on."""
    try:
        return [base for base in levels(name)[1:] if os.path.isabs(base)]
    except PreflightError:
        return []  # found by another rule


def _real(path: str) -> Path | None:
    """Where a path leads to through links; None for what can be no path."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):  # too long, or with a NUL
        return None


def _same(first: Path, second: Path) -> bool:
    """Whether two paths without links are one place; a file system may ignore the case of letters."""
    if first == second:
        return True
    if str(first).casefold() != str(second).casefold():
        return False
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False
