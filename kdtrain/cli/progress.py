"""How a run looks while it goes: a live bar on a terminal, plain or JSON lines in a log."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from transformers import TrainerCallback

from kdtrain.cli.completions import as_object, as_text
from kdtrain.cli.events import timed
from kdtrain.cli.history import History, Lines, duration
from kdtrain.cli.terminal import is_live, printable
from kdtrain.data import BuildReport
from kdtrain.runs.cache import CacheResult
from kdtrain.teachers.cached.store import HEAD
from kdtrain.trainer.completions import Completion

_LINE_S = 10  # between two lines of something that takes long


class ConsoleReporter:
    """A `kdtrain.runs.build.Reporter`: a bar where the console is a terminal, lines of text or JSON elsewhere.

    Quiet, it shows nothing: warnings and errors come through logging.
    """

    def __init__(self, console: Console, log_format: str = "text", quiet: bool = False) -> None:
        self._console = console
        self._json = log_format == "json"
        self._quiet = quiet
        self._bar: History | None = None
        self._next_line = 0.0

    def data(self, name: str, report: BuildReport) -> None:
        self._show(f"{name}: {report.summary()}", kind="data", name=name, summary=report.summary())

    def answers(self, done: int, total: int) -> None:
        """A line now and then while the teacher writes answers, and one at the end."""
        now = time.perf_counter()
        if done == total or now >= self._next_line:
            self._next_line = now + _LINE_S
            self._show(f"the teacher's answers: {done:,} of {total:,}", kind="answers", done=done, total=total)

    def completions(self, found: Sequence[Completion]) -> None:
        """A table of a few."""
        if not self._quiet:
            self._write(json.dumps(as_object(found)) if self._json else as_text(found, self._console))

    def plan(self, rows: Mapping[str, str]) -> None:
        if self._quiet or self._json:
            self._show("", kind="plan", **rows)
            return
        table = Table(Column(style="bold"), Column(overflow="fold"), show_header=False, box=None, pad_edge=False)
        for key, value in rows.items():
            table.add_row(key, printable(value))
        with self._console.capture() as captured:
            self._console.print(table, markup=False, highlight=False)
        for line in captured.get().splitlines():  # which a table fills up with blanks
            self._console.print(Text.from_ansi(line.rstrip()), soft_wrap=True, highlight=False)

    def callbacks(self) -> list[TrainerCallback]:
        if self._quiet:
            return []
        if self._json or not is_live(self._console):
            return [Lines(self._write, self._json)]
        self._bar = History(self._console)
        return [self._bar]

    def close(self) -> None:
        """Give the terminal back, also after a failure in the middle of training."""
        if self._bar is not None:
            self._bar.close()

    def _show(self, text: str, kind: str, **values: Any) -> None:
        if not self._quiet:
            self._write(json.dumps(timed(kind, **values)) if self._json else text)

    def _write(self, line: str) -> None:
        # A terminal's lines are cut between words; those of a file not at all.
        cut = is_live(self._console) and not self._json
        self._console.print(printable(line), markup=False, highlight=False, soft_wrap=not cut)


class CacheProgress(ConsoleReporter):
    """A `kdtrain.runs.cache.CacheReporter`: rows that are written, and the time that is left."""

    _progress: Progress | None = None
    _began = 0.0

    def rows(self, done: int, total: int) -> None:
        """A live bar on a terminal; in a log a line now and then, and one at the end."""
        now = time.perf_counter()
        if not done:
            self._began, self._next_line = now, now + _LINE_S
            return
        if not self._quiet and not self._json and is_live(self._console):
            self._bar_of(total).update(TaskID(0), completed=done)
        elif done == total or now >= self._next_line:
            self._next_line = now + _LINE_S
            left = (now - self._began) / done * (total - done)
            text = f"cache: {done:,} of {total:,} rows  {duration(left)} left"
            self._show(text, kind="cache", done=done, total=total, remaining_s=round(left, 1))

    def _bar_of(self, total: int) -> Progress:
        if self._progress is None:
            columns = (
                TextColumn("rows"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._progress = Progress(*columns, console=self._console)
            self._progress.add_task("", total=total)
            self._progress.start()
        return self._progress

    def close(self) -> None:
        """Give the terminal back."""
        super().close()
        if self._progress is not None:
            self._progress.stop()


def describe_cache(result: CacheResult, *, lmbda: float) -> str:
    """What has been written, and how to train from it."""
    of_head = (result.folder / HEAD).stat().st_size if (result.folder / HEAD).exists() else 0
    each = f"{(result.bytes - of_head) / result.tokens:.1f} bytes a token"
    head = f" and {of_head / 1e6:,.1f} MB of the head" if of_head else ""
    what = f"{result.rows:,} rows, {result.tokens:,} supervised tokens, {each}{head} in {result.folder}"
    lines = [f"{what} ({result.seconds:.0f} s)" if result.written else f"{what}: complete, nothing was left to write"]
    if (found := result.verified) is not None:
        bound = "" if found.bound is None else f"; of no token of theirs can it be above {found.bound:.2g}"
        lines.append(
            f"verified {found.rows} rows: the largest difference is {found.largest:.2g} {found.unit}, "
            f"and {found.allowed:.2g} is allowed{bound}"
        )
    off = " rlhf.lmbda=0" if lmbda else ""
    lines.append(f"train from it: kdtrain fit CONFIG rlhf.teacher.backend=cache rlhf.teacher.path={result.folder}{off}")
    return "\n".join(lines)
