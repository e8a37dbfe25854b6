"""`kdtrain fit --sweep`: runs one after the other in this process, each evaluated on held-out rows, then compared.

    plan (`sweep_plan`) -> for each run: fit, evaluate -> ranking, sweep.json, report.html

One import and one reading of the data serve all of them; nothing else passes from one run to the next (`isolation`). A
run that fails is noted, and the next one begins.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from kdtrain.config.arguments import build_train_arguments
from kdtrain.config.model_folder import read_map
from kdtrain.data.errors import show
from kdtrain.disk import in_units, writing
from kdtrain.errors import CheckpointError, Interrupted, KdtrainError, PreflightError
from kdtrain.preflight.devices import free_disk
from kdtrain.preflight.resources import disk_need, written_before
from kdtrain.preflight.run_setup import setup_of
from kdtrain.preflight.simulated import NotSimulated
from kdtrain.runs.bench import EvaluationReporter
from kdtrain.runs.build import Reporter
from kdtrain.runs.changed import refuse_changed_options
from kdtrain.runs.evaluate import evaluate
from kdtrain.runs.fit import fit
from kdtrain.runs.folder import (
    ANOTHER_FOLDER,
    CONFIG,
    EVALUATION,
    REPORT,
    STATUS,
    SWEEP,
    changed_options,
    require_usable,
    write_atomically,
)
from kdtrain.runs.isolation import isolated
from kdtrain.runs.lock import refuse_if_locked, run_lock
from kdtrain.runs.read_data import reading_once
from kdtrain.runs.report import write_report
from kdtrain.runs.signals import interrupting
from kdtrain.runs.sweep_plan import PlannedRun, SweepPlan
from kdtrain.runs.sweep_ranking import Ranking, Scored, rank
from kdtrain.runs.trained import open_run

logger = logging.getLogger(__name__)


class SweepReporter(Protocol):
    """Shows how far a sweep is."""

    def run(self, number: int, of: int, run: PlannedRun, finished: bool) -> Reporter:
        """A run begins, or has been trained before; what shows its training."""

    def evaluation(self) -> EvaluationReporter:
        """It is evaluated; what shows that."""

    def outcome(self, outcome: Outcome) -> None:
        """It has come to its end."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    run: PlannedRun
    state: str
    """finished, failed, stopped, not evaluated (stopped behind its training), or not run."""
    exit_code: int | None = None
    message: str = ""
    figures: Mapping[str, float | None] = field(default_factory=dict)
    """Of the trained student, as in `evaluation.json`."""
    gap_closed: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `sweep.json` has it."""
        own: dict[str, Any] = {"name": self.run.name, "values": dict(self.run.values), "state": self.state}
        own |= {"exit_code": self.exit_code, "message": self.message}
        return own | {"figures": dict(self.figures) or None, "gap_closed": self.gap_closed}


class Sweep:
    """The runs of a plan, and what is known of them so far."""

    def __init__(self, plan: SweepPlan, *, resume: bool, dry_run: bool, allow_changes: Sequence[str] = ()) -> None:
        self.plan, self._resume, self._dry_run = plan, resume, dry_run
        self._allow_changes = allow_changes  # of runs that have begun; one that has finished is as it is
        self.outcomes = [Outcome(run, "not run") for run in plan.runs]

    @property
    def ranking(self) -> Ranking:
        """Of the runs that have come to their end."""
        return rank(self.plan.axes, [Scored(one.run.values, one.figures) for one in self.outcomes])

    def to_dict(self) -> dict[str, Any]:
        """What `sweep.json` holds."""
        ranking = self.ranking
        return {
            "axes": {axis.key: list(axis.values) for axis in self.plan.axes},
            "ranked_by": ranking.metric,
            "runs": [self.outcomes[i].to_dict() for i in ranking.order],
            "effects": [
                {"axis": effect.axis.key, "means": dict(effect.means), "spread": effect.spread, "runs": effect.runs}
                for effect in ranking.effects
            ],
            "settings": [
                {"values": dict(one.values), "mean": one.mean, "seeds": len(one.by_seed)} for one in ranking.settings
            ],
            "best_by": {name: dict(one.values) for name, one in ranking.best_by.items()},
            "verdict": ranking.verdict and ranking.verdict.word,
        }

    def train(self, reporter: SweepReporter) -> None:
        """Train and evaluate what is not finished yet.

        Raises:
            PreflightError: a folder holds what must not be written over; nothing has begun.
            CheckpointError: a finished run was made with other options, or a file cannot be written.
            Interrupted: SIGINT or SIGTERM. What has finished is kept.
        """
        refuse_if_locked(self.plan.folder)
        self._check_folders()
        stopped = "Stopped. Finished runs are kept; go on with the same command and --resume auto."
        with nullcontext() if self._dry_run else run_lock(self.plan.folder), interrupting(stopped), reading_once():
            self._check_disk()
            self._write()
            for number, run in enumerate(self.plan.runs):
                finished = self._resume and is_trained(run.folder)
                of_run = reporter.run(number + 1, len(self.plan.runs), run, finished)
                try:
                    self.outcomes[number] = self._outcome(run, finished, of_run, reporter.evaluation())
                except (Interrupted, KeyboardInterrupt):
                    self.outcomes[number] = Outcome(run, "not evaluated" if is_trained(run.folder) else "stopped")
                    self._write()
                    raise
                self._write()
                reporter.outcome(self.outcomes[number])

    def report(self) -> Path | None:
        """Write `report.html` over the runs that have finished; None where it is switched off, or cannot be written."""
        folders = [one.run.folder for i in self.ranking.order if (one := self.outcomes[i]).state == "finished"]
        if self._dry_run or not folders or not self.plan.runs[0].config.training_options.report:
            return None
        try:
            return write_report(folders, self.plan.folder / REPORT)
        except Exception as error:  # no run fails for it
            logger.warning("The report was not written: %s", show(str(error), 400))
            return None

    def _check_folders(self) -> None:
        """Refuse, before anything begins, folders that hold something else."""
        folder = self.plan.folder
        if folder.is_dir() and any(folder.iterdir()) and not (folder / SWEEP).exists():
            what = "holds a run" if (folder / CONFIG).exists() else "is not empty, and holds no sweep of kdtrain"
            raise PreflightError(f"training.output_dir {folder} {what}. Name {ANOTHER_FOLDER}.")
        if not self._resume and any(is_trained(run.folder) for run in self.plan.runs):
            raise PreflightError(
                f"training.output_dir {folder} holds a sweep. Go on with it by the same command and --resume "
                f"auto, which keeps those that have finished, or name {ANOTHER_FOLDER}."
            )
        for run in self.plan.runs:
            if self._resume and is_trained(run.folder):
                _check_options(run)
            else:
                require_usable(run.folder, resuming=self._resume)
                refuse_changed_options(run.config, "auto" if self._resume else None, self._allow_changes)

    def _check_disk(self) -> None:
        """Refuse runs that have no room together: each alone may have it, and the last ones would fail for want of it.

        Before the data is read their steps are not known where epochs say how many: one checkpoint is then taken.
        """
        needed = held = 0
        runs = [run for run in self.plan.runs if not (self._resume and is_trained(run.folder))]
        for run in runs if not self._dry_run else ():
            with isolated():
                args = build_train_arguments(run.config).training_args
                world, on_cpu = args.world_size, args.device.type == "cpu"
                try:
                    need = disk_need(setup_of(run.config, args, world=world, on_cpu=on_cpu), args, None)
                except (KdtrainError, NotSimulated):  # the run itself says why
                    continue
            needed, held = needed + need.bytes, held + written_before(run.folder)
        free = free_disk(self.plan.folder) + held
        if needed > free:
            raise PreflightError(
                f"The {len(runs)} runs of this sweep write about {in_units(needed)} together, with their checkpoints; "
                f"{in_units(free)} are free in {self.plan.folder}. Name a folder on a larger disk, or let them keep "
                "less: training.save_strategy=no keeps the models alone."
            )

    def _outcome(self, run: PlannedRun, finished: bool, reporter: Reporter, evaluating: EvaluationReporter) -> Outcome:
        try:
            if not finished:
                begun = run.folder.is_dir() and any(run.folder.iterdir())
                with isolated():
                    arguments = build_train_arguments(run.config)
                    fit(
                        arguments,
                        reporter,
                        resume="auto" if begun else None,
                        allow_changes=self._allow_changes,
                        dry_run=self._dry_run,
                    )
            if self._dry_run:
                return Outcome(run, "finished", 0)
            # Somebody may have evaluated a checkpoint of it meanwhile.
            if read_map(run.folder / EVALUATION).get("checkpoint", "none yet") is not None:
                with isolated():
                    evaluate([open_run(run.folder)], [], evaluating)
            found = read_map(run.folder / EVALUATION)
            return Outcome(run, "finished", 0, "", found["models"]["after"], found["gap_closed"])
        except Interrupted:
            raise
        except KdtrainError as error:
            return Outcome(run, "failed", error.exit_code, str(error))
        except Exception as error:
            logger.error("%s: an error that nobody has foreseen.", run.name, exc_info=error)
            return Outcome(run, "failed", KdtrainError.exit_code, repr(error))

    def _write(self) -> None:
        if self._dry_run:
            return
        with writing(self.plan.folder / SWEEP):
            self.plan.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.plan.folder / SWEEP, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")


def is_trained(run_dir: Path) -> bool:
    """Whether a run has come to its end."""
    return read_map(run_dir / STATUS).get("state") == "finished"


def _check_options(run: PlannedRun) -> None:
    """Refuse to take a finished run for one with other options."""
    changed = changed_options(run.folder, run.config)
    changed.pop("training.output_dir", None)  # the folder may have been moved
    if changed:
        what = "; ".join(f"{key}: {show(before)} -> {show(now)}" for key, (before, now) in changed.items())
        raise CheckpointError(
            f"--resume auto: {run.folder} has finished with other options ({what}). Take them back, or name "
            f"{ANOTHER_FOLDER}."
        )
