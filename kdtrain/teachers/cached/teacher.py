"""A teacher whose targets were written before: no model is in memory.

Shapes: B rows, S supervised tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from kdtrain.data.batch import Batch
from kdtrain.data.errors import show
from kdtrain.errors import DataError, PreflightError, TeacherError
from kdtrain.losses.sampled import SampledTargets, SparseTargets
from kdtrain.losses.topk import TopKLogprobs
from kdtrain.teachers.base import DenseTargets, Targets, Teacher
from kdtrain.teachers.cached.aligned import NO_KEYS, StoredChunks
from kdtrain.teachers.cached.chunk_format import RowChunks
from kdtrain.teachers.cached.store import CacheReader
from kdtrain.teachers.other_tokenizer import targets_of_chunks


class CachedTeacher(Teacher):
    """Targets from a folder that `kdtrain cache` has written, for the rows that are in it.

    Rows are found by what is in them (`batch.rows.keys`, of `Collator(…, row_keys=True)`), so that they get their own
    targets however they are shuffled, mixed or resumed. A thread reads them, up to `lookahead` windows ahead.

    One of mode `chunks` (`rlhf.cross_tokenizer: alm`) also gives the collator its `other_tokenizer`: `aligner`.

    Args:
        folder: of the cache.
        lookahead: see `Teacher.lookahead`.

    Raises:
        DataError: a file of it is missing, damaged or of another version: which one, and what to do.
    """

    waits = True

    def __init__(self, folder: Path, *, lookahead: int = 2) -> None:
        self.folder, self.lookahead = folder, lookahead
        self.reader = CacheReader(folder)
        form = self.reader.form
        self.vocab_size = form.vocab_size
        self.drawn_at = form.temperature if form.mode == "sample" else None
        self.aligner = StoredChunks(self.reader) if form.mode == "chunks" else None
        self._head = None if self.reader.head is None else self.reader.head.first_columns(form.vocab_size)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdtrain-cache")
        self._windows: deque[_Window] = deque()

    @property
    def answers_anything(self) -> bool:
        """See `Teacher.answers_anything`: a row in which a token was changed is another row."""
        return False

    def place(self, accelerator: Accelerator) -> None:
        """The head of hidden states to the device, once; the rest goes there batch by batch."""
        if (head := self._head) is not None:
            bias = None if head.bias is None else head.bias.to(accelerator.device)
            self._head = replace(head, weight=head.weight.to(accelerator.device), bias=bias)

    def prepare(self, window: Sequence[Batch]) -> None:
        """Begin to read the targets of a window.

        Raises:
            PreflightError: batches whose rows have no keys.
            TeacherError: answers that were generated, which no cache has targets for.
        """
        batches = [_supervised(batch) for batch in window]
        if batches:
            self._windows.append([(rows.keys, self._thread.submit(self._read, rows)) for rows in batches])
        # The one that trains, those ahead of it, and a batch of an evaluation: more are never asked for again.
        while len(self._windows) > self.lookahead + 2:
            self._windows.popleft()

    def wait(self, window: Sequence[Batch]) -> None:
        """See `Teacher.wait`."""
        for batch in window:
            read, _ = self._find(batch)
            self._result(read[1])

    def targets(self, batch: Batch) -> Targets:
        """The stored targets of the supervised tokens, in the order of `labels_S`; waits until they are read.

        Raises:
            TeacherError: a row is not in the cache, or a file of it is damaged.
            PreflightError: as `prepare`.
        """
        read, window = self._find(batch)
        scores = self._result(read[1])
        window.remove(read)
        if not window:
            self._windows.remove(window)
        if isinstance(scores, list):
            return _of_chunks(scores, batch)
        if isinstance(scores, DenseTargets):
            return Targets(DenseTargets(scores.hidden.to(batch.labels.device), self._head or scores.head))
        return Targets(scores.to(batch.labels.device))

    def close(self) -> None:
        """See `Teacher.close`."""
        self._windows.clear()
        self._thread.shutdown(cancel_futures=True)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _find(self, batch: Batch) -> tuple[_Read, _Window]:
        """Of the newest window: an evaluation may come upon rows that are read ahead, which stay as they are."""
        keys = _supervised(batch).keys
        found = [(read, window) for window in self._windows for read in window if read[0] == keys]
        if not found:
            self.prepare([batch])
            return self._windows[-1][0], self._windows[-1]
        return found[-1]

    def _result(self, targets: Future[Scores]) -> Scores:
        begun = time.perf_counter()
        try:
            return targets.result()
        except CancelledError:
            raise TeacherError("The teacher was closed before its targets were read.") from None
        finally:
            self.waited_s += time.perf_counter() - begun

    def _read(self, rows: _Supervised) -> Scores:
        """The targets of some rows; in the thread."""
        try:
            self._check(rows)
            if self.reader.form.mode == "chunks":
                return self.reader.read_chunks(rows.keys)
            return self.reader.read(rows.keys) if rows.keys else self._none()
        except DataError as error:
            raise TeacherError(str(error)) from error

    def _none(self) -> Scores:
        """Targets of no tokens: a rank that only fills up an epoch goes through the same motions as the others."""
        if self._head is not None:
            weight = self._head.weight
            return DenseTargets(weight.new_zeros(0, weight.shape[1]), self._head)
        kind = SampledTargets if self.drawn_at is not None else TopKLogprobs
        return kind(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1))

    def _check(self, rows: _Supervised) -> None:
        cache = f"The cache {show(str(self.folder), 400)}"
        missing = [name for key, name in zip(rows.keys, rows.names, strict=True) if key not in self.reader]
        if missing:
            more = f" and {len(missing) - 1} more of its batch" if missing[1:] else ""
            raise TeacherError(
                f"{cache} has no targets for row {show(missing[0], 60)}{more}. Its text, its answer or how it is "
                "encoded is another than when the cache was written: write a cache of the rows as they are, with "
                "kdtrain cache CONFIG --out DIR."
            )
        for name, stored, tokens in zip(rows.names, self.reader.counts(rows.keys), rows.counts, strict=True):
            if stored != tokens:
                raise TeacherError(
                    f"{cache} has targets for {stored} tokens of row {show(name, 60)}, of which {tokens} are "
                    "supervised: it is damaged. Delete it, and write it anew with kdtrain cache CONFIG --out DIR."
                )


Scores = SparseTargets | DenseTargets | list[RowChunks]
_Read = tuple[tuple[bytes, ...], "Future[Scores]"]
"""The keys of a batch's rows, and where its targets will be."""
_Window = list[_Read]
"""The batches of a window that `targets` was not called for yet."""


@dataclass(frozen=True)
class _Supervised:
    """The rows of a batch that have supervised tokens."""

    keys: tuple[bytes, ...]
    names: tuple[str, ...]
    counts: tuple[int, ...]
    """Supervised tokens of each row."""


def _of_chunks(rows: Sequence[RowChunks], batch: Batch) -> Targets:
    """Of no token the teacher's distribution is known."""
    count, device = len(batch.labels_S), batch.labels.device
    nothing = TopKLogprobs(torch.zeros(count, 0, dtype=torch.int64), torch.zeros(count, 0)).to(device)
    values = torch.cat([row.logprobs for row in rows]) if rows else torch.zeros(0)
    return Targets(nothing, chunks=targets_of_chunks(values, [len(row.logprobs) for row in rows], batch))


def _supervised(batch: Batch) -> _Supervised:
    if batch.generated_by is not None:
        raise TeacherError(
            "A cache has no targets for answers that are generated while training. Set rlhf.lmbda: 0 and "
            "rlhf.seq_kd: false."
        )
    if len(batch.rows.keys) != len(batch):
        raise PreflightError(NO_KEYS)
    counts = batch.predicts_BT.sum(1).tolist()
    rows = [row for row, count in enumerate(counts) if count]
    return _Supervised(
        tuple(batch.rows.keys[row] for row in rows),
        tuple(batch.rows.name(row) for row in rows),
        tuple(counts[row] for row in rows),
    )
