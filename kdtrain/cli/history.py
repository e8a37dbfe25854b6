"""The records of a run as it goes: a table that scrolls on a terminal, a line or an object each in a log."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.cli.events import timed
from kdtrain.runs.log import is_record
from kdtrain.trainer.best_step import best_so_far

# In the order in which one reads them; the rest of a record is in logging.jsonl.
_TERMS = ("llm_kd_loss", "sft_loss", "vision_kd_loss", "hidden_kd_loss")
_SHOWN = ("loss", *_TERMS, "token_accuracy", "teacher_agreement", "grad_norm")
_OF_KIND = ("llm_kd_loss_on_policy", "llm_kd_loss_off_policy", "sft_loss_off_policy")

_HEADER_EVERY = 25  # rows, so that one stands on every screen
_GAP = 2


def number(value: float) -> str:
    """Five digits at most, and never more than seven characters."""
    if value and not 0.001 <= abs(value) < 10_000:
        return f"{value:.1e}"
    return f"{value:.{4 - len(str(int(abs(value)))) + 1}f}"


def percent(value: float) -> str:
    return f"{value:.0%}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class Column(NamedTuple):
    """A column of the table; of those that do not fit, the ones with the largest `rank` are left out."""

    title: str
    key: str
    width: int
    show: Callable[[float], str]
    rank: int


COLUMNS = (
    Column("loss", "loss", 7, number, 0),
    Column("llm_kd", "llm_kd_loss", 7, number, 1),
    Column("sft", "sft_loss", 7, number, 1),
    Column("vision", "vision_kd_loss", 7, number, 1),
    Column("hidden", "hidden_kd_loss", 7, number, 1),
    Column("on-policy", "on_policy_fraction", 9, percent, 2),
    Column("accuracy", "token_accuracy", 8, percent, 3),
    Column("agreement", "teacher_agreement", 9, percent, 4),
    Column("grad", "grad_norm", 7, number, 6),
    Column("tokens", "completion_length", 6, lambda value: f"{value:.0f}", 7),
    Column("cut", "cut_fraction", 4, percent, 8),
    Column("selected", "selected_fraction", 8, percent, 7),
    Column("waiting", "teacher_wait_fraction", 7, percent, 7),
    Column("tok/s", "tokens_per_second", 7, lambda value: f"{value:,.0f}", 5),
    Column("left", "remaining_s", 7, duration, 0),
)


class Table:
    """Rows of equal columns, as many as fit into a width; a header comes again now and then, and where they change."""

    def __init__(self, width: Callable[[], int], max_steps: int) -> None:
        self._width, self._max_steps = width, max_steps
        self._first = max(len(f"{max_steps}/{max_steps}"), len(f"eval {max_steps}"))
        self._seen: set[str] = set()
        self._columns: list[Column] = []
        self._rows = 0

    def training(self, step: int, logs: Mapping[str, float]) -> list[str]:
        """The lines of a training record."""
        keys = set(logs)
        if "llm_kd_loss" not in logs or not (logs.get("on_policy_fraction") or "on_policy_fraction" in self._seen):
            keys.discard("on_policy_fraction")  # no answer is the student's, or none so far
        return self._lines(f"{step}/{self._max_steps}", {key: logs[key] for key in keys})

    def evaluation(self, step: int, logs: Mapping[str, float], is_best: bool) -> list[str]:
        """The lines of an evaluation."""
        values = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        return self._lines(f"eval {step}", values, "best" if is_best else "")

    def _lines(self, first: str, values: Mapping[str, float], last: str = "") -> list[str]:
        self._seen |= values.keys()
        columns, lines = self._fitting(), []
        if columns != self._columns or self._rows % _HEADER_EVERY == 0:
            lines.append(self._line("step", {column.key: column.title for column in columns}, columns))
            self._columns, self._rows = columns, 0
        cells = {column.key: column.show(values[column.key]) for column in columns if column.key in values}
        self._rows += 1
        return [*lines, self._line(first, {**cells, **({"remaining_s": last} if last else {})}, columns)]

    def _fitting(self) -> list[Column]:
        """Columns that have had a value, without the least important ones that are too many."""
        columns = [column for column in COLUMNS if column.key in self._seen or column.key == "remaining_s"]
        while self._first + sum(_GAP + column.width for column in columns) > self._width() and len(columns) > 2:
            columns.remove(max(reversed(columns), key=lambda column: column.rank))
        return columns

    def _line(self, first: str, cells: Mapping[str, str], columns: list[Column]) -> str:
        texts = [f"{first:>{self._first}}", *(f"{cells.get(one.key, ''):>{one.width}}" for one in columns)]
        return (" " * _GAP).join(texts).rstrip()


class History(TrainerCallback):
    """On a terminal: a row for each record and evaluation, which stays, and under them a bar that moves."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("step"), TextColumn("{task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False), console=console, transient=True, refresh_per_second=4,
        )  # fmt: skip
        self._table: Table | None = None
        self._left = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._table = Table(lambda: self._console.width, state.max_steps)
        self._console.print()
        self._progress.start()
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if self._table is not None and "loss" in logs:
            self._print(self._table.training(state.global_step, logs))
            if "remaining_s" in logs:
                self._left = f"{duration(logs['remaining_s'])} left"
                self._progress.update(self._task, description=self._left)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader[Any] | None = None,
        **_: Any,
    ) -> None:
        if self._table is not None:
            self._progress.update(self._task, description="evaluating")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **_: Any,
    ) -> None:
        if self._table is None:
            return
        best = best_so_far(state)
        self._print(
            self._table.evaluation(state.global_step, metrics, best is not None and best.step == state.global_step)
        )
        self._progress.update(self._task, description=self._left)

    def _print(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(line, markup=False, highlight=False, no_wrap=True, overflow="ellipsis")

    def close(self) -> None:
        """Give the terminal back."""
        self._progress.stop()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()


class Lines(TrainerCallback):
    """In a log: one line per record, an object for programs, or text with the time that is left."""

    def __init__(self, write: Callable[[str], None], as_json: bool) -> None:
        self._write, self._json = write, as_json
        self._on_policy = False

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if not is_record(logs):
            return
        if self._json:
            self._write(json.dumps(timed("log", **{"step": state.global_step, "max_steps": state.max_steps, **logs})))
            return
        left = f"  {duration(logs['remaining_s'])} left" if "remaining_s" in logs else ""
        self._on_policy |= bool(logs.get("on_policy_fraction"))
        if shown := describe(logs, self._on_policy):
            self._write(f"step {state.global_step}/{state.max_steps}  {shown}{left}")


def describe(logs: Mapping[str, Any], on_policy: bool = True) -> str:
    """The metrics of a record that one watches, in short.

    Args:
        on_policy: whether some answer of the run was the student's: else its share of them is left out.
    """
    prefix = "" if "loss" in logs else "eval_"
    parts = [f"{prefix}{key} {logs[prefix + key]:.4g}" for key in _SHOWN if prefix + key in logs]
    # Without llm_kd_loss no answer is the student's.
    if on_policy and "llm_kd_loss" in logs and "on_policy_fraction" in logs:
        parts.insert(1, f"on-policy {logs['on_policy_fraction']:.0%}")
    if "selected_fraction" in logs:
        parts.insert(2, f"selected {logs['selected_fraction']:.0%}")
    if "completion_length" in logs and "cut_fraction" in logs:
        parts.append(f"answers {logs['completion_length']:.0f} tokens, {logs['cut_fraction']:.0%} cut")
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
    if "teacher_wait_fraction" in logs:
        parts.append(f"teacher {logs['teacher_wait_fraction']:.0%} wait")
    return "  ".join(parts)


def describe_kinds(logs: Mapping[str, Any]) -> str:
    """The terms of on-policy and off-policy steps, where a record has both; else nothing."""
    if not 0 < logs["on_policy_fraction"] < 1:
        return ""
    return "  ".join(f"{key} {logs[key]:.4g}" for key in _OF_KIND if key in logs)
