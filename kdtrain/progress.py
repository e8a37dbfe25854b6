"""How a run looks while it goes: a live bar on a terminal, plain or JSON lines in a log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.data import BuildReport
from kdtrain.log import is_record

# In the order in which one reads them; the rest of a record is in logging.jsonl.
_SHOWN = ("loss", "llm_kd_loss", "sft_loss", "vision_kd_loss", "token_accuracy", "teacher_agreement", "grad_norm")


class ConsoleReporter:
    """A `kdtrain.build.Reporter` over a console that writes to stderr.

    Args:
        console: where to; its `is_terminal` decides between a bar and lines.
        log_format: "text" or "json".
        quiet: only warnings and errors, which come through logging.
    """

    def __init__(self, console: Console, log_format: str = "text", quiet: bool = False) -> None:
        self._console = console
        self._json = log_format == "json"
        self._quiet = quiet
        self._bar: ProgressBar | None = None
        self._next_line = 0.0

    def data(self, name: str, report: BuildReport) -> None:
        """What became of the rows of a data set."""
        if self._quiet:
            return
        if self._json:
            self._line({"event": "data", "name": name, "summary": report.summary()})
        else:
            self._console.print(f"{name}: {report.summary()}", markup=False, highlight=False, soft_wrap=True)

    def answers(self, done: int, total: int) -> None:
        """A line now and then while the teacher writes answers, and one at the end."""
        now = time.perf_counter()
        if self._quiet or (done < total and now < self._next_line):
            return
        self._next_line = now + 10
        if self._json:
            self._line({"event": "answers", "done": done, "total": total})
        else:
            self._console.print(f"the teacher's answers: {done:,} of {total:,}", markup=False, highlight=False)

    def plan(self, rows: Mapping[str, str]) -> None:
        """The table of what was derived."""
        if self._quiet:
            return
        if self._json:
            self._line({"event": "plan", **rows})
            return
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for key, value in rows.items():
            table.add_row(key, value)
        self._console.print(table, markup=False, highlight=False)

    def callbacks(self) -> list[TrainerCallback]:
        """What shows the steps."""
        if self._quiet:
            return []
        if self._json:
            return [JsonLines(self._line)]
        if not self._console.is_terminal:
            return [PlainLines(self._console)]
        self._bar = ProgressBar(self._console)
        return [self._bar]

    def close(self) -> None:
        """Give the terminal back, also after a failure in the middle of training."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, record: Mapping[str, Any]) -> None:
        self._console.print(json.dumps(record), markup=False, highlight=False, soft_wrap=True)


class _Records(TrainerCallback):
    """Shows each record; what it looks like is up to `show`."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if is_record(logs):
            self.show(state, logs)

    def show(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        raise NotImplementedError


class JsonLines(_Records):
    """One JSON object per record."""

    def __init__(self, line: Callable[[Mapping[str, Any]], None]) -> None:
        self._line = line

    def show(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        self._line({"event": "log", "step": state.global_step, **logs})


class PlainLines(_Records):
    """One line per record, with the time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._first_step, self._began = 0, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._first_step, self._began = state.global_step, time.perf_counter()

    def show(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        left, done = "", state.global_step - self._first_step
        if "loss" in logs and done:
            seconds = (time.perf_counter() - self._began) / done
            left = f"  {_duration(seconds * (state.max_steps - state.global_step))} left"
        line = f"step {state.global_step}/{state.max_steps}  {describe(logs)}{left}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class ProgressBar(_Records):
    """A live bar with the newest loss terms; evaluations stay as lines above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn(), console=console
        )
        self._terms = Text(no_wrap=True, overflow="ellipsis")
        self._live = Live(Group(self._progress, self._terms), console=console)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._live.start()
        self._task = self._progress.add_task("", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.update(self._task, completed=state.global_step)

    def show(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        if "loss" in logs:
            self._terms.plain = describe(logs)
        else:
            self._console.print(f"step {state.global_step}  {describe(logs)}", markup=False, highlight=False)

    def close(self) -> None:
        """Take the bar off the terminal."""
        self._live.stop()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()


def describe(logs: Mapping[str, Any]) -> str:
    """The metrics of a record that one watches, in short."""
    prefix = "" if "loss" in logs else "eval_"
    parts = [f"{prefix}{key} {logs[prefix + key]:.4g}" for key in _SHOWN if prefix + key in logs]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
