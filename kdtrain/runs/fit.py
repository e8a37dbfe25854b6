"""`fit`: the whole flow of a run, from a checked config to a saved model; for the command and for `kdtrain.fit`.

Nothing here prints: a `Reporter` does.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PrinterCallback

from kdtrain.config import TrainArguments
from kdtrain.errors import Interrupted, TeacherError
from kdtrain.ranks import is_main
from kdtrain.runs.build import Given, Reporter, build_trainer
from kdtrain.runs.callbacks import CheckWrapped, StopOnSignal, one_window
from kdtrain.runs.checkpoints import checkpoint_to_resume, steps_done
from kdtrain.runs.failures import readable_failures
from kdtrain.runs.folder import CHECKPOINT, LOG, require_usable, write_config
from kdtrain.runs.launch import check_world
from kdtrain.runs.log import JsonlLogger
from kdtrain.runs.plan import plan
from kdtrain.runs.signals import StopRequest
from kdtrain.runs.status import teacher_cost, tracked_status, write_status
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.row_order import planned_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """A run that came to its end."""

    run_dir: Path
    steps: int
    seconds: float
    metrics: dict[str, float]
    """The last training record and the last evaluation."""
    teacher: dict[str, int]
    """What answers written by a server have cost, as in `status.json`; empty where there are none."""


def fit(
    arguments: TrainArguments,
    reporter: Reporter,
    *,
    resume: str | None = None,
    dry_run: bool = False,
    given: Given | None = None,
) -> RunResult:
    """Train, and save the student with its tokenizer into `training.output_dir`.

    A dry run builds everything and runs one window forward and backward: no step is taken, nothing is written.
    """
    started = time.perf_counter()
    config, args = arguments.config, arguments.training_args
    run_dir = Path(args.output_dir)
    require_usable(run_dir, resuming=resume is not None)
    checkpoint = checkpoint_to_resume(run_dir, resume)
    with ExitStack() as at_the_end:
        at_the_end.callback(reporter.close)
        if dry_run:
            args.output_dir = at_the_end.enter_context(tempfile.TemporaryDirectory())
            args.report_to = []  # a tracker would take it for a run
        else:
            at_the_end.enter_context(tracked_status(run_dir))
        trainer, report = build_trainer(config, args, reporter, dry_run, given or Given(), at_the_end)
        check_world(trainer.accelerator, config)
        if is_main():
            reporter.plan(plan(trainer, config, report))
            for callback in reporter.callbacks():
                trainer.add_callback(callback)
        trainer.remove_callback(PrinterCallback)  # it prints dicts to stdout, which is for results
        trainer.add_callback(CheckWrapped(trainer))
        with readable_failures(args):
            if dry_run:
                metrics = one_window(trainer)
            else:
                write_config(run_dir, config)
                write_status(run_dir, "running")
                metrics = _train_and_save(trainer, run_dir, checkpoint)
    seconds, steps = time.perf_counter() - started, trainer.state.global_step
    return RunResult(Path(args.output_dir), steps, seconds, metrics, teacher_cost(run_dir))


def _train_and_save(trainer: GKDTrainerWithMetrics, run_dir: Path, checkpoint: Path | None) -> dict[str, float]:
    """Train to the end, or to a signal, which saves a checkpoint and no model; the last metrics."""
    request = StopRequest()
    stop = StopOnSignal(trainer.accelerator, request)
    trainer.add_callback(JsonlLogger(run_dir / LOG))
    trainer.add_callback(stop)
    done = 0 if checkpoint is None else steps_done(checkpoint)
    steps, _ = planned_steps(trainer, trainer.rows_per_epoch())
    with request.listening():
        if checkpoint is None or done < steps:
            with _state_saved_where_the_teacher_fails(trainer, run_dir):
                trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        else:  # transformers compares with max_steps after a step only, and would take one more
            logger.warning("%s is at step %d of %d: nothing is left to train.", checkpoint.name, done, steps)
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state.global_step = done
        if stop.signum:
            raise Interrupted(
                stop.signum,
                f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; the state is saved in "
                f"{run_dir}. Go on with the same command and --resume auto.",
            )
        trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    metrics: dict[str, float] = {}
    for key in ("loss", "eval_loss"):
        metrics |= next((record for record in reversed(trainer.state.log_history) if key in record), {})
    return metrics


@contextmanager
def _state_saved_where_the_teacher_fails(trainer: GKDTrainerWithMetrics, run_dir: Path) -> Iterator[None]:
    """Save a checkpoint of the last step where a teacher gives no answer: a server may be there again later."""
    try:
        yield
    except TeacherError as error:
        step, alone = trainer.state.global_step, trainer.accelerator.num_processes == 1
        folder = run_dir / f"{CHECKPOINT}{step}"
        if step and (error.between_steps or alone) and not folder.exists():
            trainer._save_checkpoint(trainer.model, trial=None)
        if folder.exists():
            error.args = (f"{error} The state of step {step} is saved: go on with --resume auto.",)
        raise
