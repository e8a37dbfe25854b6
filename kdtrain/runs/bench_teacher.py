"""The teacher of an evaluation: the run's own, asked before figures rest on it."""

from __future__ import annotations

from typing import TypeAlias

import datasets
import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.experimental.gkd import GKDConfig

from kdtrain.config import RunConfig
from kdtrain.data import BuildReport, Collator
from kdtrain.errors import DataError
from kdtrain.models.processing import load_processing
from kdtrain.models.vocabulary import tokenizer_difference
from kdtrain.preflight.server import check_server, row_with_image, rows_to_ask_about
from kdtrain.runs.build import TeacherSide, teacher_side, together
from kdtrain.runs.from_cache import check_rows
from kdtrain.runs.student import load_own_teacher
from kdtrain.teachers import CachedTeacher, SelfTeacher, ServedTeacher

Processing: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


def side_of_evaluation(
    config: RunConfig, args: GKDConfig, processing: Processing, size: int, device: torch.device
) -> TeacherSide:
    """One that is the student itself is measured as it was before training."""
    if config.rlhf.teachers:
        of_each = config.by_teacher.items()
        return together(
            config, {name: side_of_evaluation(one, args, processing, size, device) for name, one in of_each}
        )
    if config.rlhf.teacher.backend == "self":
        itself = SelfTeacher("live")
        # Of its own, which is not trained: students come and go.
        itself.follow(load_own_teacher(config, args.device).to(device))
        return TeacherSide(itself, processing, size)
    return teacher_side(config, args, processing, size)


def other_tokenizer(config: RunConfig, processing: Processing) -> Processing | None:
    """What a teacher in this process reads text with, where that is not the student's tokenizer."""
    rlhf = config.rlhf
    if rlhf.teacher.backend != "hf" or rlhf.teacher_model is None:
        return None
    own = rlhf.teacher.processor_kwargs
    of_teacher = load_processing(
        rlhf.teacher_model,
        trust_remote_code=config.model.trust_remote_code,
        revision=rlhf.teacher.revision,
        processor_kwargs=config.data.processor_kwargs if own is None else own,
        side="teacher",
    )
    first, second = (getattr(one, "tokenizer", one) for one in (processing, of_teacher))
    return None if tokenizer_difference(first, second) is None else of_teacher


def check_teacher(
    side: TeacherSide, config: RunConfig, rows: datasets.Dataset, collator: Collator, report: BuildReport
) -> None:
    """What the server really does, and whether a cache has the rows; of several teachers, of each its own."""
    for name, one in side.of_each.items():
        own = rows.select([row for row, of in enumerate(rows["teacher"][:]) if of == name]) if config.routes else rows
        if len(own):
            check_teacher(one, config.of_teacher(name), own, collator, report)
    if isinstance(side.teacher, ServedTeacher) and side.teacher.route is None:
        check_server(
            side.teacher,
            rows_to_ask_about(rows),
            collator.processing_class,
            scores=config.options.needs_teacher,
            writes="answers" in rows.column_names or "teacher_input_ids" in rows.column_names,
            tokens=report.total_tokens,
            chat_template_kwargs={**config.data.chat_template_kwargs, **config.rlhf.teacher.chat_template_kwargs},
            teacher_processing=collator.teacher_processing_class,
            image_row=row_with_image(rows, collator),
        )
    if isinstance(side.teacher, CachedTeacher):
        try:
            check_rows(side.teacher, config, None, rows)
        except DataError as error:
            raise DataError(f"{error} Or evaluate beside the teacher itself: rlhf.teacher.backend=hf") from error
