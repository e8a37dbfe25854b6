"""Which run of a sweep is best, and which option decides: plain numbers, that do not depend on beta.

Runs are ranked by CE on the held-out rows, or by KL(T‖S) where the rows have no labels of their own. An option is
judged by the means of its values over the other options, so that it is not credited with what another one did.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from kdtrain.runs.sweep_plan import Axis
from kdtrain.runs.verdict import Verdict, verdict_of_pairs

METRICS = {"ce": "CE", "forward_kl": "KL(T‖S)", "reverse_kl": "KL(S‖T)"}
"""What runs are ranked by, in the order of preference: the first that is known."""


@dataclass(frozen=True)
class Scored:
    """A run with its figures on the held-out rows."""

    values: Mapping[str, str]
    """Of each axis."""
    figures: Mapping[str, float | None]


@dataclass(frozen=True)
class AxisEffect:
    """What an option does."""

    axis: Axis
    means: Mapping[str, float]
    """Mean of the metric for each value, best first."""
    runs: int
    """In each mean: the same combinations of the other options for each value."""

    @property
    def spread(self) -> float:
        """Between the best and the worst value."""
        means = list(self.means.values())
        return means[-1] - means[0]


@dataclass(frozen=True)
class Setting:
    """Values of all options that are no seeds, with the mean over the seeds."""

    values: Mapping[str, str]
    mean: float
    by_seed: Mapping[tuple[str, ...], float]


@dataclass(frozen=True)
class Ranking:
    """What a sweep says."""

    metric: str | None
    """A key of METRICS; None where the runs cannot be ranked."""
    reason: str
    """Why not."""
    order: Sequence[int]
    """Numbers of the runs, best first; those without the metric at the end."""
    effects: Sequence[AxisEffect]
    """Of each axis that can be judged, the one that moves the metric most first; seeds last."""
    settings: Sequence[Setting]
    """Best first."""
    best_by: Mapping[str, Setting]
    """The best setting by each of METRICS that is known: they need not agree."""
    verdict: Verdict | None
    """The best setting against the next one, over the seeds that both have; None without two of them."""


def rank(axes: Sequence[Axis], runs: Sequence[Scored]) -> Ranking:
    """Rank runs; those that failed have no figures."""
    reason = _not_comparable(runs)
    metric = next((name for name in METRICS if any(run.figures.get(name) is not None for run in runs)), None)
    if reason or metric is None:
        reason = reason or "no run has figures"
        return Ranking(None, reason, range(len(runs)), (), (), {}, None)
    found = {i: value for i, run in enumerate(runs) if (value := run.figures.get(metric)) is not None}
    order = sorted(found, key=lambda i: (found[i], i)) + [i for i in range(len(runs)) if i not in found]
    by_values = _by_values(axes, runs, metric)
    effects = [effect for number in range(len(axes)) if (effect := _effect(axes, number, by_values)) is not None]
    effects.sort(key=lambda effect: (effect.axis.is_seed, -effect.spread))
    settings = _settings(axes, by_values)
    best_by = {name: of[0] for name in METRICS if (of := _settings(axes, _by_values(axes, runs, name)))}
    return Ranking(metric, "", order, effects, settings, best_by, _verdict(settings))


def _by_values(axes: Sequence[Axis], runs: Sequence[Scored], metric: str) -> dict[tuple[str, ...], float]:
    found = ((tuple(run.values[axis.key] for axis in axes), run.figures.get(metric)) for run in runs)
    return {values: figure for values, figure in found if figure is not None}


def _not_comparable(runs: Sequence[Scored]) -> str:
    """Why figures of some runs are not of the same tokens as those of others; empty where they are."""
    tokens = {run.figures["tokens"] for run in runs if run.figures.get("tokens") is not None}
    if len(tokens) < 2:
        return ""
    counts = f"{min(t for t in tokens if t is not None):,.0f} to {max(t for t in tokens if t is not None):,.0f}"
    return f"they were evaluated on other tokens ({counts} of them), so that their CE and KL cannot be compared"


def _effect(axes: Sequence[Axis], number: int, found: Mapping[tuple[str, ...], float]) -> AxisEffect | None:
    """The means over those combinations of the other options in which every value of this one has come to its end."""
    axis = axes[number]
    others = itertools.product(*(other.values for other in (*axes[:number], *axes[number + 1 :])))
    groups = [[(*rest[:number], value, *rest[number:]) for value in axis.values] for rest in others]
    complete = [group for group in groups if all(values in found for values in group)]
    if not complete:
        return None
    means = {value: fmean(found[group[i]] for group in complete) for i, value in enumerate(axis.values)}
    return AxisEffect(axis, dict(sorted(means.items(), key=lambda item: item[1])), len(complete))


def _settings(axes: Sequence[Axis], found: Mapping[tuple[str, ...], float]) -> list[Setting]:
    by_setting: dict[tuple[str, ...], dict[tuple[str, ...], float]] = {}
    for values, figure in found.items():
        of = {seed: tuple(v for v, a in zip(values, axes, strict=True) if a.is_seed is seed) for seed in (True, False)}
        by_setting.setdefault(of[False], {})[of[True]] = figure
    keys = [axis.key for axis in axes if not axis.is_seed]
    settings = [
        Setting(dict(zip(keys, values, strict=True)), fmean(seeds.values()), seeds)
        for values, seeds in by_setting.items()
    ]
    return sorted(settings, key=lambda setting: setting.mean)


def _verdict(settings: Sequence[Setting]) -> Verdict | None:
    if len(settings) < 2:
        return None
    best, second = settings[0].by_seed, settings[1].by_seed
    both = [seed for seed in best if seed in second]
    if len(both) < 2:
        return None
    return verdict_of_pairs([best[seed] for seed in both], [second[seed] for seed in both])
