"""Where a run writes, beside what it reads: never over a model or data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import Problem, dotted

if TYPE_CHECKING:
    from kdtrain.config.rules import Written


class _Read(NamedTuple):
    """Something on this machine that a run reads."""

    option: str
    what: str
    path: Path


def output_folder(config: RunConfig, written: Written) -> Iterator[Problem]:
    """`training.output_dir` must not be, lie in, or hold anything that the run reads."""
    name = config.training.get("output_dir")
    if not isinstance(name, str) or not name:
        return
    output = _real(name)
    for option, what, path in _read(config):
        source = _real(path)
        if output is None or source is None:
            continue
        if _same(output, source):
            relation = "is"
        elif any(_same(parent, source) for parent in output.parents):
            relation = "lies in"
        elif any(_same(parent, output) for parent in source.parents):
            relation = "holds"
        else:
            continue
        yield Problem(
            ("training", "output_dir"),
            f"{relation} what this run reads, and would write over or into it: {what} {path} ({option})",
            "name a folder of the run's own, such as runs/first",
        )
        return


def _read(config: RunConfig) -> Iterator[_Read]:
    rlhf = config.rlhf
    models = (
        ("model.model", "the student", config.model.model),
        ("rlhf.teacher_model", "the teacher", rlhf.teacher_model),
        ("rlhf.teacher.adapter", "the teacher's adapter", rlhf.teacher.adapter),
        ("rlhf.teacher.path", "the teacher's cache", rlhf.teacher.path),
    )
    for option, what, name in models:
        if name and os.path.isabs(name):  # local paths are absolute once loaded
            yield _Read(option, what, Path(name))
    for part, sources in (("train", config.data.train), ("eval", config.data.eval or ())):
        for number, source in enumerate(sources):
            if source.is_local:
                option = dotted(("data", part, number)) if len(sources) > 1 else f"data.{part}"
                yield _Read(option, "the data", Path(source.path))


def _real(path: str | Path) -> Path | None:
    """Where a path leads to through links; None for what can be no path."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):  # too long, or with a NUL
        return None


def _same(first: Path, second: Path) -> bool:
    """Whether two paths without links are one place; a file system may tell no capitals from small letters."""
    if first == second:
        return True
    if str(first).casefold() != str(second).casefold():
        return False
    try:
        return os.path.samefile(first, second)
    except OSError:
        return False
