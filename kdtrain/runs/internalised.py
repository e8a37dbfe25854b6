"""How much of what the teacher alone reads a student has learnt to do without (context distillation).

    1 − KL(T with its prefix ‖ S after) / KL(T with its prefix ‖ S before)

No student reads the prefix, before or after. Both are compared on what the prompted teacher writes itself, greedily, to
held-out prompts: there its distributions say what it would do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from kdtrain.preflight.context import NOTHING_TO_DISTIL
from kdtrain.runs.prompts import as_prompts
from kdtrain.runs.verdict import Interval, bootstrap
from kdtrain.trainer.figures import RowSums

PROMPTS = 64
"""The first so many that the teacher reads otherwise: each costs an answer."""


@dataclass(frozen=True)
class Internalised:
    """What was found on the teacher's answers."""

    share: float | None
    """May be negative; None where the prefix leaves nothing to distil."""
    interval: Interval | None
    kl_before: float
    kl_after: float
    """Nats per token of an answer."""
    prompts: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """All but what `evaluation.json` has elsewhere."""
        return {name: value for name, value in vars(self).items() if name not in ("share", "interval")}


def prompts_of(rows: datasets.Dataset, images: bool) -> datasets.Dataset | None:
    """The prompts of rows that the teacher reads otherwise than the student, to be answered by it; None without any.

    Args:
        rows: of an evaluation, encoded.
        images: whether the teacher can be asked about rows with images.
    """
    if "teacher_input_ids" not in rows.column_names:
        return None
    facts = rows.select_columns(["prompt_length", "teacher_prompt_length"])[:]
    pictures = rows["images"][:] if "images" in rows.column_names else [None] * len(rows)
    lengths = zip(facts["prompt_length"], facts["teacher_prompt_length"], pictures, strict=True)
    own = [i for i, (student, teacher, some) in enumerate(lengths) if student and teacher and (images or not some)]
    if not own:
        return None
    return as_prompts(rows.select(own[:PROMPTS]))


def internalised(before: RowSums, after: RowSums) -> Internalised | None:
    """What the sums over the answers, beside the prompted teacher, say; None where nothing could be compared."""
    tokens = float(before.column("compared").sum())
    if not tokens:
        return None
    columns = np.column_stack([before.column("forward_kl"), after.column("forward_kl")])
    total = columns.sum(0)
    kl_before, kl_after = (float(kl / tokens) for kl in total)
    share = interval = None
    if kl_before >= NOTHING_TO_DISTIL:
        share, interval = 1 - kl_after / kl_before, bootstrap(columns, lambda sums: 1 - sums[..., 1] / sums[..., 0])
    return Internalised(share, interval, kl_before, kl_after, len(columns), int(tokens))
