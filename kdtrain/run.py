"""`fit`: the whole data flow of a run on one screen. Prints nothing: what there is to say goes to a `Reporter`."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback

from kdtrain.build import Given, Reporter, build_trainer
from kdtrain.callbacks import CheckWrapped, JsonlLogger, LogLastStep, StopOnSignal
from kdtrain.checkpoints import newest_complete, require_complete
from kdtrain.errors import CheckpointError, Interrupted, PreflightError
from kdtrain.failures import readable_failures
from kdtrain.launch import check_world
from kdtrain.model_folder import read_map
from kdtrain.plan import plan
from kdtrain.sampling import planned_steps
from kdtrain.status import STATUS, tracked_status, write_atomically, write_status
from kdtrain.trainer import GKDTrainerWithMetrics

if TYPE_CHECKING:
    from kdtrain.config import RunConfig, TrainArguments

logger = logging.getLogger(__name__)

LOG = "logging.jsonl"
CONFIG = "run_config.json"  # not config.json, which is the saved model's


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
    run_dir = Path(arguments.training_args.output_dir)
    checkpoint = _checkpoint(run_dir, resume)
    try:
        return _begin(arguments, reporter, run_dir, checkpoint, dry_run, given or Given())
    finally:
        reporter.close()


def _begin(
    arguments: TrainArguments, reporter: Reporter, run_dir: Path, checkpoint: Path | None, dry_run: bool, given: Given
) -> RunResult:
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            arguments.training_args.output_dir = scratch
            arguments.training_args.report_to = []  # no tracker hears of it
            return _fit(arguments, reporter, None, given, dry_run=True)
    with tracked_status(run_dir):
        return _fit(arguments, reporter, checkpoint, given, dry_run=False)


def _fit(
    arguments: TrainArguments, reporter: Reporter, checkpoint: Path | None, given: Given, *, dry_run: bool
) -> RunResult:
    config, args = arguments.config, arguments.training_args
    started = time.perf_counter()
    trainer, report = build_trainer(config, args, reporter, dry_run, given)
    check_world(trainer.accelerator, config)
    main = trainer.is_world_process_zero()
    if main:
        reporter.plan(plan(trainer, config, report))
        for callback in reporter.callbacks():
            trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)  # it prints dicts to stdout, which is for results
    trainer.add_callback(CheckWrapped(trainer))
    if dry_run:
        metrics = _one_window(trainer)
        return RunResult(Path(args.output_dir), 0, time.perf_counter() - started, metrics)

    run_dir = Path(args.output_dir)
    with readable_failures(args):
        if main:
            run_dir.mkdir(parents=True, exist_ok=True)
            _tell_changes(run_dir / CONFIG, config)
            write_atomically(run_dir / CONFIG, config.model_dump_json(indent=2))
            write_status(run_dir, "running", None, "")
        trainer.add_callback(JsonlLogger(run_dir / LOG))
        trainer.add_callback(LogLastStep())
        stop = StopOnSignal(trainer.accelerator)
        trainer.add_callback(stop)
        with stop.installed():
            _train(trainer, checkpoint, planned_steps(args, report.rows_per_epoch, trainer.accelerator.num_processes))
            if stop.signum:
                raise Interrupted(
                    stop.signum,
                    f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; the state is saved in "
                    f"{run_dir}. Go on with the same command and --resume auto.",
                )
            trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return RunResult(run_dir, trainer.state.global_step, time.perf_counter() - started, _last_metrics(trainer))


def _tell_changes(path: Path, config: RunConfig) -> None:
    """Say which options a resumed run has that its earlier part did not have."""
    if not path.exists():
        return
    before, now = (_flat(text) for text in (json.loads(path.read_text("utf-8")), config.model_dump(mode="json")))
    changed = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in sorted(before.keys() | now.keys())
               if before.get(key) != now.get(key)]  # fmt: skip
    if changed:
        logger.warning("Going on with other options than the run began with: %s.", "; ".join(changed))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"rlhf": {"beta": 0.5}} as {"rlhf.beta": 0.5}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name, child in value.items()
            for key, leaf in _flat(child, f"{prefix}.{name}" if prefix else name).items()}  # fmt: skip


def _train(trainer: GKDTrainerWithMetrics, checkpoint: Path | None, steps: int) -> None:
    """Train to the end, from a checkpoint if there is one; a run that has reached its end takes no further step."""
    if checkpoint is None:
        trainer.train()
        return
    done = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    if done < steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    # transformers looks at max_steps after a step only, and would take one more.
    logger.warning("%s is at step %d of %d: nothing is left to train.", checkpoint.name, done, steps)
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state.global_step = done


# ---- before and after ------------------------------------------------------------------------------------------------


def _last_metrics(trainer: GKDTrainerWithMetrics) -> dict[str, float]:
    history = trainer.state.log_history
    last_training: dict[str, float] = next((record for record in reversed(history) if "loss" in record), {})
    last_evaluation: dict[str, float] = next((record for record in reversed(history) if "eval_loss" in record), {})
    return {**last_training, **last_evaluation}


class _WindowDone(Exception):
    """Ends a dry run where the optimizer step would be."""


def _one_window(trainer: GKDTrainerWithMetrics) -> dict[str, float]:
    """One optimizer window forward and backward through everything a real run uses, without the step; its metrics."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            raise _WindowDone

    trainer.add_callback(Stop())
    with readable_failures(trainer.args), contextlib.suppress(_WindowDone):
        trainer.train()
    return trainer.window_metrics()


# ---- the run folder --------------------------------------------------------------------------------------------------


def _checkpoint(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint to go on from, None for a clean start.

    Raises:
        PreflightError: the folder cannot be used as it is.
        CheckpointError: the named checkpoint is incomplete.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise PreflightError(f"training.output_dir {run_dir} is a file. Name a folder.")
    existing = next((parent for parent in (run_dir, *run_dir.parents) if parent.exists()), Path("/"))
    if not os.access(existing, os.W_OK):
        raise PreflightError(f"training.output_dir {run_dir} cannot be written: {existing} is read-only.")
    _check_ours(run_dir, resume)
    if resume is None:
        return None
    if resume != "auto":
        if not Path(resume).exists():
            raise CheckpointError(f"--resume {resume}: there is no such checkpoint. Give its path, or auto.")
        return require_complete(Path(resume).resolve())
    newest, skipped = newest_complete(run_dir)
    if newest is None and skipped:
        lacks = "; ".join(f"{name} lacks {', '.join(missing)}" for name, missing in skipped.items())
        raise CheckpointError(
            f"--resume auto: no checkpoint in {run_dir} is complete: {lacks}. Restore what is missing, or begin anew "
            "in another folder (training.output_dir=… on the command line)."
        )
    for name, missing in skipped.items():
        logger.warning("%s is skipped: it lacks %s.", name, ", ".join(missing))
    logger.warning("Resuming from %s." if newest else "No checkpoint in %s yet: clean start.", newest or run_dir)
    return newest


def _check_ours(run_dir: Path, resume: str | None) -> None:
    """Refuse to write into a folder of somebody else's, and into a run's that is not to be resumed.

    Raises:
        PreflightError: naming the way out.
    """
    # Ranks that start later find what rank 0 has written meanwhile.
    if int(os.environ.get("RANK", "0")) > 0 or not run_dir.is_dir() or not any(run_dir.iterdir()):
        return
    another = "another folder (training.output_dir=… on the command line)"
    if not is_run_folder(run_dir):
        raise PreflightError(
            f"training.output_dir {run_dir} is not empty, and holds no run of kdtrain. Name {another}."
        )
    if resume is None:
        raise PreflightError(
            f"training.output_dir {run_dir} holds a run already. Go on with it by --resume auto, or name {another}."
        )


def is_run_folder(folder: Path) -> bool:
    """Whether a run of `fit` has written into a folder: its config, or its status, which is there a little earlier.

    Or nothing but checkpoints, as they are moved to another machine.
    """
    if all(path.is_dir() and path.name.startswith("checkpoint-") for path in folder.iterdir()):
        return True
    return "rlhf" in read_map(folder / CONFIG) or {"state", "exit_code", "rank"} <= read_map(folder / STATUS).keys()
