"""`seq_kd` by a teacher that has no model in this process: each row's answer is asked for by `Teacher.write`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kdtrain.data.batch import Batch
from kdtrain.errors import PreflightError, TeacherError
from kdtrain.generation.generate import prompts_of, row_seeds, with_completions
from kdtrain.teachers.base import Prompt, Sampling, Teacher, Written


def answered_by(
    teacher: Teacher, batches: Sequence[Batch], sampling: Sampling, *, seed: str, pad_id: int, multiple: int | None
) -> list[Batch]:
    """The batches with the teacher's answers, which are all asked for together.

    Args:
        seed: what the seed of each answer is made of, beside its row. So an answer depends neither on the other rows
            nor on the rank that asks for it.
        pad_id, multiple: see `with_completions`.

    Raises:
        TeacherError: no usable answer.
    """
    new = [batch for batch in batches if not batch.all_repeated]
    asked = [prompt for pair in zip(new, row_seeds(new, seed), strict=True) for prompt in _prompts(*pair)]
    answers = iter(teacher.write(asked, sampling) if asked else ())
    return [batch if batch.all_repeated else _answered(batch, answers, pad_id, multiple) for batch in batches]


def _prompts(batch: Batch, seeds: Sequence[int]) -> list[Prompt]:
    if batch.has_images:
        raise PreflightError(
            "seq_kd: a batch has images, and a served teacher is asked for answers to tokens alone. Use "
            "rlhf.teacher.backend: hf, data without images, or rlhf.seq_kd: false."
        )
    prompts = prompts_of(batch.as_teacher_sees_it())
    return [Prompt(ids, one) for ids, one in zip(prompts, seeds, strict=True)]


def _answered(batch: Batch, answers: Iterator[Written], pad_id: int, multiple: int | None) -> Batch:
    written = [next(answers) for _ in range(len(batch))]
    for row, one in enumerate(written):
        if one.refused is not None:
            raise TeacherError(f"The teacher has no answer to row {batch.rows.name(row)}: {one.refused}.")
    ids, cut = [one.ids for one in written], [one.cut for one in written]
    return replace(with_completions(batch, ids, pad_id, multiple, cut=cut), generated_by="teacher")
