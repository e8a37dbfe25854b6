"""Intervals of a model's own figures over rows: how they would vary with other rows. Plain numbers."""

from __future__ import annotations

import math

import numpy as np

from kdtrain.runs.verdict import Interval, quantiles, resampled
from kdtrain.trainer.figures import COLUMNS, MEANS, ModelFigures, RowSums

DRAWS = 2_000
"""Fewer than of a verdict: these are several figures of several models, and decide nothing."""


def intervals(sums: RowSums, figures: ModelFigures, right: np.ndarray | None) -> dict[str, Interval | None]:
    """The percentile interval of each figure that is a mean over tokens, and of those made of them.

    Args:
        figures: of `sums`; where they have None there is no interval.
        right: of the rows with an answer, whether it was right.
    """
    drawn, found = resampled(sums.by_row, DRAWS), dict[str, Interval | None]()
    if drawn is None:
        return found
    for name in MEANS:
        column, tokens = (drawn[:, COLUMNS.index(one)] for one in MEANS[name])
        if getattr(figures, name) is not None:
            found[name] = quantiles(np.divide(column, tokens, out=np.full_like(column, math.nan), where=tokens > 0))
    if figures.perplexity is not None and (of_ce := found.get("ce")) is not None:
        found["perplexity"] = (math.exp(of_ce[0]), math.exp(of_ce[1]))
    if right is not None and (drawn := resampled(right[:, None], DRAWS)) is not None:
        found["accuracy"] = quantiles(drawn[:, 0] / len(right))
    return found
