"""`answers: teacher`: before the trainer is built, the teacher writes the answers of some rows into the run folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import datasets
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel
from trl.experimental.gkd import GKDConfig

from kdtrain.config import RunConfig
from kdtrain.config.adapters import levels
from kdtrain.config.arguments import teacher_loading
from kdtrain.config.schema import DataSource
from kdtrain.data import BuildReport, Collator
from kdtrain.data.multimodal import image_content, image_token_ids
from kdtrain.errors import DataError
from kdtrain.generation.answers import TeacherAnswers
from kdtrain.generation.message_answers import MessageEncoder
from kdtrain.generation.sampling import turn_ends
from kdtrain.generation.writers import AskingWriter, LocalWriter, Writer
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.preflight.model_checks import both_sides, check_models
from kdtrain.preflight.positions import answered_rows
from kdtrain.ranks import is_main
from kdtrain.runs.failures import readable_failures
from kdtrain.runs.folder import answers_folder
from kdtrain.runs.read_data import RunData
from kdtrain.runs.resume import resume_command
from kdtrain.runs.signals import interrupting
from kdtrain.runs.status import teacher_cost, write_status
from kdtrain.teachers.base import Sampling, Teacher
from kdtrain.teachers.served.teacher import ServedTeacher

if TYPE_CHECKING:
    from kdtrain.runs.build import Reporter, TeacherSide

logger = logging.getLogger(__name__)

_BY = {True: "token ids", False: "messages"}
_COST = ("requests", "prompt_tokens", "completion_tokens")
WRITING = "the teacher writes answers"


class Progress(Protocol):
    """Hears how far it is."""

    def answers(self, done: int, total: int) -> None:
        """The teacher has answered some of the rows that it has to."""


def write_answers(
    config: RunConfig,
    args: GKDConfig,
    data: RunData,
    student: PreTrainedModel,
    teacher: TeacherSide,
    collator: Collator,
    reporter: Reporter,
    dry_run: bool,
) -> None:
    """Put the teacher's answers into the rows that ask for them; in a dry run, into those of its one window."""
    if dry_run:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        data.train = data.train.select(range(min(rows, len(data.train))))
        data.evaluation = data.evaluation and data.evaluation.select(range(min(rows, len(data.evaluation))))
        data.report.epochs = None  # a few rows are left, enough for its window
    for name, one in teacher.sides.items():
        own = config.by_teacher.get(name, config)
        _write(own, args, data, student, one, collator, reporter, dry_run, name or None)


def _write(
    config: RunConfig,
    args: GKDConfig,
    data: RunData,
    student: PreTrainedModel,
    teacher: TeacherSide,
    collator: Collator,
    reporter: Reporter,
    dry_run: bool,
    name: str | None,
) -> None:
    """The answers of one teacher, of several by its name."""
    assert teacher.teacher is not None, "the config asks for one"
    itself = teacher.teacher.is_student
    module: Any = student if itself else teacher.teacher.module
    if module is not None and getattr(module, "hf_device_map", None) is None and args.deepspeed_plugin is None:
        module.to(args.device)
    if itself:
        teacher.teacher.follow(student)
    # The trainer checks both models, but only when the answers are written.
    check_models(
        both_sides(student, teacher.teacher, collator),
        [*answered_rows(data.train, args), *answered_rows(data.evaluation, args)],
        collator,
        data.train,
        generating=[] if module is None else [module],
        only_errors=True,
    )
    check_images(data, collator)
    run_dir = Path(args.output_dir)
    answers = TeacherAnswers(
        answer_writer(config, args, data, student.generation_config, teacher, collator),
        answers_folder(run_dir),
        identity=_identity(config, args, teacher),
        progress=reporter.answers,
    )
    if is_main() and not dry_run:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_status(run_dir, "running", message=WRITING)
    kept = (
        "Stopped while the teacher was answering. What it has answered is kept in "
        f"{answers_folder(run_dir)}; go on with: {resume_command()}"
    )
    with readable_failures(args), interrupting(kept), _counted(teacher.teacher, run_dir), _its_weights(teacher.teacher):
        fill(answers, config, data, name)


def fill(answers: TeacherAnswers, config: RunConfig, data: RunData, teacher: str | None = None) -> None:
    """Put the answers into the rows of a run, of several teachers those of one, and leave those without out."""
    data.train = answers.fill(data.train, teacher)
    data.train = without_refused(data.train, answers.refused, config, config.data.train, data.report)
    if data.evaluation is not None and data.evaluation_report is not None:
        data.evaluation = answers.fill(data.evaluation, teacher)
        of = (config.data.eval_sources or config.data.train, data.evaluation_report)
        data.evaluation = without_refused(data.evaluation, answers.refused, config, *of)
    _count(config, data)


def answered(
    config: RunConfig,
    args: GKDConfig,
    rows: datasets.Dataset,
    student: PreTrainedModel,
    teacher: TeacherSide,
    collator: Collator,
    reporter: Progress,
) -> datasets.Dataset:
    """Rows with the answers that they ask for, for an evaluation: those that the run folder has, and new ones, which it
    then keeps. Rows without a usable answer are left out.
    """
    data = RunData(train=rows, evaluation=None, report=BuildReport())
    refused: dict[int, str] = {}
    for name, side in teacher.sides.items():
        own = config.by_teacher.get(name, config)
        answers = TeacherAnswers(
            answer_writer(own, args, data, student.generation_config, side, collator),
            answers_folder(Path(args.output_dir)),
            identity=_identity(own, args, side),
            progress=reporter.answers,
        )
        assert side.teacher is not None
        with readable_failures(args), _its_weights(side.teacher):
            rows = answers.fill(rows, name or None)
        refused |= answers.refused
    if len(refused) == len(rows):
        raise DataError(f"The teacher gave no usable answer. The first: {next(iter(refused.values()))}.")
    if refused:
        logger.warning("%d rows got no usable answer from the teacher and are left out.", len(refused))
    return rows.select([i for i in range(len(rows)) if i not in refused])


def _its_weights(teacher: Teacher) -> AbstractContextManager[Any]:
    """The teacher's weights in the model that writes, where it is in this process."""
    return nullcontext() if teacher.module is None else teacher.writing_model()


def answer_writer(
    config: RunConfig,
    args: GKDConfig,
    data: RunData,
    of_student: Any,
    side: TeacherSide,
    collator: Collator,
) -> Writer:
    """Who writes: the teacher's model where it is in this process, or the teacher by its own means.

    Args:
        of_student: its generation config, which says what ends an answer.
    """
    teacher, processing = side.teacher, collator.processing_class
    assert teacher is not None
    if teacher.module is not None:
        return LocalWriter(
            teacher.module,
            processing,
            collator,
            max_new_tokens=config.rlhf.most_new_tokens,
            vocabulary=side.shared_vocabulary,
            batch_size=args.per_device_eval_batch_size,
            device=PartialState().device,
        )
    messages = not teacher.has_targets
    for rows in (data.train, data.evaluation):
        check_askable(rows, messages)
    # What ends the teacher's answers itself is known by its tokenizer alone.
    of_teacher = getattr(side.processing, "tokenizer", side.processing)
    stops = turn_ends(processing, of_student, of_teacher)
    return AskingWriter(
        teacher,
        # Some APIs refuse temperature 0, so that there the config has the say.
        Sampling(
            config.rlhf.temperature if messages else None,
            config.rlhf.most_new_tokens,
            stops,
            sorted(image_token_ids(processing)),
        ),
        seed=args.seed,
        vocabulary=side.shared_vocabulary,
        encoder=_encoder(config, processing, stops) if messages else None,
    )


def _encoder(config: RunConfig, processing: Any, stops: Sequence[int]) -> MessageEncoder:
    names = ("reasoning", "control_tokens", "chat_template_kwargs")
    options = {name: value for name, value in config.data.chats.items() if name in names}
    teacher_kwargs = config.rlhf.teacher.chat_template_kwargs
    return MessageEncoder(processing, frozenset(stops), teacher_kwargs=teacher_kwargs, **options)


def check_askable(rows: datasets.Dataset | None, messages: bool) -> None:
    """Refuse rows that a server cannot be asked, before the first request.

    Raises:
        DataError: text where it reads messages, or images where it reads token ids.
    """
    if rows is None or "answers" not in rows.column_names:
        return
    # Not `filter`, which would leave a file beside the encoded rows.
    names = ["row_id", "answers", *({"chat", "images"} & set(rows.column_names))]
    asked = (row for row in rows.select_columns(names) if row["answers"])
    if messages:
        wrong = [row["row_id"] for row in asked if '"messages"' not in (row.get("chat") or "")]
        problem = "a prompt that is text, and the teacher reads messages (rlhf.teacher.api: chat)"
        hint = "Give prompts as lists of messages"
    else:
        wrong = [row["row_id"] for row in asked if row.get("images")]
        problem = "images, and the teacher is asked by token ids, which have none in them"
        hint = "Set rlhf.teacher.api: chat, with rlhf.llm_kd_weight: 0"
    if wrong:
        raise DataError(f"{len(wrong)} rows with answers: teacher (the first: {wrong[0]}) have {problem}. {hint}.")


@contextmanager
def _counted(teacher: Teacher, run_dir: Path) -> Iterator[None]:
    """Write into the run's status what the answers have cost, whatever ends them."""
    spent = getattr(getattr(teacher, "budget", None), "spent", None)
    if spent is None:
        yield
        return
    before, of_ranks = teacher_cost(run_dir), []
    try:
        yield
        of_ranks = gather_object([vars(spent)])
    finally:  # after an error the other ranks may not come
        if run_dir.is_dir():
            ranks = of_ranks or [vars(spent)]
            cost = {name: before.get(name, 0) + sum(rank[name] for rank in ranks) for name in _COST}
            write_status(run_dir, "running", message=WRITING, teacher=cost)


def without_refused(
    dataset: datasets.Dataset,
    refused: Mapping[int, str],
    config: RunConfig,
    sources: Sequence[DataSource],
    report: BuildReport,
) -> datasets.Dataset:
    """The rows that have an answer. The others are bad rows, of which there may be `data.max_bad_rows`.

    Raises:
        DataError: there are more, or no row is left.
    """
    if not refused:
        return dataset
    ids = {i: dataset[i]["row_id"] for i in refused}
    found = {ids[i]: reason for i, reason in sorted(refused.items())}  # a row that comes twice is one
    first = [f"{sources[int(row.split(':')[0])].path}, row {row}: {reason}" for row, reason in found.items()]
    report.bad_rows += len(found)
    report.first_bad = [*report.first_bad, *first][:3]
    if report.bad_rows > config.data.max_bad_rows or len(refused) == len(dataset):
        listed = "\n  ".join(first[:3])
        raise DataError(
            f"{len(found)} rows got no usable answer from the teacher, {report.bad_rows} rows cannot be used in all, "
            f"and data.max_bad_rows is {config.data.max_bad_rows}. The first:\n  {listed}\nThe other answers are kept. "
            f"Remove these rows, or raise data.max_bad_rows to leave them out, and go on with {resume_command()}"
        )
    left = [i for i in range(len(dataset)) if i not in refused]
    places = {old: new for new, old in enumerate(left)}
    report.image_extremes = [(places[i], place) for i, place in report.image_extremes if i in places]
    report.rows_kept -= len(found)
    if report.epochs is not None:
        report.epochs = report.epochs.without(sorted(refused))
    report.rows_per_epoch = len(left) if report.epochs is None else len(report.epochs)
    return dataset.select(left)


def check_images(data: RunData, collator: Collator) -> None:
    """Collate the rows with the most unusual images now: what does not fit a model would end the run in its middle."""
    _check_extremes(data.train, data.report, collator)
    if data.evaluation is not None and data.evaluation_report is not None:
        _check_extremes(data.evaluation, data.evaluation_report, collator)
    _check_longest(data.train, collator)


def _check_extremes(dataset: datasets.Dataset, report: BuildReport, collator: Collator) -> None:
    for row, place in report.image_extremes:
        if row >= len(dataset):  # a dry run keeps a few
            continue
        try:
            collator([dataset[row]])
        except DataError as error:
            raise DataError(f"{place}: {error}") from error


def _check_longest(train: datasets.Dataset, collator: Collator) -> None:
    if "images" not in train.column_names:
        return
    some = train.select(range(0, len(train), max(len(train) // 256, 1)))
    rows = sorted((row for row in some if row["images"]), key=lambda row: -len(row["input_ids"]))
    for row in rows[:8]:
        collator([row])


def _identity(config: RunConfig, args: GKDConfig, side: TeacherSide) -> dict[str, Any]:
    """All that answers depend on beside the prompt: they are kept by it, and written anew where it is another."""
    options, teacher = config.rlhf.teacher, side.teacher
    assert teacher is not None
    if teacher.module is None:  # where a server stands, and how fast it is asked, does not matter
        model = teacher.model if isinstance(teacher, ServedTeacher) else options.model
        return {"teacher": type(teacher).__name__, "model": model, "by": _BY[teacher.has_targets]}
    module: Any = teacher.module
    name: str | None
    if teacher.is_student:
        name, kwargs = config.model.model, {**config.model.init_kwargs, "revision": config.model.revision}
    else:
        name, kwargs = config.rlhf.teacher_model, teacher_loading(config)
    assert name is not None, "the config is checked for it"
    folders = [*levels(name), (config.model.adapter if teacher.is_student else options.adapter) or ""]
    files = [file for folder in folders if folder for file in Path(folder).glob("*.safetensors")]
    return {
        "model": name,
        "weights": sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files),
        "dtype": module.dtype,
        "kwargs": kwargs,
        # What the student's weights become later, its answers before training do not depend on.
        "options": options.model_dump(mode="json", exclude={"weights", "ema_decay"}),
        "processor": image_content(side.processing),
    }


def _count(config: RunConfig, data: RunData) -> None:
    """Bring the report up to what the rows are now."""
    report, train = data.report, data.train
    lengths = [len(ids) for ids in train["input_ids"]]
    supervised = [len(labels) - labels.count(IGNORE_INDEX) for labels in train["labels"]]
    epoch = range(len(train)) if report.epochs is None else report.epochs.rows(0)
    report.longest, report.total_tokens = max(lengths), sum(lengths[i] for i in epoch)
    report.supervised_tokens = sum(supervised[i] for i in epoch)
    long = sum(length > config.data.max_length for length in lengths)
    if long and is_main():
        logger.warning(
            "With the teacher's answers %d rows are longer than data.max_length (%d), the longest has %d tokens. "
            "Lower rlhf.max_new_tokens if that is too much for memory.",
            long,
            config.data.max_length,
            report.longest,
        )
