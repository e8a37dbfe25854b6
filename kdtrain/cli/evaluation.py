"""What `kdtrain evaluate` shows: a table with the verdict under it, or JSON; and how far it is while it goes."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdtrain.data import BuildReport
from kdtrain.runs.against import Against
from kdtrain.runs.evaluate import Evaluated, evaluate
from kdtrain.runs.internalised import Internalised
from kdtrain.runs.open_run import TrainedRun
from kdtrain.runs.tasks import Tasks
from kdtrain.runs.verdict import LEVEL, Interval
from kdtrain.trainer.figures import ModelFigures

# Column, field, and how its numbers are written.
_COLUMNS = (
    ("CE", "ce", ".4f"),
    ("nats/byte", "nats_per_byte", ".4f"),
    ("perplexity", "perplexity", ",.2f"),
    ("top-1", "token_accuracy", ".1%"),
    ("KL(T‖S)", "forward_kl", ".4f"),
    ("KL(S‖T)", "reverse_kl", ".4f"),
    ("agree", "agreement", ".1%"),
    ("accept", "acceptance_rate", ".1%"),
    ("ECE", "ece", ".3f"),
    ("answers", "accuracy", ".1%"),
    ("images", "visual_reliance", "+.3f"),
)
_WHERE_KNOWN = ("accuracy", "visual_reliance")
"""Columns of what is not known of most runs."""
_DRAFTED = 4
"""Tokens of a draft, a usual number."""
_ROWS = ("before", "after", "against", "teacher")
_SIGNS = {"lower": "≥", "upper": "≤"}
_WIDTH = 120  # where stdout is a file


def evaluated(
    runs: Sequence[TrainedRun], others: Sequence[TrainedRun], tasks: Tasks | None, as_json: bool, quiet: bool
) -> str:
    """Evaluate, and what is printed of it."""
    found = evaluate(runs, others, Progress(Console(stderr=True), quiet), tasks)
    return json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n" if as_json else as_text(found, Console())


class Progress:
    """An `EvaluationReporter`: a line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        self._status = console.status("") if console.is_terminal and not quiet else None
        self._next_line = 0.0

    def data(self, name: str, report: BuildReport) -> None:
        self._print(f"{name}: {report.summary()}")

    def answers(self, done: int, total: int) -> None:
        self._say(f"the teacher's answers: {done:,} of {total:,}", done == total)

    def rows(self, model: str, done: int, total: int) -> None:
        self._say(f"{model}: {done:,} of {total:,} rows", done == total)

    def _say(self, text: str, last: bool) -> None:
        if self._status is not None:
            self._status.start()
            self._status.update(text)
        elif last or time.perf_counter() >= self._next_line:
            self._next_line = time.perf_counter() + 10
            self._print(text)

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def as_text(found: Evaluated, console: Console) -> str:
    """A table of the models, and what follows from it, as wide as `console`."""
    models = [(name, model) for name in _ROWS if (model := found.models.get(name)) is not None]
    known = {name for name in _WHERE_KNOWN if any(getattr(model, name) is not None for _, model in models)}
    left_out = {*_WHERE_KNOWN} - known | ({"nats_per_byte"} if not found.other_tokens else set())
    shown = [one for one in _COLUMNS if one[1] not in left_out]
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for title, _, _ in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for name, model in models:
        title = f"against {Path(found.against.others[0]).name}" if name == "against" and found.against else name
        table.add_row(Text(title), *(_cell(model, field, form) for _, field, form in shown))
    of_tasks = _printed(_tasks_table(found), console) + "\n" if found.tasks else ""
    return f"{_printed(table, console)}\n{of_tasks}" + "\n".join(_lines(found)) + "\n"


def _printed(table: Table, console: Console) -> str:
    width = console.width if console.is_terminal else _WIDTH
    text = io.StringIO()
    Console(file=text, width=width, force_terminal=console.is_terminal, no_color=True).print(table)
    return text.getvalue()


def _tasks_table(found: Evaluated) -> Table:
    """A row for each task and metric, a column for each model."""
    table, models = Table(box=None, pad_edge=False), [name for name in _ROWS if name in found.tasks]
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for name in models:
        table.add_column(name, justify="right", no_wrap=True)
    for task, metrics in found.tasks[models[0]].items():
        for metric in (one for one in metrics if "_stderr" not in one):
            cells = (_with_error(found.tasks[name][task], metric) for name in models)
            table.add_row(Text(task), Text(metric), *cells)
    return table


def _with_error(metrics: Mapping[str, float], metric: str) -> str:
    name, *rest = metric.split(",")
    error = metrics.get(",".join([f"{name}_stderr", *rest]))
    value = metrics.get(metric)
    if value is None:
        return "–"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _cell(model: ModelFigures, field: str, form: str) -> str:
    value = getattr(model, field)
    sign = _SIGNS.get((model.bounds or {}).get(field, ""), "")
    return "–" if value is None else f"{sign}{value:{form}}"


def _lines(found: Evaluated) -> list[str]:
    after = found.models["after"]
    assert after is not None
    run = found.run.name if found.run.checkpoint is None else f"{found.run.checkpoint} of {found.run.name}"
    legend = "T is the teacher, S the student; CE and KL in nats per token."
    lines = [f"{run}, on {after.tokens:,} tokens of {found.rows:,} rows. {legend}"]
    if after.bounds:
        lines.append("The teacher is known by its most likely tokens: ≥ and ≤ are bounds of what the figure would be.")
    teacher = found.models["teacher"]
    if teacher is not None:
        lines.append(_gap(found, teacher))
    lines += _drafted(found)
    if found.other_tokens:
        whose = " and ".join("the teacher" if name == "teacher" else "the other run" for name in found.other_tokens)
        lines.append(f"Tokens of {whose} are others: CE and perplexity are not comparable, nats per byte are.")
    if found.internalised is not None:
        lines.append(_internalised(found.internalised))
    if found.against is not None:
        lines += _verdict(found.against)
    return lines


def _gap(found: Evaluated, teacher: ModelFigures) -> str:
    what, interval = "Gap to the teacher closed in CE", found.intervals["gap_closed"]
    if teacher.ce is None:
        reason = "which does not name all tokens" if teacher.tokens else "of which only drawn tokens are known"
        return f"{what}: not known, as is the CE of the teacher, {reason}."
    if found.gap_closed is None:
        return f"{what}: none can be given, for its CE is not lower than the student's was."
    doubt = "" if interval else "; its lead is too small on these rows for an interval"
    return f"{what}: {found.gap_closed:.1%}{_between(interval, '.1%')}{doubt}"


def _drafted(found: Evaluated) -> list[str]:
    """What the acceptance rate α means for a student that drafts γ tokens: (1 − α^(γ+1)) / (1 − α) tokens for each
    forward of the teacher, if tokens are accepted independently of each other (Leviathan et al. 2023,
    https://arxiv.org/abs/2211.17192, equation 1); the teacher's own token is among them."""
    parts = []
    for name in ("before", "after"):
        model = found.models.get(name)
        if model is not None and model.acceptance_rate is not None:
            sign = _SIGNS.get((model.bounds or {}).get("acceptance_rate", ""), "")
            parts.append(f"{sign}{_tokens_a_forward(model.acceptance_rate):.2f}")
    if len(parts) < 2:
        return []
    what = f"Speculative decoding with the student's drafts of {_DRAFTED} tokens"
    return [f"{what}: {parts[0]} tokens a forward of the teacher before, {parts[1]} after"]


def _tokens_a_forward(rate: float) -> float:
    """Of speculative decoding at an acceptance rate, as a sum, which has no 0/0 at 1."""
    return sum(rate**i for i in range(_DRAFTED + 1))


def _internalised(found: Internalised) -> str:
    kl = f"KL(T‖S) {found.kl_before:.4f} before and {found.kl_after:.4f} after"
    where = f"{kl} on the teacher's answers to {found.prompts:,} prompts ({found.tokens:,} tokens)"
    if found.share is None:
        return f"Internalised: there was nothing to distil, {where}"
    return f"Internalised of what the teacher alone reads: {found.share:.1%}{_between(found.interval, '.1%')}; {where}"


def _verdict(against: Against) -> list[str]:
    verdict = against.verdict
    named = against.others[0] if len(against.others) == 1 else f"{len(against.others)} runs"
    what = "CE" if against.unit == "token" else "nats per byte"
    left_out = f", {against.repeated_in_train:,} left out that are in data.train" if against.repeated_in_train else ""
    return [
        f"Against {named}: {what} {verdict.difference:+.4f}{_between(verdict.interval, '+.4f')} on "
        f"{against.rows:,} rows{left_out} ({verdict.method})",
        f"Verdict: {verdict.word}",
    ]


def _between(interval: Interval | None, form: str) -> str:
    return "" if interval is None else f", {LEVEL:.0%} interval {interval[0]:{form}} to {interval[1]:{form}}"
