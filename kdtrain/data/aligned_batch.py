"""Rows that a teacher with another tokenizer reads in its own tokens, as a batch has them.

Shapes: B rows, T positions of the student, T' of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from kdtrain.data.batch import Batch, StudentChunks, TeacherTokens
from kdtrain.data.byte_alignment import NONE
from kdtrain.data.encoded_row import EncodedRow


@dataclass(frozen=True)
class AlignedRow:
    """A row as both read it."""

    student_chunks: list[int]
    ids: list[int]
    """As the teacher reads it, up to the last token that is in a chunk; the whole prompt where none is."""
    chunks: list[int]
    prompt_length: int
    """Leading tokens that are the teacher's prompt."""
    aligned_bytes: int
    answer_bytes: int


class Aligner(Protocol):
    """Says which tokens of a batch make up text that those of a teacher with another tokenizer make up as well."""

    def aligned(self, batch: Batch, rows: Sequence[EncodedRow], multiple: int | None) -> Batch:
        """The batch with its `student_chunks`, and with what else the teacher needs.

        Args:
            rows: of the batch, perhaps cut.
            multiple: what lengths are rounded up to.

        Raises:
            DataError: a row cannot be used.
        """


def with_aligned(batch: Batch, rows: Sequence[AlignedRow], multiple: int | None = None) -> Batch:
    """A batch with its rows as the teacher reads them, T' rounded up to a `multiple`, and with their chunks."""
    device = batch.labels.device
    chunks = student_chunks(
        [row.student_chunks for row in rows],
        [(row.aligned_bytes, row.answer_bytes) for row in rows],
        batch.labels.shape[1],
        device,
    )
    return replace(batch, teacher_tokens=_teacher_tokens(rows, device, multiple), student_chunks=chunks)


def student_chunks(
    chunks: Sequence[Sequence[int]], lengths: Sequence[tuple[int, int]], width: int, device: torch.device
) -> StudentChunks:
    """Chunks of rows as a batch has them.

    Args:
        lengths: aligned bytes of each row's answers, and all their bytes.
        width: T.
    """
    aligned, answers = (torch.tensor(counts, device=device) for counts in zip(*lengths, strict=True))
    return StudentChunks(numbers=_padded(chunks, width, NONE, device), aligned_bytes=aligned, answer_bytes=answers)


def _teacher_tokens(rows: Sequence[AlignedRow], device: torch.device, multiple: int | None) -> TeacherTokens:
    longest = max(len(row.ids) for row in rows)
    longest = -(-longest // multiple) * multiple if multiple else longest

    labels = [[i if chunk != NONE else NONE for i, chunk in zip(row.ids, row.chunks, strict=True)] for row in rows]
    return TeacherTokens(
        # Of padding any id will do: the mask hides it.
        input_ids=_padded([row.ids for row in rows], longest, 0, device),
        attention_mask=_padded([[1] * len(row.ids) for row in rows], longest, 0, device),
        labels=_padded(labels, longest, NONE, device),
        prompt_lengths=torch.tensor([row.prompt_length for row in rows], device=device),
        chunks=_padded([row.chunks for row in rows], longest, NONE, device),
    )


def _padded(values: Sequence[Sequence[int]], to: int, fill: int, device: torch.device) -> torch.Tensor:
    out = torch.full((len(values), to), fill, dtype=torch.long)
    for i, value in enumerate(values):
        out[i, : len(value)] = torch.tensor(value[:to], dtype=torch.long)
    return out.to(device)
