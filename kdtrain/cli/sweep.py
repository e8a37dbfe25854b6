"""What `kdtrain fit --sweep` shows: which run goes, and at the end all of them in a table, with what it says."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtrain.cli import evaluation, process
from kdtrain.cli.events import timed
from kdtrain.cli.progress import ConsoleReporter
from kdtrain.data import BuildReport
from kdtrain.errors import Interrupted, KdtrainError
from kdtrain.runs.build import Reporter
from kdtrain.runs.sweep import Outcome, Sweep
from kdtrain.runs.sweep_plan import PlannedRun, SweepPlan
from kdtrain.runs.sweep_ranking import METRICS, AxisEffect, Ranking, Setting
from kdtrain.runs.verdict import LEVEL

logger = logging.getLogger("kdtrain")

_COLUMNS = (
    ("CE", "ce", ".4f"),
    ("KL(T‖S)", "forward_kl", ".4f"),
    ("KL(S‖T)", "reverse_kl", ".4f"),
    ("agree", "agreement", ".1%"),
)
_WIDTH = 120  # where stdout is a file


def sweep(
    plan: SweepPlan, console: Console, resume: bool, allowed: Sequence[str], dry_run: bool, quiet: bool, log_format: str
) -> None:
    """Make the runs of a plan, and print what came out, also of a sweep that was stopped.

    Raises:
        KdtrainError: a run failed; the exit code is that of the first one.
        Interrupted: SIGINT or SIGTERM.
    """
    runs, as_json = Sweep(plan, resume=resume, dry_run=dry_run, allow_changes=allowed), log_format == "json"
    try:
        runs.train(Progress(console, log_format, quiet, plan.labels))
    except Interrupted:
        if any(outcome.figures for outcome in runs.outcomes):
            process.write_out(_shown(runs, as_json, None))
        raise
    report = runs.report()
    process.write_out(_shown(runs, as_json, None if report is None else str(report)))
    failed = [outcome for outcome in runs.outcomes if outcome.state == "failed"]
    if failed:
        error = KdtrainError(
            f"{len(failed)} of {len(runs.outcomes)} runs failed. The first, {failed[0].run.name}: {failed[0].message} "
            "Once that is mended, the same command with --resume auto makes those that are missing."
        )
        error.exit_code = failed[0].exit_code or KdtrainError.exit_code
        raise error


class Progress:
    """A `kdtrain.runs.sweep.SweepReporter`: a line before and behind each run, and what it shows between them."""

    def __init__(self, console: Console, log_format: str, quiet: bool, labels: Mapping[str, str]) -> None:
        self._console, self._format, self._quiet, self._labels = console, log_format, quiet, labels
        self._first = True

    def run(self, number: int, of: int, run: PlannedRun, finished: bool) -> Reporter:
        event = {"event": "run", "number": number, "of": of, "name": run.name, "values": dict(run.values)}
        values = ", ".join(f"{self._labels[key]} {value}" for key, value in run.values.items())
        self._show(f"run {number} of {of}: {values}{' (has finished)' if finished else ''}", event)
        reporter = ConsoleReporter if self._first or self._format == "json" else _Further
        self._first = self._first and finished
        return reporter(self._console, self._format, self._quiet)

    def evaluation(self) -> evaluation.Progress:
        return evaluation.Progress(self._console, self._quiet or self._format == "json")

    def outcome(self, outcome: Outcome) -> None:
        if outcome.state == "failed":
            logger.error("%s failed: %s", outcome.run.name, outcome.message)
        elif outcome.figures:
            figures = [f"{title} {_cell(outcome.figures, name, form)}" for title, name, form in _COLUMNS]
            self._show(f"{outcome.run.name}: {'  '.join(figures)}", {"event": "run_result", **outcome.to_dict()})

    def _show(self, text: str, event: Mapping[str, Any]) -> None:
        if not self._quiet:
            line = json.dumps(timed(**event)) if self._format == "json" else text
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class _Further(ConsoleReporter):
    """Of the runs behind the first one: data and plan are known."""

    def data(self, name: str, report: BuildReport) -> None:
        pass

    def plan(self, rows: Mapping[str, str]) -> None:
        pass


def _shown(runs: Sweep, as_json: bool, report: str | None) -> str:
    if as_json:
        found = {"event": "sweep", "folder": str(runs.plan.folder), "report": report, **runs.to_dict()}
        return json.dumps(timed(**found), allow_nan=False) + "\n"
    if not any(outcome.figures for outcome in runs.outcomes):  # a dry run, or none has come so far
        passed = sum(outcome.state == "finished" for outcome in runs.outcomes)
        return f"{passed} of {len(runs.outcomes)} runs passed\n"
    return "\n".join([as_table(runs, Console()), *_lines(runs), *([f"report: {report}"] if report else [])]) + "\n"


def as_table(runs: Sweep, console: Console) -> str:
    """The runs, best first, as wide as `console`."""
    ranking, labels = runs.ranking, runs.plan.labels
    table = Table(box=None, pad_edge=False)
    table.add_column("", justify="right")
    for axis in runs.plan.axes:
        table.add_column(Text(labels[axis.key]), overflow="fold")
    for title, _, _ in _COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("gap closed", justify="right")
    for place, number in enumerate(ranking.order, start=1):
        one = runs.outcomes[number]
        ranked = ranking.metric is not None and one.figures.get(ranking.metric) is not None
        figures = [_cell(one.figures, name, form) for _, name, form in _COLUMNS]
        closed = one.state if not one.figures else "–" if one.gap_closed is None else f"{one.gap_closed:.0%}"
        table.add_row(str(place) if ranked else "–", *map(Text, one.run.values.values()), *figures, closed)
    width = console.width if console.is_terminal else _WIDTH
    text = io.StringIO()
    Console(file=text, width=width, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _cell(figures: Mapping[str, Any], name: str, form: str) -> str:
    value = figures.get(name)
    sign = {"lower": "≥", "upper": "≤"}.get((figures.get("bounds") or {}).get(name, ""), "")
    return "–" if value is None else f"{sign}{value:{form}}"


def _lines(runs: Sweep) -> list[str]:
    """What the table says."""
    ranking = runs.ranking
    if ranking.metric is None:
        return [f"The runs are not ranked: {ranking.reason}."]
    title = METRICS[ranking.metric]
    lines = [_effect(effect, title) for effect in ranking.effects]
    lines += _best(ranking, title, seeds=any(axis.is_seed for axis in runs.plan.axes))
    if any(axis.key.startswith("rlhf.teacher") for axis in runs.plan.axes):
        lines.append("KL is from each run's own teacher: between teachers compare CE.")
    best = runs.outcomes[ranking.order[0]].run
    return [*lines, f"best run: {best.folder}"]


def _effect(effect: AxisEffect, title: str) -> str:
    means = ", ".join(f"{value} ({mean:.4f})" for value, mean in effect.means.items())
    of = f"means of {effect.runs} runs each" if effect.runs > 1 else "one run each"
    if effect.axis.is_seed:
        return f"{effect.axis.key}: {effect.spread:.4f} between best and worst ({of}), which is chance"
    return f"{effect.axis.key}: {effect.spread:.4f} in {title} between best and worst: {means}; {of}"


def _best(ranking: Ranking, title: str, *, seeds: bool) -> list[str]:
    settings, decides = ranking.settings, [effect for effect in ranking.effects if not effect.axis.is_seed]
    if len(settings) < 2:
        return []
    lines = [f"{decides[0].axis.key} decides most."] if len(decides) > 1 else []
    best, second = settings[:2]
    lines.append(f"best setting by {title}: {_setting(best)}; the next: {_setting(second)}")
    for name, other in ranking.best_by.items():
        if other.values != best.values:
            lines.append(f"by {METRICS[name]} the best is {_setting(other)}")
    if ranking.verdict is not None:
        found = ranking.verdict
        interval = (
            ""
            if found.interval is None
            else f", {LEVEL:.0%} interval {found.interval[0]:+.4f} to {found.interval[1]:+.4f}"
        )
        pair = f"{_setting(best)} against {_setting(second)}"
        lines.append(f"over seeds, {pair}: {found.word} ({found.difference:+.4f}{interval}; {found.method})")
    elif not seeds:
        lines.append("One seed each: what differs by little may be chance. Add training.seed=1,2,3 to find out.")
    return lines


def _setting(setting: Setting) -> str:
    values = " ".join(f"{key}={value}" for key, value in setting.values.items())
    return f"{values} ({setting.mean:.4f})"
