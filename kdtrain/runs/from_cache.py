"""Training from a cache: what is checked before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from kdtrain.config import RunConfig
from kdtrain.config.schema import DataSource
from kdtrain.data.errors import show
from kdtrain.data.row_key import row_keys
from kdtrain.errors import DataError, PreflightError
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.runs.made_from import made_from
from kdtrain.teachers import CachedTeacher
from kdtrain.teachers.cached.manifest import Manifest, differences

_SHOWN = 3


def open_cache(config: RunConfig, processing: PreTrainedTokenizerBase | ProcessorMixin) -> CachedTeacher:
    """The cache that a config names, if it was made from what this run has.

    Raises:
        DataError: it cannot be read.
        PreflightError: it was made from something else: all that differs, one line each.
    """
    options = config.rlhf.teacher
    assert options.path is not None, "the config is checked for it"
    folder = Path(options.path)
    manifest = Manifest.read(folder)
    found = differences(manifest.made_from, made_from(config, processing, like=manifest.made_from))
    if found:
        listed = "\n  ".join(found)
        raise PreflightError(
            f"The cache {show(str(folder), 400)} cannot be used (rlhf.teacher.path):\n  {listed}\nIts targets are not "
            "those of this run. Change the config back, or write a cache for it: kdtrain cache CONFIG --out DIR, with "
            "a new folder and the teacher's own backend."
        )
    teacher = CachedTeacher(folder, lookahead=options.lookahead)
    if len(teacher.reader) != manifest.rows:
        raise DataError(
            f"The cache {show(str(folder), 400)} (rlhf.teacher.path) has {len(teacher.reader):,} rows where "
            f"{manifest.rows:,} were written: one of its files is missing. Write it anew, with kdtrain cache CONFIG "
            "--out DIR."
        )
    return teacher


def check_rows(
    cached: CachedTeacher,
    config: RunConfig,
    train: datasets.Dataset | None,
    evaluation: datasets.Dataset | None,
    teacher: str | None = None,
) -> None:
    """Refuse rows that the cache has no targets for; those that supervise nothing need none.

    Args:
        train: None where nothing is trained, and the evaluation's rows are compared with the teacher whatever
            `rlhf.eval_kd` says.
        teacher: of several, the one whose targets the cache has: it needs those of its own rows alone.

    Raises:
        DataError: how many there are, where the first ones stand, and why that may be.
    """
    parts = [] if train is None else [("data.train", train, config.data.train)]
    if evaluation is not None and (train is None or config.options.eval_kd):
        parts.append(("data.eval", evaluation, config.data.eval_sources or config.data.train))
    said, none_of_train = [], False
    for name, rows, sources in parts:
        if teacher is not None:
            rows = rows.select([row for row, one in enumerate(rows["teacher"][:]) if one == teacher])
        if len(rows) and (missing := list(_missing(cached, rows))):
            places = "".join(f"\n  {_place(row, sources)}" for row in missing[:_SHOWN])
            said.append(f"{len(missing):,} of {len(rows):,} rows of {name} have no targets there. The first:{places}")
            none_of_train |= name == "data.train" and len(missing) == len(rows)
    if said:
        listed = "\n".join(said)
        raise DataError(
            f"The cache {show(str(cached.folder), 400)} (rlhf.teacher.path) is of other rows:\n{listed}\n"
            f"{_reason(len(said) == len(parts) and none_of_train)} Write a cache of the rows as they are, into a new "
            "folder: kdtrain cache CONFIG --out DIR."
        )


def _missing(teacher: CachedTeacher, rows: datasets.Dataset) -> Iterator[str]:
    """The ids of rows that have supervised tokens and are not in the cache."""
    keys = row_keys(rows, chats=teacher.aligner is not None)
    unknown = [row for row, key in enumerate(keys) if key not in teacher.reader]
    columns = rows.select(unknown).select_columns(["labels", "row_id"]).with_format("numpy")
    for some in columns.iter(1000):
        for labels, name in zip(some["labels"], some["row_id"], strict=True):
            if (np.asarray(labels)[1:] != IGNORE_INDEX).any():
                yield str(name)


def _place(row_id: str, sources: Sequence[DataSource]) -> str:
    """Where a row stands, of its id "source:row" or "source:row:turn"."""
    source, row, *_ = row_id.split(":")
    return f"{show(sources[int(source)].path, 400)}, row {row} (counted from 0)"


def _reason(none: bool) -> str:
    if none:
        return "Not one of them is there: it was written from other files, or from rows that are encoded otherwise."
    return (
        "These were added or changed after it was written, or it was written from fewer of them (limit, "
        "custom.sample_limit, without data.eval)."
    )
