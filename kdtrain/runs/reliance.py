"""How much the images help a model: visual reliance. Plain numbers."""

from __future__ import annotations

import numpy as np

from kdtrain.runs.intervals import DRAWS
from kdtrain.runs.verdict import Interval, quantiles, resampled
from kdtrain.trainer.figures import RowSums


def visual_reliance(own: RowSums, blanked: RowSums, rows: np.ndarray) -> tuple[float | None, Interval | None]:
    """Mean over labelled tokens of log p(label | image) − log p(label | image in its mean colour), and its interval.

    Nats per token: 0 of a model that does not look, below 0 of one that images mislead.

    Args:
        own: of all rows.
        blanked: of those with images alone, which have the numbers `rows` among all.
    """
    tokens, known = own.column("labelled")[rows], own.column("ce_known")[rows]
    if not tokens.sum() or known.sum() != tokens.sum():
        return None, None
    gain = blanked.column("ce") - own.column("ce")[rows]
    drawn = resampled(np.column_stack([gain, tokens]), DRAWS)
    interval = None if drawn is None or not drawn[:, 1].all() else quantiles(drawn[:, 0] / drawn[:, 1])
    return float(gain.sum() / tokens.sum()), interval
