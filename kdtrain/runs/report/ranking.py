"""Several runs beside each other, by figures that depend neither on β nor on the weights of the terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdtrain.runs.report.changes import differing
from kdtrain.runs.report.figures import Table
from kdtrain.runs.report.record import RunRecord, is_number
from kdtrain.runs.report.summary import figure

# Name in evaluation.json, title, format, whether more is better.
_FIGURES = (
    ("ce", "CE", ".4f", False),
    ("forward_kl", "KL(T‖S)", ".4f", False),
    ("reverse_kl", "KL(S‖T)", ".4f", False),
    ("agreement", "agreement", ".1%", True),
    ("token_accuracy", "top-1", ".1%", True),
    ("accuracy", "right answers", ".1%", True),
    ("ece", "ECE", ".3f", False),
)
_FROM_LOG = (
    ("eval_teacher_agreement", "agreement, log", ".1%", True),
    ("eval_token_accuracy", "top-1, log", ".1%", True),
)
_OPTIONS = (
    "rlhf.beta",
    "rlhf.divergence",
    "rlhf.llm_kd_weight",
    "rlhf.sft_alpha",
    "rlhf.lmbda",
    "rlhf.kd_temperature",
    "training.learning_rate",
    "training.seed",
)
_MOST_OPTIONS = 3


@dataclass(frozen=True)
class Row:
    """A run in the ranking."""

    run: RunRecord
    rank: int | None
    """From 1; None of a run without the figure that ranks."""
    options: list[str]
    """Values of the options in which the runs differ."""
    cells: list[str]
    values: list[float | None]


@dataclass(frozen=True)
class Ranking:
    """All runs, the best first."""

    by: str
    """Title of the figure that ranks; empty where no run has any."""
    options: list[str]
    """In which the runs differ."""
    titles: list[str]
    forms: list[str]
    """How each column is written."""
    best: list[int | None]
    """Of each column the row of the best value."""
    rows: list[Row]
    caution: str
    """Why the figures may not be comparable; empty if nothing speaks against it."""


def ranked(runs: Sequence[RunRecord]) -> Ranking:
    """By CE on held-out rows, or KL(T‖S) without it; by agreement in the log where no run was evaluated."""
    columns = [column for column in _columns(runs) if any(value is not None for value in column.values)]
    key = columns[0] if columns else None
    options = differing(runs)
    shown, order = _worth_a_column(options), _order(runs, key)
    rows: list[Row] = []
    for i in order:
        values = [column.values[i] for column in columns]
        cells = ["–" if v is None else format(v, c.form) for v, c in zip(values, columns, strict=True)]
        is_ranked = key is not None and key.values[i] is not None
        rows.append(Row(runs[i], len(rows) + 1 if is_ranked else None, [options[o][i] for o in shown], cells, values))
    best = [_best([row.values[c] for row in rows], column.more_is_better) for c, column in enumerate(columns)]
    titles, forms = [column.title for column in columns], [column.form for column in columns]
    return Ranking(key.title if key else "", shown, titles, forms, best, rows, _caution(runs))


@dataclass(frozen=True)
class _Column:
    title: str
    form: str
    more_is_better: bool
    values: list[float | None]
    """Of each run, in the order in which they were named."""


def _columns(runs: Sequence[RunRecord]) -> list[_Column]:
    evaluated = [_Column(t, f, more, [figure(run, "after", name) for run in runs]) for name, t, f, more in _FIGURES]
    logged = [_Column(title, f, more, [_last(run, name) for run in runs]) for name, title, f, more in _FROM_LOG]
    return evaluated + (logged if any(not run.evaluation for run in runs) else [])


def _order(runs: Sequence[RunRecord], key: _Column | None) -> list[int]:
    """The best first; runs without the figure last, as they were named."""

    def place(i: int) -> tuple[bool, float]:
        value = None if key is None else key.values[i]
        return value is None, (value or 0.0) * (-1 if key and key.more_is_better else 1)

    return sorted(range(len(runs)), key=place)


def _worth_a_column(options: dict[str, list[str]]) -> list[str]:
    """A few of them, those of the loss first: there may be dozens where runs are of different kinds."""
    known = {path: place for place, path in enumerate(_OPTIONS)}
    return sorted(options, key=lambda path: known.get(path, len(known)))[:_MOST_OPTIONS]


def _last(run: RunRecord, key: str) -> float | None:
    return next((float(r[key]) for r in reversed(run.evaluations) if is_number(r.get(key))), None)


def _best(values: Sequence[float | None], more_is_better: bool) -> int | None:
    known = [i for i, value in enumerate(values) if value is not None]
    if len(known) < 2:
        return None
    return (max if more_is_better else min)(known, key=lambda i: values[i] or 0.0)


_SEED = "training.seed"


def over_seeds(ranking: Ranking) -> Table | None:
    """Mean, lowest and highest of each figure over the runs that differ in their seed alone; None where none do."""
    different = differing([row.run for row in ranking.rows])
    seeds = different.pop(_SEED, None)
    if seeds is None:
        return None
    groups: dict[tuple[str, ...], list[Row]] = {}
    for i, row in enumerate(ranking.rows):
        groups.setdefault(tuple(values[i] for values in different.values()), []).append(row)
    if len(groups) == len(ranking.rows):
        return None
    names = [path.split(".")[-1] for path in different]
    rows = []
    for values, group in groups.items():
        name = ", ".join(f"{option} {value}" for option, value in zip(names, values, strict=True)) or "all runs"
        cells = [_spread([row.values[c] for row in group], form) for c, form in enumerate(ranking.forms)]
        rows.append(("", name, [str(len(group)), *cells]))
    return Table("", ["seeds", *ranking.titles], rows)


def _spread(values: Sequence[float | None], form: str) -> str:
    """Of the runs that have the figure."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{sum(known) / len(known):{form}}"
    return mean if len(known) == 1 else f"{mean} ({min(known):{form}} to {max(known):{form}})"


def _caution(runs: Sequence[RunRecord]) -> str:
    evaluated = [run for run in runs if run.evaluation]
    teachers = {figure(run, "teacher", "ce") for run in evaluated}
    rows = {(run.evaluation.get("rows"), figure(run, "after", "tokens")) for run in evaluated}
    if len(rows) > 1:
        return "These runs were evaluated on different rows: their figures cannot be compared."
    if len(teachers - {None}) > 1:
        return "These runs have different teachers: KL and agreement cannot be compared, CE can."
    return ""
