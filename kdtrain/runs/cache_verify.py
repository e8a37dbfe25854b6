"""`kdtrain cache --verify N`: some rows asked for once more, and compared with what is stored of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

from kdtrain.data.errors import show
from kdtrain.errors import DataError
from kdtrain.runs.cache_plan import CachePlan
from kdtrain.runs.cache_teacher import CacheTeacher
from kdtrain.teachers import teacher_autocast
from kdtrain.teachers.cached.compare import allowed_difference, largest_bound, largest_difference
from kdtrain.teachers.cached.store import CacheReader


@dataclass(frozen=True)
class Verified:
    """What was found, with a difference that is allowed."""

    rows: int
    largest: float
    allowed: float
    unit: str
    bound: float | None = None
    """Of hidden states in 8 bits, nats: what it costs any token of these rows at most, by Hoeffding's lemma."""


def verify(folder: Path, plan: CachePlan, teacher: CacheTeacher, rows: int) -> Verified:
    """Compare rows that are chosen at random, other ones each time; for one process.

    Raises:
        DataError: what is stored of a row is not what the teacher says of it.
    """
    reader, form, largest = CacheReader(folder), teacher.form, 0.0
    bound: float | None = None
    allowed, unit = allowed_difference(form, teacher.half_precision)
    chosen = random.SystemRandom().sample(range(len(plan)), min(rows, len(plan)))
    for number in chosen:
        key = plan.keys[number]
        with torch.no_grad(), teacher_autocast(teacher.accelerator):
            fresh = teacher.asking.rows(teacher.asking.collate([number]), [key])[0]
        stored = reader.read_chunks([key])[0] if form.mode == "chunks" else reader.read([key])
        difference = largest_difference(fresh, stored)
        if difference > allowed:
            raise DataError(
                f"Row {show(plan.row(number).get('row_id', number))}: what the cache {show(str(folder), 400)} holds "
                f"differs from what the teacher says by {difference:.3g} {unit}, and {allowed:.3g} is what storing it "
                "may cost. Is it the same teacher, in the same dtype? Write the cache anew into another folder."
            )
        largest = max(largest, difference)
        if form.hidden_dtype == "int8":
            bound = max(bound or 0.0, largest_bound(fresh, stored))
    return Verified(len(chosen), largest, allowed, unit, bound)
