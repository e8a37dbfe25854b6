"""What a run notes as it begins, for its report: the plan, the rows that were read, and the environment."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdtrain import __version__
from kdtrain.config.diagnose import clean
from kdtrain.ranks import is_main
from kdtrain.runs.folder import REPORT_DATA, write_atomically
from kdtrain.runs.report.record import RunRecord, working_folder

if TYPE_CHECKING:
    from kdtrain.data import BuildReport

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "trl", "transformers", "accelerate", "peft", "datasets", "safetensors")
_COUNTS = {
    "rows_read": "rows read",
    "rows_kept": "rows kept",
    "rows_per_epoch": "rows per epoch",
    "total_tokens": "tokens",
    "supervised_tokens": "supervised tokens",
    "longest": "longest row, tokens",
    "bad_rows": "bad rows, left out",
    "truncated": "rows truncated at max_length",
    "dropped": "rows dropped, too long",
    "prompt_only_rows": "rows with a prompt only",
    "plain_text_rows": "rows of plain text",
    "teacher_answer_rows": "rows that the teacher answers",
    "image_rows": "rows with images",
    "images": "images",
    "stop_tokens_added": "rows that got an end-of-turn token",
    "unterminated_rows": "rows that end without an end-of-turn token",
    "teacher_text_rows": "rows with another text for the teacher",
}
_MOST_WARNINGS = 20
_ALWAYS = ("rows_read", "rows_kept", "bad_rows")


class FactsReporter:
    """Hands on what a run reports, and keeps what its report will say of it."""

    def __init__(self, reporter: Any) -> None:
        self._reporter = reporter
        self.facts: dict[str, Any] = {"plan": {}, "data": {}}

    @property
    def began(self) -> bool:
        """Whether the run has come as far as its plan."""
        return bool(self.facts["plan"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reporter, name)

    def data(self, name: str, report: BuildReport) -> None:
        counts = {key: value for key, value in asdict(report).items() if key in (*_COUNTS, "first_bad", "notes")}
        if report.streamed:  # these are of its first rows, and an epoch has none
            counts |= {"rows_per_epoch": 0, "notes": [*report.notes, "streamed: the counts are of the first rows"]}
        self.facts["data"][name] = counts
        self._reporter.data(name, report)

    def plan(self, rows: Mapping[str, str]) -> None:
        self.facts["plan"] = dict(rows)
        self._reporter.plan(rows)


class Warnings(logging.Handler):
    """Keeps what is warned of, once each: findings before the first step, a student that runs away."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if len(self.messages) < _MOST_WARNINGS:
            self.messages[clean(record.getMessage())] = None


def write_facts(run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Rank 0 keeps the facts of a run, in the file that its report's figures will be in."""
    if not is_main():
        return
    noted = {**facts, "environment": environment()}
    content = {"kdtrain": __version__, "runs": [{"folder": str(run_dir.absolute()), "facts": noted}]}
    write_atomically(run_dir / REPORT_DATA, json.dumps(content, indent=2) + "\n")


def environment() -> dict[str, str]:
    """Versions and machine, without its name or its user's."""
    found = {"kdtrain": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "platform": platform.platform(), "processors": str(os.cpu_count())}


# ---- as the page shows them ------------------------------------------------------------------------------------------


def plan_facts(run: RunRecord) -> list[tuple[str, str]]:
    """The table that the run has shown as it began."""
    plan = run.facts.get("plan")
    here = f"{working_folder() or Path('/')}/"  # as in the rest of the page, paths begin where one stands
    return [(clean(str(k)), clean(str(v)).replace(here, "")) for k, v in plan.items()] if isinstance(plan, dict) else []


def warnings_of(run: RunRecord) -> list[str]:
    """What was warned of while it ran."""
    found = run.facts.get("warnings")
    return [clean(str(message)) for message in found] if isinstance(found, list) else []


def environment_facts(run: RunRecord) -> list[tuple[str, str]]:
    """Versions and machine."""
    found = run.facts.get("environment")
    return [(clean(str(k)), clean(str(v))) for k, v in found.items()] if isinstance(found, dict) else []


def data_facts(run: RunRecord) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
    """Of each split its counts, and its notes and first bad rows."""
    splits = run.facts.get("data")
    found = []
    for name, counts in splits.items() if isinstance(splits, dict) else ():
        rows = [(title, counts.get(key)) for key, title in _COUNTS.items()]
        shown = [(t, f"{v:,}") for (t, v), key in zip(rows, _COUNTS, strict=True) if _says(v, key)]
        if total := counts.get("total_tokens"):
            shown.append(("share supervised", f"{counts.get('supervised_tokens', 0) / total:.1%}"))
        texts = [f"bad: {clean(str(bad))}" for bad in counts.get("first_bad", ())]
        found.append((clean(str(name)), shown, texts + [clean(str(note)) for note in counts.get("notes", ())]))
    return found


def _says(value: Any, key: str) -> bool:
    return isinstance(value, int) and (value > 0 or key in _ALWAYS)
