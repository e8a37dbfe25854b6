"""How a run looks while it goes: a live bar on a terminal, plain or JSON lines in a log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdtrain.data import BuildReport
from kdtrain.runs.log import is_record

# In the order in which one reads them; the rest of a record is in logging.jsonl.
_SHOWN = ("loss", "llm_kd_loss", "sft_loss", "vision_kd_loss", "token_accuracy", "teacher_agreement", "grad_norm")


class ConsoleReporter:
    """A `kdtrain.runs.build.Reporter`: a bar where the console is a terminal, lines of text or JSON elsewhere.

    Quiet, it shows nothing: warnings and errors come through logging.
    """

    def __init__(self, console: Console, log_format: str = "text", quiet: bool = False) -> None:
        self._console = console
        self._json = log_format == "json"
        self._quiet = quiet
        self._bar: ProgressBar | None = None
        self._next_line = 0.0

    def data(self, name: str, report: BuildReport) -> None:
        self._show(f"{name}: {report.summary()}", event="data", name=name, summary=report.summary())

    def answers(self, done: int, total: int) -> None:
        """A line now and then while the teacher writes answers, and one at the end."""
        now = time.perf_counter()
        if done == total or now >= self._next_line:
            self._next_line = now + 10
            self._show(f"the teacher's answers: {done:,} of {total:,}", event="answers", done=done, total=total)

    def plan(self, rows: Mapping[str, str]) -> None:
        if self._quiet or self._json:
            self._show("", event="plan", **rows)
            return
        table = Table(Column(style="bold"), Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
        for key, value in rows.items():
            table.add_row(key, value)
        self._console.print(table, markup=False, highlight=False)

    def callbacks(self) -> list[TrainerCallback]:
        if self._quiet:
            return []
        if self._json or not self._console.is_terminal:
            return [Lines(self._write, self._json)]
        self._bar = ProgressBar(self._console)
        return [self._bar]

    def close(self) -> None:
        """Give the terminal back, also after a failure in the middle of training."""
        if self._bar is not None:
            self._bar.close()

    def _show(self, text: str, **event: Any) -> None:
        if not self._quiet:
            self._write(json.dumps(event) if self._json else text)

    def _write(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Lines(TrainerCallback):
    """One line per record: an object for programs, or text with the time left."""

    def __init__(self, write: Callable[[str], None], as_json: bool) -> None:
        self._write, self._json = write, as_json
        self._first_step, self._began = 0, 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._first_step, self._began = state.global_step, time.perf_counter()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if not is_record(logs):
            return
        if self._json:
            self._write(json.dumps({"event": "log", "step": state.global_step, **logs}))
            return
        left, done = "", state.global_step - self._first_step
        if "loss" in logs and done:
            seconds = (time.perf_counter() - self._began) / done
            left = f"  {_duration(seconds * (state.max_steps - state.global_step))} left"
        self._write(f"step {state.global_step}/{state.max_steps}  {describe(logs)}{left}")


class ProgressBar(TrainerCallback):
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

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any
    ) -> None:
        if "loss" in logs:
            self._terms.plain = describe(logs)
        elif is_record(logs):
            self._console.print(f"step {state.global_step}  {describe(logs)}", markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()


def describe(logs: Mapping[str, Any]) -> str:
    """The metrics of a record that one watches, in short."""
    prefix = "" if "loss" in logs else "eval_"
    parts = [f"{prefix}{key} {logs[prefix + key]:.4g}" for key in _SHOWN if prefix + key in logs]
    if "tokens_per_second" in logs:
        parts.append(f"{logs['tokens_per_second']:,.0f} tok/s")
    if "teacher_wait_fraction" in logs:
        parts.append(f"teacher {logs['teacher_wait_fraction']:.0%} wait")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"
