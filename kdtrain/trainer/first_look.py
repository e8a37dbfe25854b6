"""A few rows through both models, once, before the first step: what the doctor for distillation looks at.

Whether the teacher's targets stand at the right tokens, whether what it alone reads changes them, whether it has seen
the image, how well both know the rows, and how hard each term of the loss pulls. A teacher is asked for one batch, and
once more where that settles nothing; the student runs once, without a graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch, right_padded
from kdtrain.data.collate import Collator
from kdtrain.data.with_images import few_with_images
from kdtrain.errors import PreflightError, TeacherError
from kdtrain.models.probe import evaluating, own_random_state
from kdtrain.preflight.alignment import check_alignment, few_rows
from kdtrain.preflight.context import context_findings, look_at_context, rows_with_context
from kdtrain.preflight.doctor.answers import answer_findings, look_at_answers
from kdtrain.preflight.doctor.gradients import gradient_findings
from kdtrain.preflight.doctor.images import image_findings
from kdtrain.preflight.findings import Together, report
from kdtrain.preflight.other_tokenizer import look_at_rows
from kdtrain.preflight.positions import refuse_width
from kdtrain.teachers import Targets, teacher_autocast
from kdtrain.teachers.other_tokenizer import chunk_targets
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
            if batch is not None and targets is not None:
                with together.check():
                    _check_alignment(trainer, batch, targets)
            with together.check():
                _check_context(trainer)
            if batch is not None and targets is not None and trainer.options.crosses_tokenizers:
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


def _targets(trainer: GKDTrainerWithMetrics, batch: Batch) -> Targets | None:
    teacher = trainer.teacher
    if teacher is None or not trainer.options.lm_kd_active:
        return None
    teacher.prepare([batch])
    with teacher_autocast(trainer.accelerator), targets_named(trainer, batch):
        return teacher.targets(batch)


def _check_alignment(trainer: GKDTrainerWithMetrics, batch: Batch, targets: Targets) -> None:
    assert trainer.teacher is not None
    with teacher_autocast(trainer.accelerator):
        report(
            check_alignment(trainer.teacher, batch, targets=targets, any_rank=lambda own: _on_any_rank(trainer, own))
        )


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
    with teacher_autocast(trainer.accelerator):
        report(context_findings(look_at_context(teacher, batch, trainer._tokenizer)))


# ---- the doctor ------------------------------------------------------------------------------------------------------


def _consult(trainer: GKDTrainerWithMetrics, batch: Batch | None, targets: Targets | None) -> None:
    """What both models say of the rows, and how hard each term pulls; not of weights that FSDP or DeepSpeed hold in
    pieces, which run only when they are wrapped."""
    lacks_teacher = trainer.teacher is None and trainer.options.needs_teacher  # its first window says so
    if trainer.is_sharded or lacks_teacher:
        return
    with_images = None if trainer.train_dataset is None else _rows_with_images(trainer)
    together = Together()
    if with_images is not None and trainer.teacher is not None and trainer.options.lm_kd_active:
        with together.check(), teacher_autocast(trainer.accelerator):
            report(image_findings(trainer.teacher, with_images))
    if with_images is not None and trainer.visual is not None:
        batch, targets = with_images, None  # the visual term is compared with the others on the same rows
    if batch is not None:
        with together.check():
            _compare(trainer, batch, targets)
    together.done()


def _compare(trainer: GKDTrainerWithMetrics, batch: Batch, targets: Targets | None) -> None:
    options, teacher = trainer.options.checked(), trainer.teacher
    if options.hidden_kd is not None:
        targets = None  # the teacher runs again, for its features
    found = _gradients(trainer, batch, targets, options)
    trainer.first_gradients = found.norms
    compares = not options.crosses_tokenizers  # token by token
    if compares and found.student is not None and found.targets is not None and teacher is not None:
        assert trainer.vocabulary is not None
        looked = look_at_answers(found.student, found.targets, batch, trainer._tokenizer, trainer.vocabulary.shared)
        report(answer_findings(looked, itself=teacher.is_student))
    report(gradient_findings(found.norms, options, itself=teacher is not None and teacher.is_student))


def _gradients(
    trainer: GKDTrainerWithMetrics, batch: Batch, targets: Targets | None, options: DistillationOptions
) -> TermGradients:
    def teacher_forward(rows: Batch) -> Targets:
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
