"""`completions.parquet`: answers that were generated while training; and showing a few of them.

One row for each answer, one row group for each logged step. A Parquet file cannot be appended to: with each logged step
the file is written anew, one row group at a time, and takes the place of the old one in one move. So it can be read at
any moment, whatever becomes of the process, and memory holds the answers of one step at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.disk import writing
from kdtrain.errors import CheckpointError
from kdtrain.ranks import is_main
from kdtrain.runs.build import Reporter
from kdtrain.runs.folder import SameFolder, remove_unfinished, replaced
from kdtrain.runs.resume import resume_command
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.completions import Completion

MOST_STEPS = 256
"""Logged steps that the file holds. Where there are more, those of every second multiple of `log_completions_steps`
leave, then every second of the rest: they stay spread over the run, and time and disk stay bounded."""

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("row", pa.string()),
        ("sample", pa.int64()),
        ("written_by", pa.string()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("tokens", pa.int64()),
        ("stop_reason", pa.string()),
        ("reverse_kl", pa.float64()),
        ("selected", pa.bool_()),
        ("exact", pa.bool_()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_reverse_kl", pa.list_(pa.float32())),
    ]
)
"""As the fields of `Completion`; `tokens` is how many there are."""


class ShowCompletions(TrainerCallback):
    """Shows some of the window that is about to train, on rank 0."""

    def __init__(self, trainer: GKDTrainerWithMetrics, reporter: Reporter) -> None:
        self._trainer, self._reporter = trainer, reporter

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if is_main() and (found := self._trainer.completions.newest):
            self._reporter.completions(found)


class WriteCompletions(TrainerCallback):
    """Writes them on rank 0, before the step trains.

    On resume those of steps after the one resumed from are dropped, also where none are logged any more.
    """

    def __init__(self, trainer: GKDTrainerWithMetrics, path: Path) -> None:
        self._trainer, self._path = trainer, path
        self._folder: SameFolder | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not is_main():
            return
        self._folder = SameFolder(self._path.parent)
        remove_unfinished(self._path)
        steps = self._steps()
        if kept := [step for step in steps if step <= state.global_step]:
            if kept != steps:
                self._rewrite(kept)
        else:
            self._path.unlink(missing_ok=True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if is_main() and (found := self._trainer.completions.newest):
            if self._folder is not None:
                self._folder.check()
            steps = [*self._steps(), found[0].step]
            self._rewrite(spread(steps, self._trainer.completions.every or 1), found)

    def _steps(self) -> list[int]:
        """Of each row group."""
        if not self._path.exists():
            return []
        with _open(self._path) as file:
            groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
            return [group.column(0).statistics.min for group in groups]

    def _rewrite(self, steps: Iterable[int], more: Sequence[Completion] = ()) -> None:
        """The row groups of some steps, and then more rows."""
        with (
            writing(self._path, f"Then go on with {resume_command()}"),
            replaced(self._path) as path,
            pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer,
        ):
            for table in self._tables(frozenset(steps)):
                writer.write_table(table)
            if more:
                writer.write_table(_table(more))

    def _tables(self, steps: frozenset[int]) -> Iterator[pa.Table]:
        found = self._steps()
        if found:
            with _open(self._path) as file:
                yield from (file.read_row_group(i) for i, step in enumerate(found) if step in steps)


def spread(steps: Sequence[int], every: int, most: int = MOST_STEPS) -> list[int]:
    """`most` of them at most, the last one always."""
    apart = 1
    kept = list(steps)
    while len(kept) > most and apart <= steps[-1] // every:
        apart *= 2
        kept = [step for step in steps[:-1] if step // every % apart == 0] + list(steps[-1:])
    if len(kept) > most:  # many before the first multiple: an earlier part of the run has logged more often
        kept = kept[:-1][:: -(-(len(kept) - 1) // (most - 1))] + kept[-1:]
    return kept


def _table(found: Sequence[Completion]) -> pa.Table:
    rows = [{**vars(one), "tokens": len(one.token_ids), "reverse_kl": one.reverse_kl} for one in found]
    return pa.Table.from_pylist(rows, SCHEMA)


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
        if file.schema_arrow.equals(SCHEMA):
            return file
        file.close()
        reason = "it has other columns than this version writes"
    except pa.ArrowInvalid as error:
        reason = str(error).strip().splitlines()[0]
    raise CheckpointError(f"{path} cannot be gone on with ({reason}): move it away, and resume once more.")
