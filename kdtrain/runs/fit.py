"""`fit`: the whole flow of a run, from a checked config to a saved model.

The command `kdtrain fit` (`cli`) and the function `kdtrain.fit` (`python_api.py`) both call it. Nothing here prints:
a `Reporter` does.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback

from kdtrain.errors import Interrupted
from kdtrain.ranks import is_main
from kdtrain.runs.build import Given, Reporter, build_trainer
from kdtrain.runs.callbacks import CheckWrapped, StopOnSignal
from kdtrain.runs.checkpoints import checkpoint_to_resume, steps_done
from kdtrain.runs.failures import readable_failures
from kdtrain.runs.folder import CONFIG, LOG, require_usable, write_atomically
from kdtrain.runs.launch import check_world
from kdtrain.runs.log import JsonlLogger
from kdtrain.runs.plan import plan
from kdtrain.runs.signals import StopRequest
from kdtrain.runs.status import tracked_status, write_status
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.row_order import planned_steps

if TYPE_CHECKING:
    from kdtrain.config import RunConfig, TrainArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """A run that came to its end."""

    run_dir: Path
    steps: int
    seconds: float
    metrics: dict[str, float]
    """The last training record and the last evaluation."""


def fit(
    arguments: TrainArguments,
    reporter: Reporter,
    *,
    resume: str | None = None,
    dry_run: bool = False,
    given: Given | None = None,
) -> RunResult:
    """Train, and save the student with its tokenizer into `training.output_dir`.

    Args:
        arguments: from `ConfigLoader.load_training_config`.
        resume: "auto" (the newest complete checkpoint, or a clean start) or a checkpoint's path.
        dry_run: build everything and run one window forward and backward; no step is taken and nothing is written.
        given: models, data and callbacks in place of those that the config names.

    Raises:
        KdtrainError: with the exit code that says what went wrong.
        Interrupted: a signal; the state was saved.
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
        trainer, report = build_trainer(config, args, reporter, dry_run, given or Given())
        check_world(trainer.accelerator, config)
        if is_main():
            reporter.plan(plan(trainer, config, report))
            for callback in reporter.callbacks():
                trainer.add_callback(callback)
        trainer.remove_callback(PrinterCallback)  # it prints dicts to stdout, which is for results
        trainer.add_callback(CheckWrapped(trainer))
        with readable_failures(args):
            if dry_run:
                metrics = _one_window(trainer)
            else:
                _begin_folder(run_dir, config)
                metrics = _train_and_save(trainer, run_dir, checkpoint)
    return RunResult(Path(args.output_dir), trainer.state.global_step, time.perf_counter() - started, metrics)


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
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        else:  # transformers looks at max_steps after a step only, and would take one more
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
    return _last_metrics(trainer)


def _last_metrics(trainer: GKDTrainerWithMetrics) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for key in ("loss", "eval_loss"):
        metrics |= next((record for record in reversed(trainer.state.log_history) if key in record), {})
    return metrics


class _WindowDone(Exception):
    """Ends a dry run where the optimizer step would be."""


class _EndBeforeTheStep(TrainerCallback):
    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        raise _WindowDone


def _one_window(trainer: GKDTrainerWithMetrics) -> dict[str, float]:
    """One optimizer window forward and backward through everything a real run uses, without the step; its metrics."""
    trainer.add_callback(_EndBeforeTheStep())
    with suppress(_WindowDone):
        trainer.train()
    return trainer.window_metrics()


def _begin_folder(run_dir: Path, config: RunConfig) -> None:
    """Write config and status; warn of options that a resumed run changes."""
    if not is_main():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / CONFIG
    if file.exists():
        before, now = _flat(json.loads(file.read_text("utf-8"))), _flat(config.model_dump(mode="json"))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            changes = "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed)
            logger.warning("Going on with other options than the run began with: %s.", changes)
    write_atomically(file, config.model_dump_json(indent=2))
    write_status(run_dir, "running")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"rlhf": {"beta": 0.5}} as {"rlhf.beta": 0.5}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, child in value.items()
        for key, leaf in _flat(child, f"{prefix}.{name}" if prefix else name).items()
    }
