"""Documented options that this version does not implement yet: each is refused, never silently ignored.

Implementing one means removing its line.
"""

from __future__ import annotations

from collections.abc import Callable

from kdtrain.config.schema import DataSource, RunConfig
from kdtrain.config.tree import KeyPath, Problem


def _sources(config: RunConfig) -> list[tuple[KeyPath, DataSource]]:
    parts = (("train", config.data.train), ("eval", config.data.eval or ()))
    return [(("data", name, index), source) for name, sources in parts for index, source in enumerate(sources)]


def _where(fits: Callable[[DataSource], bool], option: str) -> Callable[[RunConfig], list[KeyPath]]:
    return lambda config: [(*path, option) for path, source in _sources(config) if fits(source)]


def _option(path: str, used: Callable[[RunConfig], bool]) -> Callable[[RunConfig], list[KeyPath]]:
    return lambda config: [tuple(path.split("."))] if used(config) else []


# What it is called in the message, and where a config asks for it.
NOT_AVAILABLE: tuple[tuple[str, Callable[[RunConfig], list[KeyPath]]], ...] = (
    ("a quantised student", _option("model.quantization", lambda c: c.model.quantization is not None)),
    ("a quantised teacher", _option("rlhf.teacher.quantization", lambda c: c.rlhf.teacher.quantization is not None)),
    ("a teacher of this kind", _option("rlhf.teacher.backend", lambda c: c.rlhf.teacher.backend != "hf")),
    ("a prefix for the teacher", _option("rlhf.teacher.prefix", lambda c: c.rlhf.teacher.prefix is not None)),
    ("going on with an adapter", _option("model.adapter", lambda c: c.model.adapter is not None)),
    ("packing", _option("data.packing", lambda c: c.data.packing)),
    ("padding-free training", _option("data.padding_free", lambda c: c.data.padding_free)),
    ("streaming", _where(lambda source: source.streaming, "streaming")),
)


def check_available(config: RunConfig) -> list[Problem]:
    """One error for each use of an option that is not available yet."""
    return [
        Problem(path, f"not available yet: {what}", "remove it, or wait for a later version")
        for what, find in NOT_AVAILABLE
        for path in find(config)
    ]
