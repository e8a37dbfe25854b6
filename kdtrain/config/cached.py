"""A cache as the teacher: what its folder shows without torch, and what a cache cannot be asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdtrain.config.divergence import used_losses
from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import KeyPath, Problem, Written, dotted
from kdtrain.losses.kinds import WITH_BETA

# As `kdtrain.teachers.cached.manifest` writes it, which is read in full before training.
_MANIFEST = "manifest.json"
_PATH: KeyPath = ("rlhf", "teacher", "path")
_WRITE = "write one with kdtrain cache CONFIG --out DIR"


def cached_teacher(config: RunConfig, written: Written) -> Iterator[Problem]:
    """What keeps a run from being trained from a cache, as far as its options and `manifest.json` show it."""
    if config.rlhf.teacher.backend != "cache" or not config.asks_teacher:
        return
    yield from _unknown_text(config, written)
    yield from features_of(config, "a cache has targets alone")
    if config.rlhf.teacher.path is None:
        return  # said by the rule that asks for it
    found = _read(Path(config.rlhf.teacher.path))
    if isinstance(found, Problem):
        yield found
        return
    mode = _form(found).get("mode")
    yield from _of_other_tokenizer(config, mode)
    if mode == "sample" and config.options.lm_kd_active:
        yield from _drawn_tokens(config, written, _form(found))
    if mode in ("sample", "hidden", "chunks"):
        yield from written.idle(["tail"], f"the cache is of mode {mode}, which leaves nothing out", *_PATH[:2])


def features_of(config: RunConfig, why: str) -> Iterator[Problem]:
    """Terms that compare features, with a teacher that does not run in this process."""
    for name in ("visual_kd", "hidden_kd"):
        if getattr(config.options, name) is not None:
            message = f"has no features to compare ({why}), which custom.{name} needs"
            hint = f"use backend: hf, or set custom.{name}.enabled: false"
            yield Problem(("rlhf", "teacher", "backend"), message, hint)


def _unknown_text(config: RunConfig, written: Written) -> Iterator[Problem]:
    """Answers that do not exist yet."""
    reason = "a cache has no targets for text that does not exist yet"
    for name, needed in (("lmbda", "0"), ("seq_kd", "false")):
        value = getattr(config.rlhf, name)
        if config.options.lm_kd_active and value:
            default = "" if written.has("rlhf", name) else ", the default"
            shown = str(value).lower() if isinstance(value, bool) else f"{value:g}"
            hint = f"set rlhf.{name}: {needed}, or use the teacher itself (another rlhf.teacher.backend)"
            yield Problem(("rlhf", name), f"must be {needed} (it is {shown}{default}): {reason}", hint, on_key=True)


def _of_other_tokenizer(config: RunConfig, mode: Any) -> Iterator[Problem]:
    """Targets of chunks of text where those of the student's tokens are needed, or the other way round."""
    crosses = config.options.crosses_tokenizers
    if crosses and mode != "chunks":
        message = f"has targets for the student's own tokens (mode {mode}), and rlhf.cross_tokenizer compares chunks of"
        hint = "write a cache with rlhf.cross_tokenizer: alm in the config, or remove the option"
        yield Problem(_PATH, f"{message} text", hint)
    if mode == "chunks" and config.options.lm_kd_active and not crosses:
        message = "must be alm: the cache has likelihoods of chunks of text (mode chunks), of a teacher with another"
        hint = "set rlhf.cross_tokenizer: alm (beside one teacher), or write a cache of one with the same tokenizer"
        yield Problem(("rlhf", "cross_tokenizer"), f"{message} tokenizer", hint, on_key=True)


def _drawn_tokens(config: RunConfig, written: Written, form: Mapping[str, Any]) -> Iterator[Problem]:
    """A divergence that drawn tokens do not serve, or another temperature than they were drawn at."""
    rlhf = config.rlhf
    for path, loss in used_losses(config):
        where = dotted(path)
        if loss.divergence not in WITH_BETA:
            message = f"must be one of {', '.join(WITH_BETA)} (it is {loss.divergence}): the cache holds drawn tokens"
            hint = f"set {where}.divergence: jsd and {where}.beta: 0, or write a cache of mode topk or hidden"
            message = f"{message} (mode sample), from which only forward KL can be learnt"
            yield Problem((*path, "divergence"), message, hint)
        elif loss.beta > 0:
            default = "" if written.has(*path, "beta") else ", the default" if path == ("rlhf",) else ""
            message = f"must be 0 (it is {loss.beta:g}{default}): the cache holds drawn tokens (mode sample), from"
            hint = f"set {where}.beta: 0, or write a cache of mode topk or hidden"
            yield Problem((*path, "beta"), f"{message} which only forward KL can be learnt", hint, on_key=True)
    if config.options.selection is not None and config.options.selection.by == "disagreement":
        message = "must be student_entropy: the cache holds drawn tokens (mode sample), and choosing tokens by what was"
        hint = "set rlhf.token_selection.by: student_entropy, or write a cache of mode topk or hidden"
        yield Problem(("rlhf", "token_selection", "by"), f"{message} drawn there makes their gradient wrong", hint)
    drawn_at = form.get("temperature")
    if isinstance(drawn_at, int | float) and drawn_at != rlhf.kd_temperature:
        message = f"must be {drawn_at:g} (it is {rlhf.kd_temperature:g}): the cache holds tokens that were drawn at"
        hint = f"set rlhf.kd_temperature: {drawn_at:g}, or write the cache anew"
        yield Problem(("rlhf", "kd_temperature"), f"{message} {drawn_at:g}", hint, on_key=True)


def gives_top_k(config: RunConfig) -> bool:
    """Whether the teacher's targets are its k most likely tokens, as far as that can be seen here."""
    teacher = config.rlhf.teacher
    if teacher.backend != "cache":
        return teacher.is_served
    found = None if teacher.path is None else _read(Path(teacher.path))
    return isinstance(found, dict) and _form(found).get("mode") == "topk"


def _form(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    form = manifest.get("form")
    return form if isinstance(form, dict) else {}


def _read(folder: Path) -> dict[str, Any] | Problem:
    """The manifest of a complete cache, or what is wrong with the folder."""
    if not folder.exists():
        return Problem(_PATH, f"no such folder: {folder}", _WRITE)
    if not folder.is_dir():
        return Problem(
            _PATH, f"a file, not the folder of a cache: {folder}", "give the folder that kdtrain cache wrote"
        )
    file = folder / _MANIFEST
    if not file.is_file():
        return Problem(_PATH, f"not a cache, it has no {_MANIFEST}: {folder}", _WRITE)
    try:
        manifest = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return Problem(_PATH, f"{file} cannot be read: {error}", "delete the folder, and write the cache anew")
    if not isinstance(manifest, dict) or not _form(manifest):
        return Problem(_PATH, f"{file} is not that of a cache", _WRITE)
    if manifest.get("complete") is not True:
        hint = "finish it with the kdtrain cache command that began it: what is there is kept"
        return Problem(_PATH, f"this cache is not complete, its writing was stopped: {folder}", hint)
    return manifest
