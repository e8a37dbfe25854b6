"""A few rows through both models, once, before the first step: what the doctor for distillation looks at.

Whether the teacher's targets stand at the right tokens, whether what it alone reads changes them, whether it has seen
the image, how well both know the rows, and how hard each term of the loss pulls. A teacher is asked for one batch, and
once more where that settles nothing; the student runs once, without a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from kdtrain.config.options import DistillationOptions
from kdtrain.config.tree import Problem
from kdtrain.data.batch import Batch, right_padded
from kdtrain.data.collate import Collator
from kdtrain.data.with_images import few_with_images
from kdtrain.errors import PreflightError, TeacherError
from kdtrain.losses.mixture import MixedTopK
from kdtrain.models.probe import evaluating, own_random_state
from kdtrain.preflight.alignment import LOOKED_AT, check_alignment, few_rows
from kdtrain.preflight.context import context_findings, look_at_context, rows_with_context
from kdtrain.preflight.doctor.answers import answer_findings, look_at_answers
from kdtrain.preflight.doctor.gradients import gradient_findings
from kdtrain.preflight.doctor.images import image_findings
from kdtrain.preflight.findings import Together, report
from kdtrain.preflight.other_tokenizer import look_at_rows
from kdtrain.preflight.positions import refuse_width
from kdtrain.teachers import DenseTargets, RoutedTeacher, Targets, Teacher, teacher_autocast
from kdtrain.teachers.base import AnyTargets
from kdtrain.teachers.by_row import part_of
from kdtrain.teachers.other_tokenizer import chunk_targets
from kdtrain.teachers.several import rows_of_batch
from kdtrain.trainer.answers import generated
from kdtrain.trainer.given_rows import rows_to_look_at
from kdtrain.trainer.guard import targets_named
from kdtrain.trainer.term_gradients import TermGradients, term_gradients

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

_SHORT_ANSWER = 32  # tokens: enough to see what a prefix changes
_ROWS_WITH_IMAGES = 4


def look_at_losses(trainer: GKDTrainerWithMetrics) -> None:
    """Ask both models about a few rows of the data, once in the life of a trainer."""
    if trainer.alignment_checked:
        return
    trainer.alignment_checked = True
    together = Together()
    if trainer.options.crosses_tokenizers:
        found = look_at_rows(rows_to_look_at(trainer.train_dataset), trainer.data_collator)
        trainer.alignment_of_rows = found
        report([] if found is None else [found.finding()])
    try:
        with own_random_state(trainer.args.device):  # a user's collator, and some models, draw
            batch = _few_rows(trainer)
            targets = None if batch is None else _targets(trainer, batch)
            of_chunks = isinstance(targets, Targets) and targets.chunks is not None  # which are of no single token
            if batch is not None and targets is not None and not of_chunks:
                with together.check():
                    _check_alignment(trainer, batch, targets)
            with together.check():
                _check_context(trainer)
            if batch is not None and targets is not None and trainer.options.crosses_tokenizers:
                assert isinstance(targets, Targets), "several teachers have the student's tokens"
                targets = chunk_targets(targets, batch, trainer.options.cross_tokenizer)
            with together.check():
                _consult(trainer, batch, targets)
    except TeacherError as error:
        raise PreflightError(str(error)) from error  # nothing is trained yet, and nothing to be saved
    together.done()


def _few_rows(trainer: GKDTrainerWithMetrics) -> Batch | None:
    batch = few_rows(
        rows_to_look_at(trainer.train_dataset), trainer.data_collator, trainer.args.per_device_train_batch_size
    )
    if batch is None:
        return None
    batch = _received(trainer, batch)
    return batch if isinstance(trainer.data_collator, Collator) else right_padded(batch)


def _targets(trainer: GKDTrainerWithMetrics, batch: Batch) -> AnyTargets | None:
    teacher = trainer.teacher
    if teacher is None or not trainer.options.lm_kd_active:
        return None
    teacher.prepare([batch])
    with teacher_autocast(trainer.accelerator), targets_named(trainer, batch):
        return teacher.targets(batch)


def _check_alignment(trainer: GKDTrainerWithMetrics, batch: Batch, targets: AnyTargets) -> None:
    """Of each teacher, on rows that are its own."""
    assert trainer.teacher is not None
    together = Together()
    for teacher, own in _asked_about_few(trainer, batch):
        known = targets if isinstance(targets, Targets) and len(trainer.teacher.members) == 1 else None
        with together.check(), teacher_autocast(trainer.accelerator), targets_named(trainer, own):
            found = check_alignment(teacher, own, targets=known, any_rank=lambda one: _on_any_rank(trainer, one))
            report(_naming(teacher, found))
    together.done()


def _asked_about_few(trainer: GKDTrainerWithMetrics, batch: Batch) -> list[tuple[Teacher, Batch]]:
    """Each teacher with a few rows that it answers for: of the batch, or others where that has too few of its own."""
    assert trainer.teacher is not None
    found = trainer.teacher.asked_about(batch)
    if not isinstance(trainer.teacher, RoutedTeacher):
        return found
    rows = rows_to_look_at(trainer.train_dataset)
    names = rows["teacher"][:] if "teacher" in (getattr(rows, "column_names", None) or ()) else None
    if names is None:
        return found
    found = []
    for name, teacher in trainer.teacher.by_name.items():
        own = [row for row, one in enumerate(names) if one == name][:LOOKED_AT]
        few = few_rows(rows.select(own), trainer.data_collator, trainer.args.per_device_train_batch_size)
        if few is not None:
            found.append((teacher, _received(trainer, few)))
    return found


def _naming(teacher: Teacher, found: Sequence[Problem]) -> list[Problem]:
    """Findings with the name of the teacher that they are about, where there are several."""
    if teacher.name is None:
        return list(found)
    return [replace(one, message=f"{teacher.name}: {one.message}") for one in found]


def _check_context(trainer: GKDTrainerWithMetrics) -> None:
    """Whether what it alone reads changes what it says: on the data's answers, or on short ones that are written."""
    teacher = trainer.teacher
    if teacher is None or not trainer.options.lm_kd_active or not teacher.answers_anything:
        return
    if trainer.options.crosses_tokenizers:  # it reads other texts anyway
        return
    batch = rows_with_context(rows_to_look_at(trainer.train_dataset), trainer.data_collator)
    if batch is None:
        return
    batch = _received(trainer, batch)
    if not int(batch.num_supervised):
        options = trainer.options.checked()
        short = min(_SHORT_ANSWER, options.most_new_tokens)
        options = options.model_copy(update={"max_new_tokens": short})
        side: Literal["student", "teacher"] = "teacher" if options.seq_kd and teacher.module else "student"
        (batch,) = generated(trainer, [batch], side, options)
    for one, own in teacher.asked_about(batch):
        with teacher_autocast(trainer.accelerator):
            report(_naming(one, context_findings(look_at_context(one, own, trainer._tokenizer))))


# ---- the doctor ------------------------------------------------------------------------------------------------------


def _consult(trainer: GKDTrainerWithMetrics, batch: Batch | None, targets: AnyTargets | None) -> None:
    """What both models say of the rows, and how hard each term pulls; not of weights that FSDP or DeepSpeed hold in
    pieces, which run only when they are wrapped."""
    lacks_teacher = trainer.teacher is None and trainer.options.needs_teacher  # its first window says so
    if trainer.is_sharded or lacks_teacher:
        return
    with_images = None if trainer.train_dataset is None else _rows_with_images(trainer)
    together = Together()
    if with_images is not None and trainer.teacher is not None and trainer.options.lm_kd_active:
        for teacher, own in trainer.teacher.asked_about(with_images):
            with together.check(), teacher_autocast(trainer.accelerator):
                report(_naming(teacher, image_findings(teacher, own)))
    if with_images is not None and trainer.visual is not None:
        batch, targets = with_images, None  # the visual term is compared with the others on the same rows
    if batch is not None:
        with together.check():
            _compare(trainer, batch, targets)
    together.done()


def _compare(trainer: GKDTrainerWithMetrics, batch: Batch, targets: AnyTargets | None) -> None:
    options, teacher = trainer.options.checked(), trainer.teacher
    if options.hidden_kd is not None:
        targets = None  # the teacher runs again, for its features
    found = _gradients(trainer, batch, targets, options)
    trainer.first_gradients = found.norms
    compares = not options.crosses_tokenizers  # token by token
    if compares and found.student is not None and found.targets is not None and teacher is not None:
        _compare_answers(trainer, found.student, found.targets, batch)
    itself = teacher is not None and all(one.is_student for one in teacher.members)
    report(gradient_findings(found.norms, options, itself=itself))


def _compare_answers(
    trainer: GKDTrainerWithMetrics, student: DenseTargets | torch.Tensor, targets: AnyTargets, batch: Batch
) -> None:
    """How well student and teacher know the answers; of several teachers each those of its own rows."""
    assert trainer.teacher is not None
    assert trainer.vocabulary is not None
    columns, tokenizer = trainer.vocabulary.shared, trainer._tokenizer
    if isinstance(targets, Targets):
        itself = all(one.is_student for one in trainer.teacher.members)
        if not isinstance(targets.scores, MixedTopK):
            looked = look_at_answers(student, targets, batch, tokenizer, columns)
            report(answer_findings(looked, itself=itself))
        return
    together = Together()
    by_name = {one.name: one for one in trainer.teacher.members}
    for part in targets.parts:
        own = part_of(student, batch.tokens_of_rows(part.rows))
        assert isinstance(own, DenseTargets | torch.Tensor)
        looked = look_at_answers(own, part.targets, rows_of_batch(batch, part.rows), tokenizer, columns)
        with together.check():
            teacher = by_name[part.teacher]
            report(_naming(teacher, answer_findings(looked, itself=teacher.is_student)))
    together.done()


def _gradients(
    trainer: GKDTrainerWithMetrics, batch: Batch, targets: AnyTargets | None, options: DistillationOptions
) -> TermGradients:
    def teacher_forward(rows: Batch) -> AnyTargets:
        if targets is not None:
            return targets
        assert trainer.teacher is not None
        trainer.teacher.prepare([rows])
        with teacher_autocast(trainer.accelerator):
            return trainer.teacher.targets(rows)

    with evaluating(trainer.model), torch.no_grad(), trainer.compute_loss_context_manager():
        return term_gradients(trainer._objective, trainer.model, batch, options, teacher_forward)


def _rows_with_images(trainer: GKDTrainerWithMetrics) -> Batch | None:
    batch = few_with_images(rows_to_look_at(trainer.train_dataset), trainer.data_collator, _ROWS_WITH_IMAGES)
    return None if batch is None or not int(batch.num_supervised) else _received(trainer, batch)


def _received(trainer: GKDTrainerWithMetrics, batch: Batch) -> Batch:
    received = trainer.receiver.accept(trainer._prepare_inputs(batch))
    refuse_width(trainer._positions, received)
    trainer.receiver.check_ids(received)
    return received


def _on_any_rank(trainer: GKDTrainerWithMetrics, own: bool) -> bool:
    return bool(trainer.accelerator.gather(torch.tensor([own], device=trainer.accelerator.device)).any())
