"""How the log-likelihoods of chunks of text are stored (`rlhf.cross_tokenizer: alm`): a row as bytes.

Which of the student's tokens make up a chunk is stored beside them, so that nothing of the teacher is needed to train.

    counts        chunks, aligned bytes of the answers, all their bytes: uint32 each
    marks         per token, in 2 bits: 0 in no chunk, 1 the first of one, 2 another one of it
    logprobs      per chunk: float32

Shapes: S supervised tokens of a row, C chunks of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdtrain.data.byte_alignment import NONE
from kdtrain.teachers.cached import bits
from kdtrain.teachers.cached.shard_file import Encoded

_FIRST, _MORE = 1, 2
_COUNTS = 3


@dataclass(frozen=True)
class RowChunks:
    """What a teacher with another tokenizer says of a row."""

    numbers: torch.Tensor
    """[S] long: the chunk of each supervised token of the student, from 0 on, −100 without one."""
    logprobs: torch.Tensor
    """[C] float32: the teacher's log-likelihood of each, nats."""
    aligned_bytes: int
    """Bytes of the student's answers that are in chunks."""
    answer_bytes: int
    """Bytes of its answers."""

    def __len__(self) -> int:
        """S."""
        return len(self.numbers)


def encode(rows: Sequence[RowChunks]) -> Encoded:
    """Some rows as bytes.

    Raises:
        ValueError: chunks that are not numbered in the order of their tokens, or whose tokens lie apart.
    """
    return Encoded({}, [_row(row) for row in rows])


def _row(row: RowChunks) -> np.ndarray:
    numbers = row.numbers.cpu().numpy().astype(np.int64)
    before = np.concatenate([[NONE], numbers[:-1]])
    marks = np.where(numbers == NONE, 0, np.where(numbers == before, _MORE, _FIRST))
    logprobs = row.logprobs.detach().float().cpu().numpy().astype("<f4")
    if not np.array_equal(_numbers(marks), numbers) or numbers.max(initial=-1) != len(logprobs) - 1:
        raise ValueError("the chunks of a row are not numbered in the order of their tokens")
    counts = np.array([len(logprobs), row.aligned_bytes, row.answer_bytes], "<u4")
    return np.concatenate([counts.view(np.uint8), bits.pack(marks, 2), logprobs.view(np.uint8)])


def _numbers(marks: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.where(marks == 0, NONE, np.cumsum(marks == _FIRST) - 1)
    return found


def decode(blob: np.ndarray, tokens: int) -> RowChunks:
    """A row of so many supervised tokens."""
    head = 4 * _COUNTS
    chunks, aligned, answers = (int(count) for count in blob[:head].view("<u4"))
    marks = bits.read(np.concatenate([blob[head:], bits.SPARE]), 2 * np.arange(tokens), 2)
    logprobs = blob[len(blob) - 4 * chunks :].copy().view("<f4")
    return RowChunks(torch.from_numpy(_numbers(marks)), torch.from_numpy(logprobs), aligned, answers)
