"""From a config to a trainer: data, student, teacher, and the checks that need them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from accelerate import PartialState

from kdtrain.adapters import adapter_base, is_adapter_folder
from kdtrain.answers import TeacherAnswers
from kdtrain.construction import check_teacher_is_another_model
from kdtrain.data import BuildReport, Collator, Source, build_dataset
from kdtrain.data.multimodal import image_content
from kdtrain.errors import ConfigError, DataError
from kdtrain.failures import readable_construction, readable_failures
from kdtrain.model_checks import both_sides, check_models
from kdtrain.model_folder import require_sound
from kdtrain.models import load_model, load_processing, lora_config, sees_images
from kdtrain.positions import answered_rows
from kdtrain.rehearsal import rehearse
from kdtrain.status import write_status
from kdtrain.teachers import LocalTeacher, Teacher, build_teacher
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.vision.parts import adapter_exclusions, check_named_parts, freeze_parts
from kdtrain.vocabulary import shared_vocabulary, vocabulary_size
from kdtrain.zero import prepare_deepspeed_run

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedModel, TrainerCallback

    from kdtrain.config import RunConfig
    from kdtrain.config.schema import DataSource

logger = logging.getLogger(__name__)

ANSWERS = "teacher_answers"


@dataclass(frozen=True)
class Given:
    """What a caller hands over instead of naming it in the config; None is what the config names."""

    train_dataset: Any = None
    eval_dataset: Any = None
    model: Any = None
    teacher: Any = None
    callbacks: Sequence[TrainerCallback] = ()


class Reporter(Protocol):
    """Where a run says what it does: a terminal, a log, or nothing at all."""

    def data(self, name: str, report: BuildReport) -> None:
        """A data set was read."""

    def answers(self, done: int, total: int) -> None:
        """The teacher has answered some of the rows that it has to."""

    def plan(self, rows: Mapping[str, str]) -> None:
        """What was derived from config and device, before training begins."""

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks that show progress; asked for on rank 0 only."""

    def close(self) -> None:
        """The run is over, one way or another."""


def build_trainer(
    config: RunConfig, args: Any, reporter: Reporter, dry_run: bool, given: Given
) -> tuple[GKDTrainerWithMetrics, BuildReport]:
    """Data, student, teacher and trainer."""
    device = args.device  # also joins the process group
    prepare_deepspeed_run(args)
    _check_given_teacher(config, given.teacher)
    if given.model is None:
        require_sound(Path(config.model.model), "student")
    if given.teacher is None and config.asks_teacher and config.rlhf.teacher_model:
        require_sound(Path(config.rlhf.teacher_model), "teacher")
    processing = load_processing(config.model.model, **_trust(config))
    train, evaluation, report = _datasets(config, args.seed, processing, reporter, given)
    student = given.model if given.model is not None else _load_student(config, device)
    check_teacher_is_another_model(student, given.teacher)
    freeze_parts(student, **_frozen(config))
    dense_text = not sees_images(student.config) and not hasattr(student.config, "output_router_logits")
    if args.ddp_find_unused_parameters is None and dense_text:
        # It uses all its weights in every step; only experts and vision encoders may go without a gradient.
        args.ddp_find_unused_parameters = False
    teacher, its_processing, shared = _teacher(config, args, processing, vocabulary_size(student), given.teacher)
    collator = Collator(processing, its_processing, pad_to_multiple_of=args.pad_to_multiple_of)
    if teacher is not None and config.answers_from_teacher:
        # It writes before the trainer, which looks at both models, is there.
        if getattr(teacher.module, "hf_device_map", None) is None and not args.deepspeed:
            teacher.module.to(args.device)
        check_models(
            both_sides(student, teacher, collator),
            [*answered_rows(train, args), *answered_rows(evaluation, args)],
            collator,
            train,
            generating=[teacher.module],
            only_errors=True,
        )
        _check_images_fit_teacher(train, collator)
        answers = _answers(config, args, teacher, processing, its_processing, collator, shared, reporter)
        train, evaluation = _answered(answers, args, train, evaluation, dry_run)
        if dry_run:
            report.epochs = None  # a few rows are left, enough for its window
        _count_answers(config, train, report)
    # Followed here, or told to have no effect: nothing is left for the trainer to notice.
    args.tuner = args.teacher_model_init_kwargs = None
    with readable_construction():
        trainer = GKDTrainerWithMetrics(
            student,
            args=args,
            data_collator=collator,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processing,
            peft_config=_peft_config(config, student),
            callbacks=list(given.callbacks),
            teacher=teacher if config.needs_teacher else None,
            shared_vocab_size=shared,
        )
        if report.epochs is not None:
            trainer.read_epochs(report.epochs)
    if teacher is not None:
        _check_images_fit_teacher(train, collator)
    rehearse(trainer, config.training.get("greater_is_better"))
    return trainer, report


def _check_given_teacher(config: RunConfig, teacher: Any) -> None:
    """Refuse a teacher that only gives targets where answers are to be written.

    Raises:
        ConfigError: it is no model in this process.
    """
    if config.answers_from_teacher and isinstance(teacher, Teacher) and teacher.module is None:
        raise ConfigError(
            f"answers: teacher needs a teacher that can write: a model in this process. The {type(teacher).__name__} "
            "handed over has none (its module is None). Hand over a model, or remove answers: teacher."
        )


def _load_student(config: RunConfig, device: Any) -> PreTrainedModel:
    return load_model(
        config.model.model,
        dtype=config.model.dtype,
        trained_in_full=config.tuner.train_type == "full",
        device=device,
        attn_implementation=config.model.attn_implementation,
        init_kwargs=config.model.init_kwargs,
        **_trust(config),
    )


def _frozen(config: RunConfig) -> dict[str, bool]:
    return {part: getattr(config.tuner, f"freeze_{part}") for part in ("llm", "vit", "aligner")}


def _answered(
    answers: TeacherAnswers,
    args: Any,
    train: datasets.Dataset,
    evaluation: datasets.Dataset | None,
    dry_run: bool,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Both data sets with the teacher's answers; of a dry run, those of the one window that is looked at."""
    if dry_run:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        train = train.select(range(min(rows, len(train))))
        evaluation = evaluation and evaluation.select(range(min(rows, len(evaluation))))
    elif PartialState().is_main_process:
        run_dir = Path(args.output_dir)  # the trainer, which makes it otherwise, is not there yet
        run_dir.mkdir(parents=True, exist_ok=True)
        write_status(run_dir, "running", None, "the teacher writes answers")
    with readable_failures(args):
        return answers.fill(train), evaluation and answers.fill(evaluation)


def _check_images_fit_teacher(train: datasets.Dataset, collator: Collator) -> None:
    """Try the largest of some rows with images now: what does not fit would end the run where it comes up.

    Raises:
        DataError: the teacher takes no images, or other numbers of tokens for them.
    """
    if "images" not in train.column_names:
        return
    some = train.select(range(0, len(train), max(len(train) // 256, 1)))
    rows = sorted((row for row in some if row["images"]), key=lambda row: -len(row["input_ids"]))
    for row in rows[:8]:
        collator([row])


def _count_answers(config: RunConfig, train: datasets.Dataset, report: BuildReport) -> None:
    """Bring the report up to what the rows are now."""
    lengths = [len(ids) for ids in train["input_ids"]]
    supervised = [len(labels) - labels.count(-100) for labels in train["labels"]]
    epoch = range(len(train)) if report.epochs is None else report.epochs.rows(0)
    report.longest, report.total_tokens = max(lengths), sum(lengths[i] for i in epoch)
    report.supervised_tokens = sum(supervised[i] for i in epoch)
    long = sum(length > config.data.max_length for length in lengths)
    if long and PartialState().is_main_process:
        logger.warning(
            "With the teacher's answers %d rows are longer than data.max_length (%d), the longest has %d tokens. "
            "Lower rlhf.max_new_tokens if that is too much for memory.",
            long,
            config.data.max_length,
            report.longest,
        )


def _answers(
    config: RunConfig,
    args: Any,
    teacher: Any,
    processing: Any,
    its_processing: Any,
    collator: Collator,
    shared: int,
    reporter: Reporter,
) -> TeacherAnswers:
    name = config.rlhf.teacher_model
    assert name is not None, "the config is checked for it"
    folders = [name, *([adapter_base(name)] if is_adapter_folder(name) else []), config.rlhf.teacher.adapter or ""]
    files = [file for folder in folders if folder for file in Path(folder).glob("*.safetensors")]
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return TeacherAnswers(
        teacher.module,
        processing,
        collator,
        Path(args.output_dir) / ANSWERS,
        identity={
            "model": name,
            "weights": sorted(weights),
            "dtype": teacher.module.dtype,
            "kwargs": args.teacher_model_init_kwargs,
            "options": config.rlhf.teacher.model_dump(mode="json"),
            "processor": image_content(its_processing),
        },
        max_new_tokens=config.rlhf.max_new_tokens,
        vocabulary=shared,
        batch_size=args.per_device_eval_batch_size,
        progress=reporter.answers,
    )


def _trust(config: RunConfig) -> dict[str, Any]:
    return {"trust_remote_code": config.model.trust_remote_code, "revision": config.model.revision}


def _datasets(
    config: RunConfig, seed: int, processing: Any, reporter: Reporter, given: Given
) -> tuple[datasets.Dataset, datasets.Dataset | None, BuildReport]:
    """Training and evaluation rows, encoded by one process of a machine and read from the cache by the others."""
    common: dict[str, Any] = {
        "max_length": config.data.max_length,
        "on_overlength": config.data.on_overlength,
        "train_on": config.data.train_on,
        "max_bad_rows": config.data.max_bad_rows,
        "sample_limit": config.custom.sample_limit,
        "seed": seed,
        "num_proc": config.training.get("dataset_num_proc"),
    }
    state = PartialState()
    with state.local_main_process_first():
        train, report = build_dataset(
            _sources(config.data.train, given.train_dataset), processing, new_parts=True, **common
        )
        evaluation = evaluation_report = None
        if config.data.eval:
            evaluation, evaluation_report = build_dataset(
                _sources(config.data.eval, given.eval_dataset), processing, **common
            )
    if state.is_main_process:
        reporter.data("train", report)
        if evaluation_report is not None:
            reporter.data("eval", evaluation_report)
    _check_supervision(config)
    if config.visual_kd_weight > 0 and not report.images:
        raise DataError(
            "custom.visual_kd is enabled, but no row of data.train has an image. Give rows with images (images, image, "
            "or image parts in messages), or set custom.visual_kd.enabled: false."
        )
    _check_generation(config, train, report)
    if evaluation_report is not None and evaluation_report.prompt_only_rows:
        raise DataError(
            f"data.eval: rows with a prompt and no answer: {evaluation_report.prompt_only_rows}, the first is number "
            f"{_first_prompt(evaluation)}. Evaluation does not generate: give rows with answers."
        )
    return train, evaluation, report


def _sources(sources: Sequence[DataSource], rows: Any) -> list[Source]:
    # Streaming is not available yet, which the config's own checks say.
    return [Source(**source.model_dump(exclude={"streaming"}), rows=rows) for source in sources]


def _check_supervision(config: RunConfig) -> None:
    """Refuse a run whose loss is 0 for every row."""
    if not config.needs_teacher and not any(source.ce for source in config.data.train):
        raise DataError(
            "Nothing supervises this run: every source has ce: false, and rlhf.llm_kd_weight is 0. Give it a teacher, "
            "or remove ce: false."
        )


def _check_generation(config: RunConfig, train: datasets.Dataset, report: BuildReport) -> None:
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
            f"Rows with a prompt and no answer: {report.prompt_only_rows}, the first is number {_first_prompt(train)}. "
            "Give it an answer; let the teacher write one (answers: teacher in its source); or have every batch "
            f"generated by rlhf.lmbda: 1 or rlhf.seq_kd: true (now {lmbda} and {seq_kd})."
        )


def _first_prompt(data: datasets.Dataset) -> str:
    """Where the first row without an answer stands, as "source:row", both from 0."""
    return next((row["row_id"] for row in data if row["prompt_length"] == len(row["input_ids"])), "unknown")


def _teacher(config: RunConfig, args: Any, processing: Any, student_size: int, given: Any) -> tuple[Any, Any, int]:
    """The teacher, what it processes rows with, and the vocabulary it shares with the student.

    (None, None, the student's vocabulary) where nothing asks a teacher.
    """
    if not config.asks_teacher:
        return None, None, student_size
    if given is not None:
        return _given_teacher(given, args, processing, student_size)
    name = config.rlhf.teacher_model
    assert name is not None, "the config is checked for it"
    options = config.rlhf.teacher
    kwargs = dict(args.teacher_model_init_kwargs)
    if options.device_map is not None:
        kwargs["device_map"] = options.device_map
    revision = kwargs.pop("revision", None) or options.revision
    trust: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code, "revision": revision}
    its_processing = load_processing(name, **trust)
    teacher = build_teacher(
        name, backend=options.backend, init_kwargs=kwargs, device=args.device, adapter=options.adapter, **trust
    )
    tokenizers = (getattr(one, "tokenizer", one) for one in (processing, its_processing))
    return teacher, its_processing, shared_vocabulary(student_size, teacher.vocab_size, *tokenizers)


def _given_teacher(given: Any, args: Any, processing: Any, student_size: int) -> tuple[Any, Any, int]:
    """As `_teacher`; of a model that was not loaded from a folder, the tokens are taken for those of the student."""
    teacher = given if isinstance(given, Teacher) else LocalTeacher(given)
    name = getattr(getattr(teacher.module, "config", None), "_name_or_path", "")
    its_processing = load_processing(name, trust_remote_code=args.trust_remote_code) if os.path.isdir(name) else None
    tokenizers = (getattr(one, "tokenizer", one) for one in (processing, its_processing))
    shared = shared_vocabulary(student_size, teacher.vocab_size, *tokenizers)
    return teacher, its_processing or processing, shared


def _peft_config(config: RunConfig, student: PreTrainedModel) -> Any:
    tuner = config.tuner
    if tuner.train_type != "lora":
        return None
    targets = () if isinstance(tuner.target_modules, str) else tuner.target_modules
    check_named_parts(student, targets, tuner.modules_to_save or (), **_frozen(config))
    return lora_config(
        rank=tuner.lora_rank,
        alpha=tuner.lora_alpha,
        dropout=tuner.lora_dropout,
        target_modules=tuner.target_modules,
        modules_to_save=tuner.modules_to_save,
        use_dora=tuner.use_dora,
        exclude_modules=adapter_exclusions(student, **_frozen(config)),
    )
