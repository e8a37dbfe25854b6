"""A run, or several with other seeds, against as many others: on which rows, and with what verdict."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdtrain.errors import ConfigError, DataError
from kdtrain.runs.bench import Bench
from kdtrain.runs.open_run import TrainedRun
from kdtrain.runs.read_data import repeated_rows
from kdtrain.runs.verdict import Verdict, verdict_of_pairs, verdict_of_rows
from kdtrain.trainer.figures import RowSums

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Against:
    """What the verdict is about."""

    pairs: list[dict[str, Any]]
    """Of each: `run`, `against`, `seeds` of both, and their CE over the rows that count."""
    others: list[str]
    """The runs compared with, as they were named."""
    verdict: Verdict
    rows: int
    """That count."""
    repeated_in_train: int
    """Rows that were left out: a run compared has been trained on them."""
    unit: str
    """Of CE and differences: nats per `token`, or per `byte` where tokenizers differ."""


def check_pairs(runs: Sequence[TrainedRun], others: Sequence[TrainedRun]) -> None:
    if (len(runs) > 1 and len(runs) != len(others)) or (len(others) > 1 and len(runs) != len(others)):
        raise ConfigError(
            f"{len(runs)} runs and {len(others)} to compare them with (--against): runs are compared in pairs, one of "
            "each for every seed, in the same order."
        )
    for side in (runs, others):
        folders = [(one.model.resolve()) for one in side]
        twice = next((folder for folder in folders if folders.count(folder) > 1), None)
        if twice is not None:
            raise ConfigError(f"{twice} is named twice. Each pair is a pair of runs of its own, with its own seed.")
    seeds = [(_seed(run), _seed(other)) for run, other in zip(runs, others, strict=False)]
    if len(seeds) > 1 and any(first != second for first, second in seeds):
        logger.warning("Pairs are runs of one seed, and these have %s.", ", ".join(f"{a} and {b}" for a, b in seeds))
    if len(set(seeds)) < len(seeds):
        logger.warning(
            "Some of the pairs have the same training.seed (%s): they say nothing of other seeds, and the interval "
            "over pairs is too narrow.",
            ", ".join(str(seed) for seed, _ in seeds),
        )


def _seed(run: TrainedRun) -> int:
    return int(run.config.training.get("seed", 42))


def counted_rows(bench: Bench, runs: Sequence[TrainedRun]) -> np.ndarray:
    """Which rows the verdict is over, [R] bool: none that a run compared has been trained on."""
    counted = np.ones(len(bench.rows), dtype=bool)
    seen: list[TrainedRun] = []
    for run in runs:
        if any(_same_training_rows(run, one) for one in seen):
            continue
        seen.append(run)
        repeated = repeated_rows(bench.rows, bench.config, run.config, _seed(run), bench.processing)
        counted &= ~np.array(repeated)
    if not counted.any():
        raise DataError(
            "Every row of data.eval is also in data.train of a run that is compared: there is nothing to compare them "
            "on. Name held-out rows: data.eval=eval.jsonl"
        )
    if left_out := int((~counted).sum()):
        logger.warning("%d of %d rows are also in data.train; the verdict leaves them out.", left_out, len(counted))
    return counted


def _same_training_rows(first: TrainedRun, second: TrainedRun) -> bool:
    parts = []
    for run in (first, second):
        data, limit = run.config.data, run.config.custom.sample_limit
        # Where a part of the rows is taken (sample_limit beside a weight of 0.5), the seed says which.
        parts.append((data.train, data.eval_share, data.image_root, limit, None if limit is None else _seed(run)))
    return parts[0] == parts[1]


def verdict_against(
    runs: Sequence[TrainedRun],
    others: Sequence[TrainedRun],
    pairs: Sequence[tuple[RowSums, RowSums]],
    counted: np.ndarray,
    text_bytes: np.ndarray | None,
) -> Against:
    """Over the tokens that count; over bytes, where those are given."""
    labelled = pairs[0][0].column("labelled") if text_bytes is None else text_bytes
    rows = counted & (labelled > 0)
    tokens = labelled[rows]
    if not len(tokens):
        raise DataError("No row of data.eval has a supervised token that counts: there is nothing to compare runs on.")
    sums = [tuple(one.column("ce")[rows] for one in pair) for pair in pairs]
    of_runs, of_others = ([float(ce.sum() / tokens.sum()) for ce in side] for side in zip(*sums, strict=True))
    run_ce, other_ce = sums[0]
    one_each = len(pairs) == 1
    verdict = verdict_of_rows(run_ce, other_ce, tokens) if one_each else verdict_of_pairs(of_runs, of_others)
    listed = [
        {
            "run": str(run.model.resolve()),
            "against": str(other.model.resolve()),
            "seeds": [_seed(run), _seed(other)],
            "ce": ce,
            "ce_against": ce_against,
        }
        for run, other, ce, ce_against in zip(runs, others, of_runs, of_others, strict=True)
    ]
    unit = "token" if text_bytes is None else "byte"
    named = [other.name for other in others]
    return Against(listed, named, verdict, int(rows.sum()), int((~counted).sum()), unit)
