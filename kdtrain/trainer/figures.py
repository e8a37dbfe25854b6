"""A model on a set of rows, as numbers: what is added up of each row, and the means over tokens that are made of it.

Shapes: R rows.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from kdtrain.losses.comparison import BINS, calibration_error

# Sums over the tokens of a row. `labelled`: tokens of rows that contribute cross-entropy; `ce`, `ce_known` and
# `correct` are over these. `compared`: tokens that the teacher has answered for; the others behind it are over these.
COLUMNS = (
    "tokens",
    "labelled",
    "ce",
    "ce_known",
    "correct",
    "compared",
    "forward_kl",
    "reverse_kl",
    "agree",
    "overlap",
    "exact",
)

MEANS = {
    "ce": ("ce", "labelled"),
    "token_accuracy": ("correct", "labelled"),
    "forward_kl": ("forward_kl", "compared"),
    "reverse_kl": ("reverse_kl", "compared"),
    "agreement": ("agree", "compared"),
    "acceptance_rate": ("overlap", "compared"),
}
"""Figures that are a column divided by another one."""


@dataclass(frozen=True)
class ModelFigures:
    """A model on a set of rows; None is what does not apply, or cannot be known."""

    ce: float | None = None
    """Nats per supervised token, of rows that contribute cross-entropy."""
    nats_per_byte: float | None = None
    """The same CE in all, over the UTF-8 bytes of the text: what models with other tokenizers are compared by."""
    perplexity: float | None = None
    """e^ce."""
    accuracy: float | None = None
    """Share of rows with a column `answer` whose greedy answer says the same."""
    token_accuracy: float | None = None
    """Share of tokens that are the model's most likely one."""
    forward_kl: float | None = None
    """KL(T‖S), nats per token. For the teacher itself this is 0 by definition, as the next is; agreement and
    acceptance rate are 1."""
    reverse_kl: float | None = None
    """KL(S‖T), nats per token."""
    agreement: float | None = None
    """Share of tokens where student and teacher have the same most likely one."""
    ece: float | None = None
    """Expected calibration error, 15 bins."""
    calibration: list[dict[str, float | None]] | None = None
    """These bins, by growing top-1 probability: `count`, and mean `confidence` and `accuracy`, None where it is 0."""
    acceptance_rate: float | None = None
    """Mean of Σ min(p, q)."""
    visual_reliance: float | None = None
    """Mean over labelled tokens of rows with images of log p(label | image) − log p(label | image in its mean colour),
    nats."""
    tokens: int = 0
    """Supervised tokens."""
    bounds: dict[str, str] | None = None
    """Figures that are bounds, `lower` or `upper`, since the teacher is known by its most likely tokens alone."""

    def as_own_teacher(self) -> ModelFigures:
        """Compared with itself."""
        return replace(self, forward_kl=0.0, reverse_kl=0.0, agreement=1.0, acceptance_rate=1.0, bounds=None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `bounds` only where there are any."""
        found = asdict(self)
        if self.bounds is None:
            del found["bounds"]
        return found


@dataclass
class RowSums:
    """What was added up of a model, by row and in the bins of the calibration error."""

    by_row: np.ndarray
    """[R, len(COLUMNS)] float64."""
    bins: np.ndarray
    """[3, BINS] float64."""

    @classmethod
    def empty(cls, rows: int) -> RowSums:
        return cls(np.zeros((rows, len(COLUMNS))), np.zeros((3, BINS)))

    def column(self, name: str) -> np.ndarray:
        """[R]."""
        return self.by_row[:, COLUMNS.index(name)]

    def over_ranks(self) -> RowSums:
        """The sums of all ranks, each of which has done some of the rows; a collective."""
        ranks = gather_object([(self.by_row, self.bins)])
        return RowSums(*(np.sum(parts, axis=0) for parts in zip(*ranks, strict=True)))

    def figures(self) -> ModelFigures:
        """Means over tokens."""
        total = dict(zip(COLUMNS, self.by_row.sum(0).tolist(), strict=True))
        labelled, compared = total["labelled"], total["compared"]

        means = {
            name: total[column] / total[tokens] if total[tokens] else None for name, (column, tokens) in MEANS.items()
        }
        means = {name: value if value is None or math.isfinite(value) else None for name, value in means.items()}
        ce = means["ce"] = means["ce"] if total["ce_known"] == labelled else None
        bounds = {"forward_kl": "lower", "reverse_kl": "lower", "acceptance_rate": "upper"}
        return ModelFigures(
            **means,
            perplexity=math.exp(ce) if ce is not None and ce < 700 else None,
            ece=calibration_error(torch.from_numpy(self.bins)) if self.bins[0].any() else None,
            calibration=_calibration(self.bins) if self.bins[0].any() else None,
            tokens=int(total["tokens"]),
            bounds=bounds if total["exact"] < compared else None,
        )


def _calibration(bins: np.ndarray) -> list[dict[str, float | None]]:
    """Of sums [3, BINS]: tokens, right ones, confidence."""
    return [
        {
            "count": int(count),
            "confidence": confidence / count if count else None,
            "accuracy": correct / count if count else None,
        }
        for count, correct, confidence in bins.T.tolist()
    ]
