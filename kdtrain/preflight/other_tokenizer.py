"""How much of the rows' answers is the same text to student and teacher, where they have two tokenizers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kdtrain.config.tree import Problem
from kdtrain.data.collate import Collator
from kdtrain.errors import DataError
from kdtrain.losses.reduce import IGNORE_INDEX

LOOKED_AT = 256
"""Rows."""
_AT_ONCE = 16


@dataclass(frozen=True)
class RowsAlignment:
    """Of some rows with an answer."""

    rows: int
    share: float
    """Aligned bytes of all their bytes."""
    worst: float
    """The least share of a row."""
    chunks: int
    student: int
    """Tokens of the student that are in chunks."""
    teacher: int | None
    """Tokens of the teacher that are; None where it is not there, but what it says of the chunks."""

    def finding(self) -> Problem:
        message = (
            f"{self.share:.1%} of the answers' bytes are the same text to student and teacher (of the worst of "
            f"{self.rows} rows {self.worst:.1%}), in chunks of {self.tokens_of_a_chunk()}."
        )
        return Problem(("rlhf", "cross_tokenizer"), message, level="info")

    def tokens_of_a_chunk(self) -> str:
        """How many tokens a chunk has, in words."""
        count = max(self.chunks, 1)
        of_teacher = "" if self.teacher is None else f" and {self.teacher / count:.2f} of the teacher"
        return f"{self.student / count:.2f} tokens of the student{of_teacher}"


def unaligned_rows(rows: Iterable[Any], collator: Collator) -> list[str]:
    """What is wrong with rows that the teacher's template cannot render, or of which less than half is aligned."""
    found, left = list[str](), iter(rows)
    while some := list(islice(left, _AT_ONCE)):
        try:
            collator(some)
        except DataError:
            found += filter(None, (_problem(row, collator) for row in some))
    return found


def _problem(row: Any, collator: Collator) -> str | None:
    try:
        collator([row])
    except DataError as error:
        return str(error)
    return None


def look_at_rows(rows: Any, collator: Any) -> RowsAlignment | None:
    """The alignment of up to 256 rows, evenly spaced; None where none has an answer, or they cannot be looked at.

    Args:
        rows: a data set that can be indexed.

    Raises:
        DataError: less than half of an answer is aligned; it names the row.
    """
    if rows is None or not isinstance(collator, Collator) or collator.other_tokenizer is None:
        return None
    count = min(len(rows), LOOKED_AT)
    chosen = [i * len(rows) // count for i in range(count)]
    shares, chunks, of_student, aligned, total = list[float](), 0, 0, 0, 0
    of_teacher: int | None = None
    for start in range(0, count, _AT_ONCE):
        batch = collator([rows[i] for i in chosen[start : start + _AT_ONCE]])
        own_chunks, tokens = batch.student_chunks, batch.teacher_tokens
        assert own_chunks is not None
        assert batch.num_chunks is not None
        for own, whole in zip(own_chunks.aligned_bytes.tolist(), own_chunks.answer_bytes.tolist(), strict=True):
            shares += [own / whole] if whole else []
            aligned, total = aligned + own, total + whole
        chunks += int(batch.num_chunks.sum())
        of_student += int((own_chunks.numbers != IGNORE_INDEX).sum())
        if tokens is not None and tokens.chunks is not None:
            of_teacher = (of_teacher or 0) + int((tokens.chunks != IGNORE_INDEX).sum())
    if not shares:
        return None
    return RowsAlignment(len(shares), aligned / total, min(shares), chunks, of_student, of_teacher)
