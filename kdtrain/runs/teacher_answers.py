"""`answers: teacher`: before the trainer is built, the teacher writes the answers of some rows into the run folder."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from transformers import PreTrainedModel
from trl.experimental.gkd import GKDConfig

from kdtrain.config import RunConfig
from kdtrain.config.adapters import adapter_base, is_adapter_folder
from kdtrain.data import BuildReport, Collator
from kdtrain.data.multimodal import image_content
from kdtrain.errors import DataError
from kdtrain.generation.answers import TeacherAnswers
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.preflight.model_checks import both_sides, check_models
from kdtrain.preflight.positions import answered_rows
from kdtrain.ranks import is_main
from kdtrain.runs.failures import readable_failures
from kdtrain.runs.folder import ANSWERS
from kdtrain.runs.signals import interrupting
from kdtrain.runs.status import write_status

if TYPE_CHECKING:
    from kdtrain.runs.build import Reporter, TeacherSide
    from kdtrain.runs.read_data import RunData

logger = logging.getLogger(__name__)


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
    module: Any = teacher.teacher and teacher.teacher.module
    if getattr(module, "hf_device_map", None) is None and not args.deepspeed:
        module.to(args.device)
    # The trainer checks both models, but only when the answers are written.
    check_models(
        both_sides(student, teacher.teacher, collator),
        [*answered_rows(data.train, args), *answered_rows(data.evaluation, args)],
        collator,
        data.train,
        generating=[module],
        only_errors=True,
    )
    check_images(data, collator)
    run_dir = Path(args.output_dir)
    answers = TeacherAnswers(
        module,
        collator.processing_class,
        collator,
        run_dir / ANSWERS,
        identity=_identity(config, args, module, teacher.processing),
        max_new_tokens=config.rlhf.max_new_tokens,
        vocabulary=teacher.shared_vocabulary,
        batch_size=args.per_device_eval_batch_size,
        progress=reporter.answers,
    )
    if dry_run:
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        data.train = data.train.select(range(min(rows, len(data.train))))
        data.evaluation = data.evaluation and data.evaluation.select(range(min(rows, len(data.evaluation))))
        data.report.epochs = None  # a few rows are left, enough for its window
    elif is_main():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_status(run_dir, "running", message="the teacher writes answers")
    kept = (
        f"Stopped while the teacher was answering. What it has answered is kept in {run_dir / ANSWERS}; go on with: "
        "kdtrain fit CONFIG --resume auto"
    )
    with readable_failures(args), interrupting(kept):
        data.train = answers.fill(data.train)
        data.evaluation = data.evaluation and answers.fill(data.evaluation)
    _count(config, data)


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


def _identity(config: RunConfig, args: GKDConfig, teacher: PreTrainedModel, processing: Any) -> dict[str, Any]:
    """All that answers depend on beside the prompt: they are kept by it, and written anew where it is another."""
    name = config.rlhf.teacher_model
    assert name is not None, "the config is checked for it"
    folders = [name, *([adapter_base(name)] if is_adapter_folder(name) else []), config.rlhf.teacher.adapter or ""]
    files = [file for folder in folders if folder for file in Path(folder).glob("*.safetensors")]
    return {
        "model": name,
        "weights": sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files),
        "dtype": teacher.dtype,
        "kwargs": args.teacher_model_init_kwargs,
        "options": config.rlhf.teacher.model_dump(mode="json"),
        "processor": image_content(processing),
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
