"""Rows of an evaluation without their answers, for a model to answer; with its answers; those with images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from kdtrain.losses.reduce import IGNORE_INDEX


def as_prompts(rows: datasets.Dataset) -> datasets.Dataset:
    """The prompts alone, marked as rows that are to be answered."""
    return with_answers(rows, [[]] * len(rows))


def with_answers(rows: datasets.Dataset, answers: Sequence[Sequence[int]]) -> datasets.Dataset:
    """The prompts with other answers behind them, all of which is supervised; also as the teacher reads them.

    Args:
        answers: token ids, for each row.
    """

    def answered(row: Mapping[str, Any], i: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for prefix in ("", "teacher_"):
            length = row.get(f"{prefix}prompt_length")
            if length is not None:  # the teacher's is null where it reads the student's
                ids = row[f"{prefix}input_ids"][:length]
                found[f"{prefix}input_ids"] = [*ids, *answers[i]]
                found[f"{prefix}labels"] = [IGNORE_INDEX] * len(ids) + [*answers[i]]
        return found

    if not len(rows):
        return rows
    if "answers" in rows.column_names:
        rows = rows.remove_columns("answers")
    options = {"features": rows.features, "keep_in_memory": True, "load_from_cache_file": False}
    asked = rows.map(answered, with_indices=True, **options)
    return asked.add_column("answers", [True] * len(asked))


def rows_with_images(rows: datasets.Dataset) -> np.ndarray:
    """Their numbers."""
    if "images" not in rows.column_names:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero([bool(images) for images in rows["images"][:]])
