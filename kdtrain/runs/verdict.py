"""Whether one run is better than another, from sums over rows: plain numbers, no models.

d is CE(run) − CE(other) in nats per token, on the same rows. With one run each, its interval is that of a paired
bootstrap over rows (Efron 1979; Koehn 2004, https://aclanthology.org/W04-3250, for two systems on one test set): it
says how d would vary with other rows, and nothing of other seeds. With three or more pairs of runs it is Student's t
over the pairs, which says how d varies with the seed. Two pairs are too few for either, and so are a few rows: of two
rows that differ by chance alone the bootstrap's interval lies below 0 in one case of four, of ten in one of twenty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

DRAWS, LEVEL, SEED = 10_000, 0.95, 0
# A run that may be better by less than this share of the other's CE is not better.
_WORTH = 0.01
_FEWEST_ROWS = 10
# Rows drawn at a time: some tens of MB.
_AT_ONCE = 2**22

Word = Literal["BEATS", "NO BETTER", "INCONCLUSIVE"]
Interval = tuple[float, float]
Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Verdict:
    """What can be said of two runs, or of pairs of them."""

    word: Word
    difference: float
    """d, nats per token; the mean over pairs. Below 0 the run is better."""
    interval: Interval | None
    """Of d, at LEVEL; None where there is too little to tell."""
    method: str
    """What the interval is of."""


def verdict_of_rows(run: Numbers, other: Numbers, tokens: Numbers) -> Verdict:
    """One run against one other.

    Args:
        run, other: Σ −log p(label) of each row, the same rows in one order.
        tokens: supervised tokens of each row, above 0.
    """
    columns = np.column_stack([run, other, tokens]).astype(np.float64)

    def difference(sums: np.ndarray) -> np.ndarray:
        return (sums[..., 0] - sums[..., 1]) / sums[..., 2]

    total = np.array([math.fsum(column) for column in columns.T])  # exact, whatever the order of rows
    if len(columns) < _FEWEST_ROWS:
        few = f"fewer than {_FEWEST_ROWS} rows, which are too few for an interval"
        return Verdict("INCONCLUSIVE", float(difference(total)), None, few)
    interval = bootstrap(columns, difference)
    word = _word(interval, float(total[1] / total[2]))
    return Verdict(
        word, float(difference(total)), interval, "paired bootstrap over rows, which knows nothing of other seeds"
    )


def verdict_of_pairs(run: Numbers, other: Numbers) -> Verdict:
    """Two or more runs against as many others, pair by pair.

    Args:
        run, other: the CE of each run, nats per token.
    """
    d = np.subtract(run, other, dtype=np.float64)
    if len(d) < 3:
        return Verdict("INCONCLUSIVE", float(d.mean()), None, "two pairs of runs, which are too few for an interval")
    half = student_t(0.5 + LEVEL / 2, len(d) - 1) * float(d.std(ddof=1)) / math.sqrt(len(d))
    interval = float(d.mean()) - half, float(d.mean()) + half
    return Verdict(_word(interval, float(np.mean(other))), float(d.mean()), interval, "Student's t over pairs of runs")


def _word(interval: Interval | None, other_ce: float) -> Word:
    if interval is None:
        return "INCONCLUSIVE"
    low, high = interval
    if high < 0:
        return "BEATS"
    return "NO BETTER" if low > -_WORTH * other_ce else "INCONCLUSIVE"


def gap_closed(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Share of the way from the student before training to its teacher, in CE; None where the teacher is not better."""
    if before is None or after is None or teacher is None or not teacher < before:
        return None
    return (before - after) / (before - teacher)


def gap_interval(before: Numbers, after: Numbers, teacher: Numbers) -> Interval | None:
    """Of `gap_closed`, from Σ −log p(label) of each row; None where the rows drawn may show no lead of the teacher."""

    def closed(sums: np.ndarray) -> np.ndarray:
        lead = sums[:, 0] - sums[:, 2]
        return np.where(lead > 0, (sums[:, 0] - sums[:, 1]) / lead, math.nan)

    return bootstrap(np.column_stack([before, after, teacher]), closed)


def bootstrap(
    columns: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], draws: int = DRAWS, level: float = LEVEL
) -> Interval | None:
    """The percentile interval of a statistic of sums over rows; None of fewer than two rows.

    Args:
        columns: [R, C], what is added up of each row. Their order does not matter.
        statistic: [draws, C] sums to [draws].
    """
    sums = resampled(columns, draws)
    if sums is None:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return quantiles(statistic(sums), level)


def resampled(columns: np.ndarray, draws: int) -> np.ndarray | None:
    """Sums over as many rows as there are, drawn with replacement, [draws, C]; None of fewer than two rows."""
    if len(columns) < 2:
        return None
    columns = columns[np.lexsort(columns.T)]
    rows, rng = len(columns), np.random.default_rng(SEED)
    sums, at_once = [], max(_AT_ONCE // rows, 1)
    for start in range(0, draws, at_once):
        count = min(at_once, draws - start)
        drawn = rng.integers(0, rows, size=(count, rows)) + rows * np.arange(count)[:, None]
        # How often each row was drawn: one product with the columns then adds all of them up.
        times = np.bincount(drawn.ravel(), minlength=count * rows).reshape(count, rows)
        sums.append(times.astype(np.float64) @ columns)
    return np.concatenate(sums)


def quantiles(values: np.ndarray, level: float = LEVEL) -> Interval | None:
    """The interval that holds `level` of the values, with as many on either side; None where it has no finite end."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high)) if math.isfinite(low) and math.isfinite(high) else None


def student_t(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution, for a probability from ½ on, by bisection of its distribution function."""
    low, high = 0.0, 1.0
    while _t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def _t_cdf(t: float, degrees: int) -> float:
    """P(T ≤ t) for t ≥ 0: the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    square, term, total = math.cos(angle) ** 2, 1.0, 0.0
    if degrees % 2:
        term = math.cos(angle)
        for i in range(1, degrees - 1, 2):
            total += term
            term *= square * (i + 1) / (i + 2)
        return 0.5 + (angle + math.sin(angle) * total) / math.pi
    for i in range(0, degrees - 1, 2):
        total += term
        term *= square * (i + 1) / (i + 2)
    return 0.5 + math.sin(angle) * total / 2
