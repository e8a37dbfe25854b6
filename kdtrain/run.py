"""`fit`: the whole data flow of a run on one screen. Prints nothing: what there is to say goes to a `Reporter`."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import PartialState
from transformers import PrinterCallback

from kdtrain.callbacks import CheckWrapped, JsonlLogger, StopOnSignal
from kdtrain.checkpoints import newest_complete, require_complete
from kdtrain.data import BuildReport, Collator, Source, build_dataset
from kdtrain.errors import CheckpointError, DataError, Interrupted, PreflightError
from kdtrain.launch import check_world
from kdtrain.models import count_parameters, freeze, load_causal_lm, load_tokenizer, lora_config
from kdtrain.status import tracked_status, write_atomically, write_status
from kdtrain.teachers import build_teacher
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.vocabulary import shared_vocabulary, vocabulary_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    import datasets
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from kdtrain.config import RunConfig, TrainArguments
    from kdtrain.config.schema import DataSource

logger = logging.getLogger(__name__)

LOG = "logging.jsonl"
CONFIG = "run_config.json"  # not config.json, which is the saved model's


class Reporter(Protocol):
    """Where a run says what it does: a terminal, a log, or nothing at all."""

    def data(self, name: str, report: BuildReport) -> None:
        """A data set was read."""

    def plan(self, rows: Mapping[str, str]) -> None:
        """What was derived from config and device, before training begins."""

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks that show progress; asked for on rank 0 only."""


@dataclass(frozen=True)
class RunResult:
    """A run that came to its end."""

    run_dir: Path
    steps: int
    seconds: float
    metrics: dict[str, float]
    """The last training record and the last evaluation."""


def fit(
    arguments: TrainArguments, reporter: Reporter, *, resume: str | None = None, dry_run: bool = False
) -> RunResult:
    """Train, and save the student with its tokenizer into `training.output_dir`.

    Args:
        arguments: from `ConfigLoader.load_training_config`.
        resume: "auto" (the newest complete checkpoint, or a clean start) or a checkpoint's path.
        dry_run: build everything and run one window forward and backward; no step is taken and nothing is written.

    Raises:
        KdtrainError: with the exit code that says what went wrong.
        Interrupted: a signal; the state was saved.
    """
    if dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            arguments.training_args.output_dir = scratch
            return _fit(arguments, reporter, None, dry_run=True)
    run_dir = Path(arguments.training_args.output_dir)
    checkpoint = _checkpoint(run_dir, resume)
    with tracked_status(run_dir):
        return _fit(arguments, reporter, checkpoint, dry_run=False)


def _fit(arguments: TrainArguments, reporter: Reporter, checkpoint: Path | None, *, dry_run: bool) -> RunResult:
    config, args = arguments.config, arguments.training_args
    started = time.perf_counter()
    device = args.device  # also joins the process group

    tokenizer = load_tokenizer(config.model.model, **_trust(config))
    train, evaluation, report = _datasets(config, args.seed, tokenizer, reporter)
    student = load_causal_lm(
        config.model.model,
        dtype=config.model.dtype,
        trained_in_full=config.tuner.train_type == "full",
        device=device,
        attn_implementation=config.model.attn_implementation,
        init_kwargs=config.model.init_kwargs,
        **_trust(config),
    )
    freeze(student, llm=config.tuner.freeze_llm, vit=config.tuner.freeze_vit, aligner=config.tuner.freeze_aligner)
    if args.ddp_find_unused_parameters is None and not hasattr(student.config, "output_router_logits"):
        # A dense text model uses all its weights in every step; only experts may go without a gradient.
        args.ddp_find_unused_parameters = False
    teacher, shared = _teacher(config, args.teacher_model_init_kwargs, device, tokenizer, vocabulary_size(student))
    trainer = GKDTrainerWithMetrics(
        student,
        args=args,
        data_collator=Collator(tokenizer, pad_to_multiple_of=args.pad_to_multiple_of),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=_peft_config(config),
        teacher=teacher,
        shared_vocab_size=shared,
    )
    check_world(trainer.accelerator, config)
    main = trainer.is_world_process_zero()
    if main:
        reporter.plan(_plan(trainer, config, report))
        for callback in reporter.callbacks():
            trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)  # it prints dicts to stdout, which is for results
    trainer.add_callback(CheckWrapped(trainer))
    if dry_run:
        _one_window(trainer)
        return RunResult(Path(args.output_dir), 0, time.perf_counter() - started, {})

    run_dir = Path(args.output_dir)
    if main:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(run_dir / CONFIG, config.model_dump_json(indent=2))
        write_status(run_dir, "running", None, "")
    trainer.add_callback(JsonlLogger(run_dir / LOG))
    stop = StopOnSignal(trainer.accelerator)
    trainer.add_callback(stop)
    with stop.installed(), _readable_failures(trainer):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.signum:
        raise Interrupted(
            stop.signum,
            f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; the state is saved in "
            f"{run_dir}. Go on with: kdtrain fit CONFIG --resume auto",
        )
    with _readable_failures(trainer):
        trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return RunResult(run_dir, trainer.state.global_step, time.perf_counter() - started, _last_metrics(trainer))


# ---- building --------------------------------------------------------------------------------------------------------


def _trust(config: RunConfig) -> dict[str, Any]:
    return {"trust_remote_code": config.model.trust_remote_code, "revision": config.model.revision}


def _datasets(
    config: RunConfig, seed: int, tokenizer: PreTrainedTokenizerBase, reporter: Reporter
) -> tuple[datasets.Dataset, datasets.Dataset | None, BuildReport]:
    """Training and evaluation rows, encoded by one process of a machine and read from the cache by the others."""
    common: dict[str, Any] = {
        "max_length": config.data.max_length,
        "on_overlength": config.data.on_overlength,
        "train_on": config.data.train_on,
        "max_bad_rows": config.data.max_bad_rows,
        "sample_limit": config.custom.sample_limit,
        "seed": seed,
    }
    state = PartialState()
    with state.local_main_process_first():
        train, report = build_dataset(_sources(config.data.train), tokenizer, **common)
        evaluation = evaluation_report = None
        if config.data.eval:
            evaluation, evaluation_report = build_dataset(_sources(config.data.eval), tokenizer, **common)
    if state.is_main_process:
        reporter.data("train", report)
        if evaluation_report is not None:
            reporter.data("eval", evaluation_report)
    _check_generation(config, report)
    if evaluation_report is not None and evaluation_report.prompt_only_rows:
        raise DataError(
            f"data.eval: {evaluation_report.prompt_only_rows} rows have no answer. Evaluation does not generate: "
            "give rows with answers."
        )
    return train, evaluation, report


def _sources(sources: Sequence[DataSource]) -> list[Source]:
    return [
        Source(s.path, name=s.name, split=s.split, columns=s.columns, limit=s.limit, weight=s.weight, ce=s.ce)
        for s in sources
    ]


def _check_generation(config: RunConfig, report: BuildReport) -> None:
    """Rows without a prompt cannot be generated from, and rows without an answer need to be.

    Raises:
        DataError: naming the setting that fits the data.
    """
    lmbda, seq_kd = config.rlhf.lmbda, config.rlhf.seq_kd
    generates = config.lm_kd_active and (lmbda > 0 or seq_kd)
    if generates and report.plain_text_rows:
        raise DataError(
            f"{report.plain_text_rows} rows are plain text, without a prompt to generate from (rlhf.lmbda is {lmbda}, "
            f"rlhf.seq_kd {seq_kd}). Set rlhf.lmbda: 0 and rlhf.seq_kd: false."
        )
    always = config.lm_kd_active and (lmbda == 1 or seq_kd)
    if report.prompt_only_rows and not always:
        raise DataError(
            f"{report.prompt_only_rows} rows have a prompt and no answer, and not every batch is generated "
            f"(rlhf.lmbda {lmbda}, rlhf.seq_kd {seq_kd}). Set rlhf.lmbda: 1 or rlhf.seq_kd: true, or give answers."
        )


def _teacher(
    config: RunConfig,
    init_kwargs: Mapping[str, Any],
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    student_size: int,
) -> tuple[Any, int | None]:
    """The teacher and the vocabulary it shares with the student; (None, None) where no KD is active."""
    if not config.needs_teacher:
        return None, None
    name = config.rlhf.teacher_model
    assert name is not None, "the config is checked for it"
    options = config.rlhf.teacher
    kwargs = dict(init_kwargs)
    if options.device_map is not None:
        kwargs["device_map"] = options.device_map
    trust: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code, "revision": options.revision}
    teacher_tokenizer = load_tokenizer(name, **trust)
    teacher = build_teacher(name, backend=options.backend, init_kwargs=kwargs, device=device, **trust)
    return teacher, shared_vocabulary(student_size, teacher.vocab_size, tokenizer, teacher_tokenizer)


def _peft_config(config: RunConfig) -> Any:
    tuner = config.tuner
    if tuner.train_type != "lora":
        return None
    return lora_config(
        rank=tuner.lora_rank,
        alpha=tuner.lora_alpha,
        dropout=tuner.lora_dropout,
        target_modules=tuner.target_modules,
        modules_to_save=tuner.modules_to_save,
        use_dora=tuner.use_dora,
    )


# ---- before and after ------------------------------------------------------------------------------------------------


def _plan(trainer: GKDTrainerWithMetrics, config: RunConfig, report: BuildReport) -> dict[str, str]:
    """What the config and the device led to, for the table at the start."""
    args, knobs = trainer.args, trainer.knobs
    total, trainable = count_parameters(trainer.model)
    ranks = trainer.accelerator.num_processes
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    epoch_rows = report.rows_per_epoch
    tokens = report.total_tokens / epoch_rows
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch_rows / rows)
    plan = {
        "student": f"{config.model.model}: {total:,} parameters, {trainable:,} trained, {trainer.model.dtype}",
        "teacher": "none" if trainer.teacher is None else _describe_teacher(trainer, config),
        "loss": _describe_loss(trainer),
        "answers": _describe_answers(trainer),
        "step": f"{rows} rows = {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulated x "
        f"{ranks} {'process' if ranks == 1 else 'processes'}, about {rows * tokens:,.0f} tokens",
        "steps": f"{steps:,}, {steps * rows / epoch_rows:.2f} epochs of {epoch_rows:,} rows",
        "device": f"{trainer.accelerator.device}, {trainer.accelerator.distributed_type.value.lower()}, "
        f"mixed precision {trainer.accelerator.mixed_precision}",
        "output": str(args.output_dir),
    }
    if knobs.lm_kd_active and trainer.shared_vocab_size != vocabulary_size(trainer.model):
        plan["vocabulary"] = f"{trainer.shared_vocab_size:,} shared, padding beyond it left out"
    return plan


def _describe_teacher(trainer: GKDTrainerWithMetrics, config: RunConfig) -> str:
    assert trainer.teacher_model is not None
    parameters, _ = count_parameters(trainer.teacher_model)
    return f"{config.rlhf.teacher_model}: {parameters:,} parameters, {trainer.teacher_model.dtype}"


def _describe_loss(trainer: GKDTrainerWithMetrics) -> str:
    knobs = trainer.knobs
    terms = []
    if knobs.lm_kd_active:
        options = f"beta {trainer.beta:g}, temperature {knobs.kd_temperature:g}"
        terms.append(f"{knobs.llm_kd_weight:g} x {knobs.divergence} ({options})")
    if knobs.ce_weight > 0:
        terms.append(f"{knobs.ce_weight:g} x cross-entropy")
    if knobs.visual_kd is not None:
        terms.append(f"{knobs.visual_kd.weight:g} x visual ({', '.join(knobs.visual_kd.targets)})")
    return " + ".join(terms)


def _describe_answers(trainer: GKDTrainerWithMetrics) -> str:
    if not trainer.knobs.lm_kd_active:
        return "from the data"
    rest = "the teacher" if trainer.seq_kd else "the data"
    if trainer.lmbda == 0:
        return f"from {rest}"
    return (
        f"{trainer.lmbda:.0%} of steps from the student, the others from {rest}"
        if trainer.lmbda < 1
        else "from the student"
    )


def _last_metrics(trainer: GKDTrainerWithMetrics) -> dict[str, float]:
    history = trainer.state.log_history
    last_training: dict[str, float] = next((record for record in reversed(history) if "loss" in record), {})
    last_evaluation: dict[str, float] = next((record for record in reversed(history) if "eval_loss" in record), {})
    return {**last_training, **last_evaluation}


class _WindowDone(Exception):
    """Ends a dry run where the optimizer step would be."""


def _one_window(trainer: GKDTrainerWithMetrics) -> None:
    """One optimizer window forward and backward through everything a real run uses, without the step."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            raise _WindowDone

    trainer.add_callback(Stop())
    with _readable_failures(trainer):
        try:
            trainer.train()
        except _WindowDone:
            return


@contextmanager
def _readable_failures(trainer: GKDTrainerWithMetrics) -> Iterator[None]:
    """Errors of the device and the disk, said in words that name a way out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        args = trainer.args
        raise PreflightError(
            f"Out of memory on {args.device} with {args.per_device_train_batch_size} rows per device and max_length "
            f"{args.max_length}. Lower training.per_device_train_batch_size (and raise gradient_accumulation_steps), "
            "lower data.max_length, or set training.gradient_checkpointing: true."
        ) from error
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise CheckpointError(
            f"Writing {error.filename or trainer.args.output_dir} failed: {error.strerror}."
        ) from error


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
    if resume is not None and resume != "auto":
        return require_complete(Path(resume).resolve())
    if resume == "auto":
        newest, skipped = newest_complete(run_dir)
        for name, missing in skipped.items():
            logger.warning("%s is skipped: it lacks %s.", name, ", ".join(missing))
        logger.warning(
            "Resuming from %s." if newest else "No complete checkpoint in %s: clean start.", newest or run_dir
        )
        return newest
    # Ranks that start later find what rank 0 has written meanwhile.
    if int(os.environ.get("RANK", "0")) == 0 and run_dir.is_dir() and any(run_dir.iterdir()):
        raise PreflightError(
            f"training.output_dir {run_dir} is not empty. Go on with its run by --resume auto, or name another folder "
            "(training.output_dir=… on the command line)."
        )
    return None
