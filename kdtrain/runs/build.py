"""From a config to a trainer: rows, student, teacher, and the checks that need them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl.experimental.gkd import GKDConfig

from kdtrain.config import RunConfig
from kdtrain.config.adapters import model_below
from kdtrain.config.arguments import teacher_loading
from kdtrain.config.model_folder import require_sound
from kdtrain.config.tree import KeyPath, Problem
from kdtrain.data import BuildReport, Collator, TemplateOptions
from kdtrain.data.aligned_batch import Aligner
from kdtrain.data.multimodal import image_content
from kdtrain.data.other_tokenizer import OtherTokenizer
from kdtrain.errors import ConfigError, NotAvailableError
from kdtrain.models.kinds import sees_images
from kdtrain.models.parts import freeze_parts
from kdtrain.models.probe import OPTION_OF
from kdtrain.models.processing import load_processing, load_tokenizer
from kdtrain.models.tuning import adapter_config
from kdtrain.models.vocabulary import shared_vocabulary, tokenizer_difference, vocabulary_size
from kdtrain.preflight.doctor.rows import repeated_findings, row_findings
from kdtrain.preflight.doctor.templates import template_findings, untrained_findings
from kdtrain.preflight.findings import Together, about, report
from kdtrain.preflight.generation import by_vllm, check_generation
from kdtrain.preflight.server import check_server, row_with_image, rows_for_other, rows_to_ask_about
from kdtrain.ranks import is_main
from kdtrain.runs.cache_answers import answers_of_cache
from kdtrain.runs.failures import readable_construction
from kdtrain.runs.from_cache import check_rows, open_cache
from kdtrain.runs.read_data import RunData, read_data
from kdtrain.runs.resources import resource_findings
from kdtrain.runs.student import load_student, student_config
from kdtrain.runs.teacher_answers import check_images, write_answers
from kdtrain.teachers import (
    CachedTeacher,
    LocalTeacher,
    MixedTeacher,
    RoutedTeacher,
    SelfTeacher,
    ServedTeacher,
    Teacher,
    build_teacher,
    connect_teacher,
)
from kdtrain.teachers.cached.manifest import Manifest
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.argument_checks import check_teacher_is_another_model, take_one_gpu
from kdtrain.trainer.completions import Completion
from kdtrain.trainer.deepspeed import prepare_deepspeed_run
from kdtrain.trainer.given_rows import RowsInMemory
from kdtrain.trainer.startup_checks import check_startup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """What a caller hands over instead of naming it in the config; None is what the config names."""

    train_dataset: Dataset | RowsInMemory | None = None
    eval_dataset: Dataset | RowsInMemory | None = None
    model: PreTrainedModel | None = None
    teacher: nn.Module | Teacher | None = None
    callbacks: Sequence[TrainerCallback] = ()


class Reporter(Protocol):
    """Shows what a run does: on a terminal, in a log, or nowhere."""

    def data(self, name: str, report: BuildReport) -> None:
        """A data set was read."""

    def answers(self, done: int, total: int) -> None:
        """The teacher has answered some of the rows that it has to."""

    def plan(self, rows: Mapping[str, str]) -> None:
        """What was derived from config and device, before training begins."""

    def completions(self, found: Sequence[Completion]) -> None:
        """Answers of a step that is about to train on them, which are to be looked at."""

    def callbacks(self) -> list[TrainerCallback]:
        """Callbacks that show progress; asked for on rank 0 only."""

    def close(self) -> None:
        """The run is over, one way or another."""


# Columns that a server's model may have beyond its tokenizer's ids: its most likely tokens may be of these.
_MOST_PADDING = 2**16


class TeacherSide(NamedTuple):
    """The teacher, what it processes rows with, and the leading token ids that it shares with the student."""

    teacher: Teacher | None
    processing: PreTrainedTokenizerBase | ProcessorMixin | None
    shared_vocabulary: int
    other_tokenizer: Aligner | None = None
    """What reads rows as the teacher does, where it has another tokenizer (`rlhf.cross_tokenizer`)."""
    of_each: Mapping[str, TeacherSide] = {}
    """Of several teachers, by name."""

    @property
    def shared(self) -> int | dict[str, int]:
        """The shared ids, as the trainer takes them."""
        if not self.of_each:
            return self.shared_vocabulary
        return {name: side.shared_vocabulary for name, side in self.of_each.items()}

    @property
    def sides(self) -> Mapping[str, TeacherSide]:
        """Of each teacher by name; of a single one itself, under none."""
        return self.of_each or {"": self}


def _say_checkpointing(config: RunConfig, args: GKDConfig) -> None:
    """An inherited default that costs a third more time is said."""
    named = {"gradient_checkpointing", "activation_checkpointing"} & config.training.keys()
    if args.gradient_checkpointing and not named and is_main():
        logger.info(
            "training.gradient_checkpointing is on, as TRL has it by default: less memory, a third more time. Set it "
            "to false where there is memory enough."
        )


def build_trainer(
    config: RunConfig,
    args: GKDConfig,
    reporter: Reporter,
    dry_run: bool,
    given: Given,
    at_the_end: ExitStack,
    when_read: Callable[[PreTrainedTokenizerBase | ProcessorMixin, RunData], None] | None = None,
) -> tuple[GKDTrainerWithMetrics, BuildReport]:
    """Rows, student, teacher and trainer; what costs little comes first.

    Args:
        at_the_end: closes the teacher, unless it was given.
        when_read: is called with the student's tokenizer or processor and the rows, before a model is loaded.
    """
    assert args.device is not None  # looked at first, which joins the process group
    take_one_gpu(args)
    _say_checkpointing(config, args)
    prepare_deepspeed_run(args)
    of_teacher = option_of_teacher(config)
    with about(OPTION_OF["student"]):
        _check_folders(config, given)
        settings, hub = config.data.processor_kwargs, _hub_options(config)
        processing = load_processing(config.model.model, processor_kwargs=settings, side="student", **hub)
    caches: dict[str, CachedTeacher] = {}
    for name, one in config.by_teacher.items():
        with about(option_of_teacher(config, name)):
            if _reads_cache(one, given.teacher):
                caches[name] = open_cache(one, processing)
    with about(("data", "train")):
        data = read_data(config, args.seed, processing, reporter, given)
    if when_read is not None:
        when_read(processing, data)
    for name, cached in caches.items():
        with about(option_of_teacher(config, name)):
            if config.answers_from_teacher:
                if name:
                    raise NotAvailableError(_CACHED_ANSWERS)
                answers_of_cache(cached.folder, Manifest.read(cached.folder), config, data, at_the_end)
            own = name if config.routes else None
            check_rows(cached, config, data.train, data.evaluation, teacher=own)
    student = given.model
    if student is None and given.teacher is None:  # of others the config says nothing
        report(resource_findings(config, args, data))
    if by_vllm(config.options):
        with about(("rlhf", "generation", "backend")):
            check_generation(config.options, student_config(config) if student is None else student.config, args.device)
    with about(OPTION_OF["student"]):
        if student is None:
            student = load_student(config, args.device)
        check_teacher_is_another_model(student, given.teacher)
        freeze_parts(student, **config.tuner.frozen)
    dense_text = not sees_images(student.config) and not hasattr(student.config, "output_router_logits")
    if args.ddp_find_unused_parameters is None and dense_text:
        # It uses all its weights in every step; only experts and vision encoders may go without a gradient.
        args.ddp_find_unused_parameters = False
    with about(of_teacher):
        teacher = teachers_side(config, processing, vocabulary_size(student), args, given.teacher, caches)
    if teacher.teacher is not None and given.teacher is None:
        at_the_end.callback(teacher.teacher.close)
    collator = Collator(
        processing,
        teacher.processing,
        pad_to_multiple_of=args.pad_to_multiple_of,
        answers=config.checks_answers,
        other_tokenizer=teacher.other_tokenizer,
        row_keys=teacher.teacher is not None and not teacher.teacher.answers_anything,
        teachers=bool(config.routes),
        with_blanks=config.options.weighing is not None,
    )
    for name, side in teacher.sides.items():
        if isinstance(side.teacher, ServedTeacher) and side.teacher.route is None:
            with about(option_of_teacher(config, name)):
                _probe(config.by_teacher.get(name, config), args, data, side.teacher, collator, name)
    if config.answers_from_teacher and not caches:
        with about(of_teacher):
            write_answers(config, args, data, student, teacher, collator, reporter, dry_run)
    # The trainer refuses what it cannot follow itself. Here both were followed above, or a warning said why not.
    args.tuner = args.teacher_model_init_kwargs = None
    with about(OPTION_OF["student"]), readable_construction():
        trainer = GKDTrainerWithMetrics(
            student,
            args=args,
            data_collator=collator,
            train_dataset=data.train if data.stream is None else data.stream,
            eval_dataset=data.evaluation,
            processing_class=processing,
            peft_config=adapter_config(config.tuner, student),
            callbacks=list(given.callbacks),
            teacher=teacher.teacher if config.options.needs_teacher else None,
            shared_vocab_size=teacher.shared,
        )
        if data.report.epochs is not None:
            trainer.read_epochs(data.report.epochs)
    look_before_training(config, trainer, data, teacher, collator)
    return trainer, data.report


def look_before_training(
    config: RunConfig, trainer: GKDTrainerWithMetrics, data: RunData, teacher: TeacherSide, collator: Collator
) -> None:
    """All that can be seen now that everything is built: warnings are said once, and what stops the run all at once."""
    together = Together()
    with together.check(("data", "train")):
        check_images(data, collator)
    with together.check(("data", "train")):
        report(_row_findings(config, data))
    with together.check(option_of_teacher(config)):
        report(_template_findings(config, trainer, data, teacher))
    with together.check(option_of_teacher(config)):
        check_startup(trainer, config.training.get("greater_is_better"))
    together.done()


def _row_findings(config: RunConfig, data: RunData) -> Iterator[Problem]:
    longest = config.data.max_length
    yield from row_findings(data.report, ("data", "train"), longest, generated=config.all_generated)
    if data.evaluation_report is not None:
        yield from row_findings(data.evaluation_report, ("data", "eval"), longest, generated=False)
    yield from repeated_findings(data.train, data.evaluation)


def _template_findings(
    config: RunConfig, trainer: GKDTrainerWithMetrics, data: RunData, teacher: TeacherSide
) -> Iterator[Problem]:
    own, kwargs = trainer.processing_class, config.data.chat_template_kwargs
    if data.report.chat_rows and not trainer.is_sharded:
        yield from untrained_findings(trainer.model, own)
    if teacher.teacher is not None and config.options.lm_kd_active and teacher.other_tokenizer is None:
        yield from template_findings(
            own,
            teacher.processing or own,
            chats=bool(data.report.chat_rows),
            student_kwargs=kwargs,
            teacher_kwargs={**kwargs, **config.rlhf.teacher.chat_template_kwargs},
        )


# By backend, the option that names the teacher, where it is not `rlhf.teacher_model`: findings belong to it.
_OPTION_OF: dict[str, KeyPath] = {
    "self": OPTION_OF["student"],
    "vllm": ("rlhf", "teacher", "base_url"),
    "openai": ("rlhf", "teacher", "base_url"),
    "cache": ("rlhf", "teacher", "path"),
}


_CACHED_ANSWERS = (
    "answers: teacher with several teachers of which one is a cache is not available yet: let the teachers write their "
    "answers in a run of their own, and train from a file with these."
)


def option_of_teacher(config: RunConfig, name: str = "") -> KeyPath:
    """The option that a finding about the teacher belongs to; of several, to one of them by name."""
    if config.rlhf.teachers:
        return ("rlhf", "teachers", name) if name else ("rlhf", "teachers")
    return _OPTION_OF.get(config.rlhf.teacher.backend, OPTION_OF["teacher"])


def _check_folders(config: RunConfig, given: Given) -> None:
    """What can be seen of the models before anything is loaded."""
    if given.teacher is not None and config.rlhf.teachers:
        raise ConfigError("A teacher was handed over, and rlhf.teachers names several: remove one of the two.")
    if config.answers_from_teacher and isinstance(given.teacher, Teacher) and not given.teacher.can_generate:
        raise ConfigError(
            f"answers: teacher needs a teacher that can write, and the {type(given.teacher).__name__} handed over "
            "cannot (its module is None, and can_generate false). Hand over a model, or remove answers: teacher."
        )
    if given.model is None:
        require_sound(Path(model_below(config.model.model)), "student")
    for one in config.by_teacher.values() if given.teacher is None and config.asks_teacher else ():
        if one.rlhf.teacher.backend == "hf" and one.rlhf.teacher_model:
            require_sound(Path(one.rlhf.teacher_model), "teacher")


def _reads_cache(config: RunConfig, given: nn.Module | Teacher | None) -> bool:
    return given is None and config.asks_teacher and config.rlhf.teacher.backend == "cache"


def _hub_options(config: RunConfig) -> dict[str, Any]:
    return {"trust_remote_code": config.model.trust_remote_code, "revision": config.model.revision}


def teachers_side(
    config: RunConfig,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    student_size: int,
    args: GKDConfig,
    given: nn.Module | Teacher | None = None,
    caches: Mapping[str, CachedTeacher] | None = None,
) -> TeacherSide:
    """As `teacher_side`, of all teachers that a config names.

    Args:
        caches: those that are open already, by the name of the teacher.
    """
    caches = caches or {}
    if not config.rlhf.teachers or not config.asks_teacher or given is not None:
        return teacher_side(config, args, processing, student_size, given or caches.get(""))
    sides = {}
    for name, one in config.by_teacher.items():
        with about(option_of_teacher(config, name)):
            sides[name] = teacher_side(one, args, processing, student_size, caches.get(name))
    return together(config, sides)


def together(config: RunConfig, sides: Mapping[str, TeacherSide]) -> TeacherSide:
    """Several teachers as one, which rows are dealt to, or whose mean teaches.

    Raises:
        NotAvailableError: their image processors differ, and a batch has images of one kind for teachers.
    """
    prepared = {json.dumps(image_content(side.processing), sort_keys=True, default=str) for side in sides.values()}
    if len(prepared) > 1:
        raise NotAvailableError(
            "Several teachers whose image processors differ are not available yet: give them one (processor_kwargs), "
            "or take one teacher."
        )
    members = {name: side.teacher for name, side in sides.items() if side.teacher is not None}
    several = RoutedTeacher(members) if config.rlhf.mix is None else MixedTeacher(members, config.rlhf.mix)
    first = next(iter(sides.values()))
    return TeacherSide(several, first.processing, min(side.shared_vocabulary for side in sides.values()), of_each=sides)


def teacher_side(
    config: RunConfig,
    args: GKDConfig,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    student_size: int,
    given: nn.Module | Teacher | None = None,
) -> TeacherSide:
    """The teacher, and the ids it shares with the student; without one, where nothing asks for it, all of them."""
    if not config.asks_teacher:
        return TeacherSide(None, None, student_size)
    if _reads_cache(config, given):
        given = open_cache(config, processing)
    if (
        isinstance(given, Teacher) and not given.answers_anything
    ):  # its rows were encoded by a tokenizer like the student's
        if given.aligner is not None:
            return TeacherSide(given, processing, student_size, given.aligner)
        tokenizer = getattr(processing, "tokenizer", processing)
        return TeacherSide(given, processing, shared_vocabulary(student_size, given.vocab_size, tokenizer, tokenizer))
    own = config.rlhf.teacher.processor_kwargs
    prepared: dict[str, Any] = {
        "processor_kwargs": config.data.processor_kwargs if own is None else own,
        "side": "teacher",
    }
    if given is None and config.rlhf.teacher.backend == "self":
        given = SelfTeacher(config.rlhf.teacher.weights, config.rlhf.teacher.ema_decay)
    if isinstance(given, Teacher) and given.is_student:
        return TeacherSide(given, processing, student_size)
    if given is None and config.rlhf.teacher.is_served:
        return _served_teacher(config, processing, student_size)
    if given is None:
        name, options = config.rlhf.teacher_model, config.rlhf.teacher
        assert name is not None, "the config is checked for it"
        kwargs = teacher_loading(config)
        if options.device_map is not None:
            kwargs["device_map"] = options.device_map
        hub = {**_hub_options(config), "revision": kwargs.pop("revision", None) or options.revision}
        own_processing = load_processing(name, **prepared, **hub)
        teacher = build_teacher(
            name,
            init_kwargs=kwargs,
            device=args.device,
            adapter=options.adapter,
            quantization=options.quantization,
            placement=options.placement,
            is_whole=args.deepspeed is None and not args.fsdp,
            **hub,
        )
    else:
        teacher = given if isinstance(given, Teacher) else LocalTeacher(given, config.rlhf.teacher.placement)
        folder = getattr(getattr(teacher.module, "config", None), "_name_or_path", "")
        known = os.path.isdir(folder)  # of one built in memory, the tokens are taken for the student's
        trust = args.trust_remote_code
        own_processing = load_processing(folder, trust_remote_code=trust, **prepared) if known else None
    if config.options.crosses_tokenizers:
        other = other_tokenizer(config, processing, own_processing)
        return TeacherSide(teacher, own_processing, student_size, other)
    tokenizers = (getattr(one, "tokenizer", one) for one in (processing, own_processing))
    shared = shared_vocabulary(student_size, teacher.vocab_size, *tokenizers)
    return TeacherSide(teacher, own_processing or processing, shared)


def other_tokenizer(
    config: RunConfig,
    processing: PreTrainedTokenizerBase | ProcessorMixin,
    of_teacher: PreTrainedTokenizerBase | ProcessorMixin | None,
) -> OtherTokenizer:
    """What reads rows as a teacher with another tokenizer does.

    Raises:
        ConfigError: it is not known.
    """
    if of_teacher is None:
        raise ConfigError(
            "rlhf.cross_tokenizer needs the teacher's tokenizer, and the teacher handed over has none: save it in the "
            "folder that the model was loaded from."
        )
    first, second = (getattr(one, "tokenizer", one) for one in (processing, of_teacher))
    if tokenizer_difference(first, second) is None:
        message = "Student and teacher have the same tokenizer, so that more can be compared than likelihoods of text:"
        path = ("rlhf", "cross_tokenizer")
        report([Problem(path, message, "remove rlhf.cross_tokenizer.", level="warning")])
    return OtherTokenizer(
        processing, of_teacher, TemplateOptions(**config.chats), config.rlhf.teacher.chat_template_kwargs
    )


def _probe(
    config: RunConfig, args: GKDConfig, data: RunData, teacher: ServedTeacher, collator: Collator, name: str = ""
) -> None:
    """Find out what the server really does, before anything is paid for or trained on it.

    Args:
        name: of one of several teachers, which is asked about its own rows alone.
    """
    report, options, train, share = data.report, config.options, data.train, 1.0
    if name and "teacher" in train.column_names:
        own = [row for row, one in enumerate(train["teacher"][:]) if one == name]
        train, share = train.select(own), len(own) / max(len(train), 1)
        if not own:
            logger.warning("rlhf.teachers.%s: no row of data.train is its own, so it is not asked.", name)
            return
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size * args.max_steps
    epochs = rows / report.rows_per_epoch if rows > 0 else args.num_train_epochs
    other = collator.other_tokenizer is not None
    check_server(
        teacher,
        rows_for_other(train, collator) if other else rows_to_ask_about(train),
        collator.teacher_processing_class if other else collator.processing_class,
        scores=options.lm_kd_active,
        writes=config.answers_from_teacher or (options.lm_kd_active and options.seq_kd),
        tokens=round(report.teacher_tokens * epochs * share),
        chat_template_kwargs={**config.data.chat_template_kwargs, **config.rlhf.teacher.chat_template_kwargs},
        teacher_processing=collator.teacher_processing_class,
        image_row=row_with_image(train, collator) if options.lm_kd_active else None,
    )


def _served_teacher(
    config: RunConfig, processing: PreTrainedTokenizerBase | ProcessorMixin, student_size: int
) -> TeacherSide:
    """A server's teacher: its tokenizer is that of `teacher_model`, or taken for the student's; the probe compares."""
    name, options = config.rlhf.teacher_model, config.rlhf.teacher
    own = None if name is None else load_tokenizer(name, **{**_hub_options(config), "revision": None})
    if config.options.crosses_tokenizers:
        other = other_tokenizer(config, processing, own)
        assert own is not None, "checked by `other_tokenizer`"
        ids = max(own.get_vocab().values()) + _MOST_PADDING
        return TeacherSide(connect_teacher(options, ids, actual_alone=True), own, student_size, other)
    tokenizers = (getattr(one, "tokenizer", one) for one in (processing, own))
    # How many columns the server's model has is not known; what counts are the student's.
    shared = shared_vocabulary(student_size, student_size, *tokenizers)
    # A server prepares images by itself, in its own way: here they go through the student's processor alone.
    own = processing if isinstance(processing, ProcessorMixin) else own or processing
    return TeacherSide(connect_teacher(options, shared), own, shared)
