"""`fit`: the whole flow of a run, from a checked config to a saved model; for the command and for `kdtrain.fit`.

Nothing here prints: a `Reporter` does.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProcessorMixin

from kdtrain.config import TrainArguments
from kdtrain.errors import Interrupted, TeacherError
from kdtrain.ranks import is_main
from kdtrain.runs.build import Given, Reporter, build_trainer
from kdtrain.runs.callbacks import (
    CheckWrapped,
    LeftEvaluationError,
    Records,
    StopOnSignal,
    WriteProgress,
    name_tensorboard,
)
from kdtrain.runs.changed import Comparison
from kdtrain.runs.checkpoints import checkpoint_to_resume, steps_done
from kdtrain.runs.completions import ShowCompletions, WriteCompletions
from kdtrain.runs.failures import disk_needs, readable_failures, what_is_lost
from kdtrain.runs.final_model import push, save_final_model
from kdtrain.runs.folder import (
    CHECKPOINT,
    COMPLETIONS,
    LOG,
    RecordError,
    SameFolder,
    forget_evaluation,
    require_usable,
    write_config,
)
from kdtrain.runs.launch import check_world
from kdtrain.runs.lock import refuse_if_locked, run_lock
from kdtrain.runs.log import JsonlLogger
from kdtrain.runs.lost_rank import lost_ranks_named
from kdtrain.runs.nonfinite import nonfinite_kept
from kdtrain.runs.plan import plan
from kdtrain.runs.read_data import RunData
from kdtrain.runs.report.facts import FactsReporter, write_facts
from kdtrain.runs.report.of_fit import reported
from kdtrain.runs.resources import tokens_per_row
from kdtrain.runs.resume import resume_command
from kdtrain.runs.resume_facts import content_of, data_of, defaults_of, facts_of
from kdtrain.runs.rotation import CheckpointKeeper, clean_up, leave_branch
from kdtrain.runs.signals import OUTSIDE_OF_TRAINING, StopRequest, interrupting, time_limit
from kdtrain.runs.status import teacher_cost, tracked_status, write_progress, write_status
from kdtrain.runs.world_size import check_world_size
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.best_step import Best, as_object, load_end, step_of_model
from kdtrain.trainer.dry_run import timed_windows
from kdtrain.trainer.row_order import planned_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """A run that came to its end."""

    run_dir: Path
    steps: int
    max_steps: int
    """As planned; more than `steps` where it stopped early."""
    seconds: float
    metrics: dict[str, float]
    """The last training record and the last evaluation; of a dry run, those of its windows, and what was found of the
    time: `step_time_s` and `run_time_s`, of all steps without evaluation and saving."""
    best: Best | None
    """The evaluation that won; None without evaluation."""
    model_step: int
    """The step whose model is saved: the last one, or with `load_best_model_at_end` the best that has a checkpoint."""
    stopped_early: bool
    """Whether `early_stopping_patience` ended it."""
    teacher: dict[str, int]
    """What answers written by a server have cost, as in `status.json`; empty where there are none."""


def fit(
    arguments: TrainArguments,
    reporter: Reporter,
    *,
    resume: str | None = None,
    allow_changes: Sequence[str] = (),
    allow_world_size_change: bool = False,
    dry_run: bool = False,
    given: Given | None = None,
) -> RunResult:
    """Train, and save the student with its tokenizer into `training.output_dir`.

    Args:
        allow_changes: what may differ from the run that made the checkpoint, see `checked_names`.
        allow_world_size_change: whether a stream goes on with another number of processes.

    A dry run builds everything and runs a window of each kind that the run will have (on-policy, off-policy) forward
    and backward: no step is taken, nothing is written.
    """
    started = time.perf_counter()
    config, args = arguments.config, arguments.training_args
    run_dir = Path(args.output_dir)
    refuse_if_locked(run_dir)  # first: what else is to be said of the folder is another run's doing
    require_usable(run_dir, resuming=resume is not None)
    given, facts = given or Given(), facts_of(config, args)

    def when_read(processing: PreTrainedTokenizerBase | ProcessorMixin, data: RunData) -> None:
        facts.update(content=content_of(config, processing, given), data=data_of(data))
        compared.content(facts["content"], facts["data"])

    with ExitStack() as at_the_end:
        at_the_end.callback(reporter.close)
        if dry_run:
            args.output_dir = at_the_end.enter_context(tempfile.TemporaryDirectory())
            args.report_to = []  # a tracker would take it for a run
        else:
            at_the_end.enter_context(interrupting(OUTSIDE_OF_TRAINING))  # of the report too: the lock is let go of
            at_the_end.enter_context(run_lock(run_dir))
            clean_up(run_dir)
        checkpoint = checkpoint_to_resume(run_dir, resume)
        check_world_size(config, checkpoint, args.world_size, allow_world_size_change)
        compared = Comparison(checkpoint, allow_changes)
        compared.options(facts, defaults_of(args))
        if not dry_run:
            if config.training_options.report:
                reporter = at_the_end.enter_context(reported(run_dir, reporter))
            at_the_end.enter_context(tracked_status(run_dir))
            at_the_end.enter_context(nonfinite_kept(run_dir, config, trains=True))
            at_the_end.enter_context(lost_ranks_named())
        at_the_end.enter_context(interrupting(OUTSIDE_OF_TRAINING))
        check_world(args, config)
        trainer, report = build_trainer(config, args, reporter, dry_run, given, at_the_end, when_read)
        trainer.changed_options = compared.fields
        if is_main():
            reporter.plan(plan(trainer, config, report, checkpoint))
            for callback in reporter.callbacks():
                trainer.add_callback(callback)
        trainer.add_callback(ShowCompletions(trainer, reporter))
        name_tensorboard(trainer, run_dir)
        trainer.remove_callback(PrinterCallback)  # it prints dicts to stdout, which is for results
        trainer.add_callback(CheckWrapped(trainer))
        with readable_failures(args, lambda: disk_needs(trainer), lambda: what_is_lost(trainer)):
            if dry_run:
                metrics, times = timed_windows(trainer, tokens_per_row(report))
                metrics |= {"step_time_s": times.step_s, "run_time_s": times.run_s}
            else:
                write_config(run_dir, config)
                if isinstance(reporter, FactsReporter):
                    reporter.facts["steps"], _ = planned_steps(trainer, trainer.rows_per_epoch())
                    if checkpoint is not None:
                        reporter.facts["steps"] = trainer.rows.last_step(checkpoint)
                    write_facts(run_dir, reporter.facts)
                metrics = _train_and_save(trainer, run_dir, checkpoint, facts)
    return RunResult(
        run_dir=Path(args.output_dir),
        steps=trainer.state.global_step,
        max_steps=trainer.state.max_steps,
        seconds=time.perf_counter() - started,
        metrics=metrics,
        best=trainer.best_step.best,
        model_step=step_of_model(trainer),
        stopped_early=trainer.best_step.stops,
        teacher=teacher_cost(run_dir),
    )


def _train_and_save(
    trainer: GKDTrainerWithMetrics, run_dir: Path, checkpoint: Path | None, facts: Mapping[str, Any]
) -> dict[str, float]:
    """Train to the end, or to a signal, which saves a checkpoint and no model; the last metrics."""
    request, records = StopRequest(), Records()
    stop = StopOnSignal(trainer, request, records)
    if is_main():
        run_dir.mkdir(parents=True, exist_ok=True)
    trainer.accelerator.wait_for_everyone()
    trainer.before_saving = SameFolder(run_dir).check
    trainer.add_callback(JsonlLogger(run_dir / LOG, records.writing))
    trainer.add_callback(WriteCompletions(trainer, run_dir / COMPLETIONS))
    trainer.add_callback(WriteProgress(run_dir, trainer.best_step, records))
    trainer.add_callback(stop)
    trainer.saving.hooks = CheckpointKeeper(trainer.args, checkpoint, facts)
    at_its_end = checkpoint is not None and _is_at_its_end(trainer, checkpoint)
    if checkpoint is not None:
        leave_branch(run_dir, checkpoint)
    write_status(run_dir, "running", progress=_begun(trainer, run_dir, checkpoint))
    trainer.trackers.time_limit = time_limit
    with trainer.trackers.held(), request.listening():  # their ends come behind the saved model
        if checkpoint is None or not at_its_end:
            with _state_saved_before_the_end(trainer, run_dir), _state_saved_in_evaluation(trainer, run_dir):
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
                stop.raise_lost()
        else:  # transformers compares with max_steps after a step only, and would take one more
            load_end(trainer, checkpoint)
        if stop.signum:
            raise Interrupted(stop.signum, _stopped(trainer, run_dir))
        if not at_its_end:
            forget_evaluation(run_dir)
        save_final_model(trainer, run_dir)
        write_progress(run_dir, step=trainer.state.global_step, best=as_object(trainer.best_step.best))
    push(trainer, run_dir)
    trainer.accelerator.wait_for_everyone()
    metrics: dict[str, float] = {}
    for key in ("loss", "eval_loss"):
        metrics |= next((record for record in reversed(trainer.state.log_history) if key in record), {})
    return metrics


def _stopped(trainer: GKDTrainerWithMetrics, run_dir: Path) -> str:
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if not step:
        return "Stopped before the first step: there is nothing to save."
    return f"Stopped at step {step} of {steps}; {_what_is_saved(trainer, run_dir)}"


@contextmanager
def _state_saved_in_evaluation(trainer: GKDTrainerWithMetrics, run_dir: Path) -> Iterator[None]:
    """Save a checkpoint of the last step where a signal ended an evaluation, which a resumed run begins with."""
    try:
        yield
    except LeftEvaluationError as left:
        step = trainer.state.global_step
        if step and not (run_dir / f"{CHECKPOINT}{step}").exists():
            trainer._save_checkpoint(trainer.model, trial=None)
            trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
        raise Interrupted(left.signum, _stopped(trainer, run_dir)) from None


def _what_is_saved(trainer: GKDTrainerWithMetrics, run_dir: Path) -> str:
    if trainer.args.save_only_model:
        return f"the model is saved in {run_dir}, and the run cannot go on (training.save_only_model: true)."
    return f"the state is saved in {run_dir}. Go on with: {resume_command()}"


def _is_at_its_end(trainer: GKDTrainerWithMetrics, checkpoint: Path) -> bool:
    """Whether nothing is left to train after a checkpoint; said once."""
    done, steps = steps_done(checkpoint), trainer.rows.last_step(checkpoint)
    trainer.best_step.restore_from(checkpoint)
    if done >= steps:
        logger.warning("%s is at step %d of %d: nothing is left to train.", checkpoint.name, done, steps)
    elif trainer.best_step.stops:
        logger.warning(
            "%s is where the run stopped early, at step %d of %d: nothing is left to train. A larger "
            "training.early_stopping_patience goes on.",
            checkpoint.name,
            done,
            steps,
        )
    return done >= steps or trainer.best_step.stops


def _begun(trainer: GKDTrainerWithMetrics, run_dir: Path, checkpoint: Path | None) -> dict[str, Any]:
    """Where a run is before its first step, for `status.json`."""
    if checkpoint is None:
        return {"step": 0, "last_checkpoint": None, "best": None, "resumed_from": None}
    own = checkpoint.parent == run_dir.resolve()  # else it is another run's
    last, best = checkpoint.name if own else None, as_object(trainer.best_step.best)
    return {"step": steps_done(checkpoint), "last_checkpoint": last, "best": best, "resumed_from": str(checkpoint)}


@contextmanager
def _state_saved_before_the_end(trainer: GKDTrainerWithMetrics, run_dir: Path) -> Iterator[None]:
    """Save a checkpoint of the last step where a teacher gives no answer, or the log cannot be written.

    A server may be there again later, and a full disk may have room for it: another one, or room that was made.
    """
    try:
        yield
    except (TeacherError, RecordError) as error:
        step, alone = trainer.state.global_step, trainer.accelerator.num_processes == 1
        folder = run_dir / f"{CHECKPOINT}{step}"
        together = isinstance(error, RecordError) or error.between_steps
        is_there = folder.exists()
        if together and not alone:  # one that is late must not take what rank 0 begins to write for it
            [is_there] = broadcast_object_list([is_there])
        if step and (together or alone) and not is_there:
            try:
                trainer._save_checkpoint(trainer.model, trial=None)
            except Exception:
                if isinstance(error, RecordError):  # the disk, again
                    raise error from None
                raise
            write_progress(run_dir, last_checkpoint=folder.name)
        if folder.exists() and not trainer.args.save_only_model:
            error.args = (f"{error} The state of step {step} is saved: go on with {resume_command()}",)
        raise
