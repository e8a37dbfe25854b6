"""The table of `evaluation.json`: student before and after, and its teacher."""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain.config.diagnose import clean
from kdtrain.runs.report.record import RunRecord, is_number
from kdtrain.runs.report.summary import compared_with

_ROWS = (("before", "student before"), ("after", "student after"), ("against", ""), ("teacher", "teacher"))
_COLUMNS = (
    ("ce", "CE", ".4f"),
    ("perplexity", "perplexity", ",.2f"),
    ("token_accuracy", "top-1", ".1%"),
    ("accuracy", "right answers", ".1%"),
    ("forward_kl", "KL(T‖S)", ".4f"),
    ("reverse_kl", "KL(S‖T)", ".4f"),
    ("agreement", "agreement", ".1%"),
    ("acceptance_rate", "acceptance", ".1%"),
    ("ece", "ECE", ".3f"),
    ("visual_reliance", "visual reliance", ".3f"),
)
_SIGNS = {"lower": "≥ ", "upper": "≤ "}


@dataclass(frozen=True)
class Table:
    """Titles and rows of a table."""

    title: str
    titles: list[str]
    rows: list[tuple[str, str, list[str]]]
    """Key, name and cells of each."""


def figures_table(run: RunRecord) -> Table | None:
    """None of a run that was not evaluated."""
    models = run.evaluation.get("models")
    if not isinstance(models, dict):
        return None
    against = compared_with(run)
    present = [(key, title or against, models[key]) for key, title in _ROWS if isinstance(models.get(key), dict)]
    columns = [column for column in _COLUMNS if any(is_number(model.get(column[0])) for _, _, model in present)]
    rows = []
    for key, title, model in present:
        bounds = model.get("bounds") or {}
        cells = []
        for name, _, form in columns:
            value = model.get(name)
            cells.append(f"{_SIGNS.get(str(bounds.get(name)), '')}{value:{form}}" if is_number(value) else "–")
        rows.append((key, title, cells))
    return Table("", [title for _, title, _ in columns], rows) if rows and columns else None


def task_tables(run: RunRecord) -> list[Table]:
    """A table of each task of lm-eval that the models were put to, a column for each of its metrics."""
    found = run.evaluation.get("tasks")
    by_model = (
        {key: tasks for key, tasks in found.items() if isinstance(tasks, dict)} if isinstance(found, dict) else {}
    )
    tables = []
    for task in dict.fromkeys(task for tasks in by_model.values() for task in tasks):
        results = {key: tasks[task] for key, tasks in by_model.items() if isinstance(tasks.get(task), dict)}
        metrics = list(dict.fromkeys(name for result in results.values() for name in result))
        rows = []
        for key, title in _ROWS:
            if key in results:
                values = [results[key].get(name) for name in metrics]
                cells = [f"{value:.4f}" if is_number(value) else "–" for value in values]
                rows.append((key, title or compared_with(run), cells))
        tables.append(Table(clean(f"lm-eval, {task}"), [clean(name) for name in metrics], rows))
    return tables
