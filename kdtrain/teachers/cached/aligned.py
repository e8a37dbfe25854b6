"""Which of a student's tokens make up the chunks of text that a cache has log-likelihoods of."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

from kdtrain.data.aligned_batch import student_chunks
from kdtrain.data.batch import Batch
from kdtrain.data.byte_alignment import NONE
from kdtrain.data.encoded_row import EncodedRow
from kdtrain.errors import DataError, PreflightError
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.teachers.cached.chunk_format import RowChunks
from kdtrain.teachers.cached.store import CacheReader

NO_KEYS = (
    "Batches have no keys of their rows, by which a cache finds their targets: use "
    "kdtrain.data.Collator(processing_class, row_keys=True) as data_collator; for a cache of mode chunks also with "
    "other_tokenizer=teacher.aligner."
)


class StoredChunks:
    """The `Aligner` of a cache of mode `chunks`: neither the teacher nor its tokenizer is asked.

    A row that is missing or damaged has no chunk here. Its targets are read as well, before its step, and fail there:
    between two steps, on all ranks.
    """

    def __init__(self, reader: CacheReader) -> None:
        # Files of its own: a worker of the data loader must not be forked while a thread of this process maps one.
        self._reader = copy(reader)

    def aligned(self, batch: Batch, rows: Sequence[EncodedRow], multiple: int | None) -> Batch:
        """See `Aligner.aligned`.

        Raises:
            PreflightError: a batch without the keys of its rows.
        """
        if len(batch.rows.keys) != len(batch):
            raise PreflightError(NO_KEYS)
        chunks, lengths = list[list[int]](), list[tuple[int, int]]()
        for key, row in zip(batch.rows.keys, rows, strict=True):
            predicted = [t for t, label in enumerate(row.labels) if t and label != IGNORE_INDEX]
            found = self._read(key)
            numbers = [NONE] * len(row.labels)
            if found is not None and len(found) == len(predicted):
                for t, number in zip(predicted, found.numbers.tolist(), strict=True):
                    numbers[t] = number
            chunks.append(numbers)
            lengths.append((0, 0) if found is None else (found.aligned_bytes, found.answer_bytes))
        width, device = batch.labels.shape[1], batch.labels.device
        return replace(batch, student_chunks=student_chunks(chunks, lengths, width, device))

    def _read(self, key: bytes) -> RowChunks | None:
        if key not in self._reader:
            return None
        try:
            (found,) = self._reader.read_chunks([key])
        except DataError:
            return None
        return found
