"""What `kdtrain fit` has led to, on stdout: the last line of the run, or the last JSON object."""

from __future__ import annotations

import json

from kdtrain.cli.events import timed
from kdtrain.cli.history import describe, describe_kinds
from kdtrain.preflight.resources import in_time
from kdtrain.runs.fit import RunResult
from kdtrain.runs.report.record import shown_path
from kdtrain.trainer.best_step import as_object


def as_text(result: RunResult, dry_run: bool) -> str:
    """One line; of a dry run also the terms of its windows, and the time."""
    cost = "".join(f", {count:,} {name.replace('_', ' ')}" for name, count in result.teacher.items())
    teacher = f"; the teacher's answers:{cost[1:]}" if cost else ""
    if not dry_run:
        return f"{_steps(result)}, {_model(result)} in {shown_path(result.run_dir)} ({result.seconds:.0f} s){teacher}\n"
    lines = [f"dry run passed ({result.seconds:.0f} s){teacher}"]
    shown = describe(result.metrics, on_policy=bool(result.metrics.get("on_policy_fraction")))
    lines.append(f"{shown}  peak_memory_gib {result.metrics['peak_memory_gib']:.2f}")
    if kinds := describe_kinds(result.metrics):
        lines.append(kinds)
    whole, each = in_time(result.metrics["run_time_s"]), result.metrics["step_time_s"]
    steps = f"{result.max_steps:,} steps of {each:.2g} s"
    lines.append(f"the run: about {whole} for {steps}, beside evaluation and saving")
    return "\n".join(lines) + "\n"


def _steps(result: RunResult) -> str:
    steps = f"stopped early at step {result.steps} of {result.max_steps}" if result.stopped_early else None
    best = result.best
    won = f"; best {best.metric} {best.value:.4g} at step {best.step}" if best is not None else ""
    return (steps or f"{result.steps} {'step' if result.steps == 1 else 'steps'}") + won


def _model(result: RunResult) -> str:
    """Which step's model is saved; not said where there is no doubt."""
    if result.best is None:
        return "model"
    if result.model_step == result.best.step:
        kind = "best" if result.model_step < result.steps else "best and last"
    elif result.model_step == result.steps:
        kind = "last"
    else:
        kind = "best of those saved"
    return f"model of step {result.model_step} ({kind})"


def as_json(result: RunResult, dry_run: bool) -> str:
    """One object on one line."""
    what = {
        "run_dir": None if dry_run else str(result.run_dir),
        "steps": result.steps,
        "max_steps": result.max_steps,
        "seconds": round(result.seconds, 1),
        "stopped_early": result.stopped_early,
        "best": as_object(result.best),
        "model_step": None if dry_run else result.model_step,
        "metrics": result.metrics,
        "teacher": result.teacher,
    }
    return json.dumps(timed("dry_run" if dry_run else "finished", **what)) + "\n"
