"""Putting the page together, and writing it with its figures."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from kdtrain import __version__
from kdtrain.disk import writing
from kdtrain.runs.folder import write_atomically
from kdtrain.runs.report.calibration import calibration
from kdtrain.runs.report.changes import PLACES, as_yaml, changes, differing
from kdtrain.runs.report.charts import charts_of_run, charts_of_runs, colour_of_run
from kdtrain.runs.report.curves import COMPARED, panels_of
from kdtrain.runs.report.facts import data_facts, environment_facts, plan_facts, warnings_of
from kdtrain.runs.report.figures import figures_table, task_tables
from kdtrain.runs.report.png import write_png
from kdtrain.runs.report.ranking import over_seeds, ranked
from kdtrain.runs.report.record import RunRecord, read_runs
from kdtrain.runs.report.samples import SHADES, evaluated_samples, generated_samples
from kdtrain.runs.report.summary import command, subtitle, summary


def write_report(run_dirs: Sequence[Path], out: Path, *, picture: bool = True) -> Path:
    """Write the page of these runs to `out`, and beside it its figures as JSON and, with matplotlib, its curves as PNG.

    Args:
        run_dirs: one run, or several to be compared; none has to be finished.
        out: the page. JSON and PNG get its name with their own suffix.
        picture: whether there shall be a PNG, which can take longer than all the rest.

    Returns:
        The page's path.

    Raises:
        ConfigError: a folder holds no run, or none is named.
        CheckpointError: the files cannot be written.
    """
    runs = read_runs(run_dirs)
    content = _of_run(runs[0]) if len(runs) == 1 else _of_runs(runs)
    page = _page("run.html" if len(runs) == 1 else "runs.html", content)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
        write_atomically(out.with_suffix(".json"), json.dumps(_figures(runs), indent=2) + "\n")
        if picture:
            write_png(content["charts"], content["title"], out.with_suffix(".png"))
    return out


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kdtrain.runs.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = _with_code
    return environment


def _page(template: str, content: dict[str, Any]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return _environment().get_template(template).render(version=__version__, written=written, **content)


def _with_code(text: str) -> Markup:
    """Text in backticks as code; everything is escaped first."""
    parts = str(escape(text)).split("`")
    return Markup("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))


def _of_run(run: RunRecord) -> dict[str, Any]:
    return {
        "title": run.shown,
        "run": run,
        "subtitle": subtitle(run),
        "summary": summary(run),
        "warnings": warnings_of(run),
        "evaluate": command("evaluate", run),
        "figures": figures_table(run),
        "tasks": task_tables(run),
        "calibration": calibration(run),
        "charts": charts_of_run(panels_of(run), run),
        "samples": evaluated_samples(run),
        "generated": generated_samples(run),
        "shades": SHADES,
        "changes": changes(run.config),
        "yaml": as_yaml(run.config),
        "plan": plan_facts(run),
        "data": data_facts(run),
        "environment": environment_facts(run),
    }


def _of_runs(runs: Sequence[RunRecord]) -> dict[str, Any]:
    ranking = ranked(runs)
    ordered = [row.run for row in ranking.rows]
    different = differing(ordered)
    return {
        "title": f"{len(runs)} runs",
        "ranking": ranking,
        "over_seeds": over_seeds(ranking),
        "colours": [colour_of_run(place) for place in range(len(runs))],
        "summaries": [(run, subtitle(run), summary(run), command("report", run)) for run in ordered],
        "without_evaluation": [(run, command("evaluate", run)) for run in ordered if not run.evaluation],
        "charts": charts_of_runs(COMPARED, ordered),
        "differing": different,
        "common": [one for one in changes(ordered[0].config) if one.path not in different and one.path not in PLACES],
        "environment": environment_facts(ordered[0]),
    }


def _figures(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What `report.json` holds: what the page says, for programs."""
    ranking = ranked(runs) if len(runs) > 1 else None
    order = [row.run for row in ranking.rows] if ranking else list(runs)
    listed = []
    for run in order:
        said = summary(run)
        listed.append(
            {
                "folder": str(run.folder),
                "name": run.name,
                "state": run.state,
                "step": run.step,
                "sentences": said.sentences,
                "verdict": said.word or None,
                "notes": said.notes,
                "changes": {change.path: change.value for change in changes(run.config)},
                "last_record": run.training[-1] if run.training else None,
                "last_evaluation": run.evaluations[-1] if run.evaluations else None,
                "models": run.evaluation.get("models"),
                "gap_closed": run.evaluation.get("gap_closed"),
                "facts": run.facts,
            }
        )
    return {"kdtrain": __version__, "ranked_by": ranking.by or None if ranking else None, "runs": listed}
