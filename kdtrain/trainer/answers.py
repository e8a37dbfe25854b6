"""The answers of a window that is generated: who writes them, what they are drawn from, and in which batches they lie.

All prompts of the window are answered together, by the student or the teacher; what is done with the answers is not
known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from accelerate.utils import gather_object
from transformers import GenerationConfig
from trl.models.utils import unwrap_model_for_generation

from kdtrain.config.options import DistillationOptions
from kdtrain.data.batch import Batch
from kdtrain.data.other_tokenizer import OtherTokenizer
from kdtrain.data.regroup import dealt_by_length, rows_of
from kdtrain.data.stand_in import as_run
from kdtrain.generation.asking import answered_by
from kdtrain.generation.batching import Room
from kdtrain.generation.decode import NonFiniteLogits
from kdtrain.generation.generate import completions_of_window, prompts_of, row_seeds, with_completions
from kdtrain.generation.sampler import written_by
from kdtrain.generation.sampling import generation_config, student_generates, token_roles
from kdtrain.models.merging import merged
from kdtrain.models.switching import without_checkpointing
from kdtrain.teachers.base import Sampling, Teacher
from kdtrain.teachers.several import SeveralTeachers, rows_of_batch
from kdtrain.trainer.guard import nonfinite_while_writing
from kdtrain.trainer.selection import repeated
from kdtrain.trainer.teacher_failures import raised_on_all_ranks

if TYPE_CHECKING:
    from kdtrain.trainer.trainer import GKDTrainerWithMetrics

Writer = Literal["student", "teacher"]


def writer_of(trainer: GKDTrainerWithMetrics, options: DistillationOptions, step: int) -> Writer | None:
    """Who writes the answers of the window that follows `step` steps; None where they are the data's."""
    if not options.lm_kd_active:  # CE is not taught on the student's own answers, and visual KD compares no text
        return None
    if student_generates(trainer.args.seed, step, options.lmbda):
        return "student"
    return "teacher" if options.seq_kd else None


def answered(
    trainer: GKDTrainerWithMetrics, batches: list[Batch], writer: Writer, options: DistillationOptions
) -> list[Batch]:
    """The batches with the writer's answers: `samples_per_prompt` of the student's to each row."""
    if writer == "student":
        return generated(trainer, repeated(batches, options.samples_per_prompt), writer, options)
    assert trainer.teacher is not None, "seq_kd has asked for one"
    if not isinstance(trainer.teacher, SeveralTeachers):
        return _by_teacher(trainer, trainer.teacher, batches, options)
    return _by_several(trainer, trainer.teacher, batches, options)


def _by_teacher(
    trainer: GKDTrainerWithMetrics, teacher: Teacher, batches: list[Batch], options: DistillationOptions
) -> list[Batch]:
    """The batches with answers of one teacher."""
    if teacher.module is None:
        return _asked(trainer, teacher, batches, options)
    return generated(trainer, batches, "teacher", options, teacher)


def _by_several(
    trainer: GKDTrainerWithMetrics, several: SeveralTeachers, batches: list[Batch], options: DistillationOptions
) -> list[Batch]:
    """The batches with the answers of each row's own teacher. Every rank asks each of them, maybe about nothing."""
    pad_id, multiple = trainer._tokenizer.pad_token_id, trainer.args.pad_to_multiple_of
    of_rows = [several.rows(batch) for batch in batches]
    written: list[list[tuple[list[int], Batch]]] = [[] for _ in batches]
    for name, teacher in several.by_name.items():
        asked = [number for number, rows in enumerate(of_rows) if name in rows and not batches[number].all_repeated]
        own = [rows_of_batch(batches[number], of_rows[number][name]) for number in asked]
        for number, batch in zip(asked, _by_teacher(trainer, teacher, own, options), strict=True):
            written[number].append((of_rows[number][name], batch))
    return [
        batch if batch.all_repeated else _in_place(batch, some, pad_id, multiple)
        for batch, some in zip(batches, written, strict=True)
    ]


def _in_place(batch: Batch, written: list[tuple[list[int], Batch]], pad_id: int, multiple: int | None) -> Batch:
    """Rows that several teachers have answered, in the order that they had in their batch."""
    if len(written) == 1 and len(written[0][0]) == len(batch):
        return written[0][1]
    order = [row for rows, _ in written for row in rows]
    assert sorted(order) == list(range(len(batch))), "each row has a teacher"
    return rows_of([own for _, own in written], sorted(range(len(order)), key=order.__getitem__), pad_id, multiple)


def generated(
    trainer: GKDTrainerWithMetrics,
    batches: list[Batch],
    side: Writer,
    options: DistillationOptions,
    teacher: Teacher | None = None,
) -> list[Batch]:
    """The batches with answers that one of the models writes now, all of them together.

    Those that only fill up an epoch stay as they are. Sharded, they are written to as well, for the forwards that the
    other ranks need: with images where theirs have some.

    Args:
        teacher: who writes, of several; None is the one that there is.
    """
    teacher = trainer.teacher if teacher is None else teacher
    config = _generation_config(trainer, side, options, teacher)
    together = trainer.is_sharded or (side == "teacher" and trainer.asks_teacher_together)
    asked = batches if together else [batch for batch in batches if not batch.all_repeated]
    seeds = row_seeds(asked, f"{side}:{trainer.args.seed}:{trainer.state.global_step}")
    run = [as_run(batch) for batch in asked]
    seen = [batch.as_teacher_sees_it() if side == "teacher" else batch for batch in run]
    with _finite_on_all_ranks(trainer, side):
        if side == "student" and trainer.sampler is not None:
            written = written_by(trainer.sampler, seen, config, seeds)
        else:
            more = [[*of_rows, *[0] * (len(batch) - len(of_rows))] for of_rows, batch in zip(seeds, run, strict=True)]
            written = _written(trainer, side, seen, config, more, options.generation.batch_size, teacher)
    # Behind the prompts of both: what the writer saw is not what the other one reads.
    answers = iter([own[: len(batch)] for batch, own in zip(asked, written, strict=True) if not batch.all_repeated])
    return [
        batch if batch.all_repeated else _answered(trainer, batch, next(answers), config, side) for batch in batches
    ]


def _generation_config(
    trainer: GKDTrainerWithMetrics, side: Writer, options: DistillationOptions, teacher: Teacher | None
) -> GenerationConfig:
    vocabulary, own = trainer.vocabulary, options.generation
    assert vocabulary is not None, "LM KD has compared them"
    padding = range(vocabulary.shared, max(vocabulary.student, vocabulary.teacher))
    model = trainer.unwrap(_writing(trainer, side, teacher)[0])
    roles = token_roles(trainer.processing_class, model, padding, trainer.model.generation_config)
    narrowed: dict[str, Any] = {}
    if side == "student":
        narrowed = {"top_p": own.top_p, "top_k": own.top_k, "min_p": own.min_p}
    limit = new_tokens(trainer, options)
    return generation_config(roles.stop, roles.pad, options.temperature, limit, roles.forbidden, **narrowed)


def _writing(trainer: GKDTrainerWithMetrics, side: Writer, teacher: Teacher | None) -> tuple[Any, Any]:
    """The model that writes, and what accelerate has made of it."""
    if side == "student" or teacher is None or teacher.is_student:
        return trainer.model, trainer.model_wrapped
    return teacher.module, teacher.module


def _written(
    trainer: GKDTrainerWithMetrics,
    side: Writer,
    batches: Sequence[Batch],
    config: GenerationConfig,
    seeds: Sequence[Sequence[int]],
    batch_size: int | None,
    teacher: Teacher | None,
) -> list[list[list[int]]]:
    """What a model in this process writes to each row of each batch."""
    room = Room(batch_size, rows_if_unknown=trainer.args.per_device_train_batch_size)
    with_weights = nullcontext() if side == "student" or teacher is None else teacher.writing_model()
    wrapped = _writing(trainer, side, teacher)[1]
    with (
        with_weights,
        without_checkpointing(wrapped),
        unwrap_model_for_generation(wrapped, trainer.accelerator) as unwrapped,
    ):
        if not batches:
            return []
        rounds = trainer.is_sharded or trainer.accelerator.mixed_precision != "no"
        with nullcontext() if rounds else merged(unwrapped, config.max_new_tokens):
            return completions_of_window(unwrapped, batches, config, seeds=seeds, room=room)


def _answered(
    trainer: GKDTrainerWithMetrics,
    batch: Batch,
    written: Sequence[list[int]],
    config: GenerationConfig,
    side: Writer,
) -> Batch:
    stops = frozenset(config.eos_token_id or ())
    cut = [stops.isdisjoint(answer[-1:]) for answer in written]
    other, prompts = trainer.other_tokenizer, []
    if other is not None:  # the teacher reads the text of the answers
        prompts = prompts_of(batch.as_teacher_sees_it())
        batch = replace(batch, teacher_tokens=None)
    batch = with_completions(batch, written, config.pad_token_id, trainer.args.pad_to_multiple_of, cut=cut)
    if other is not None:
        assert isinstance(other, OtherTokenizer), "a cache has no targets for answers that do not exist yet"
        batch = other.with_completions(batch, prompts, written)
    return replace(batch, generated_by=side)


@contextmanager
def _finite_on_all_ranks(trainer: GKDTrainerWithMetrics, side: Writer) -> Iterator[None]:
    """Run what samples; a collective: a rank that fails is not waited for.

    Raises:
        NonFiniteError: a distribution was not finite, on this rank or another one; it names them.
    """
    failed = None
    try:
        yield
    except NonFiniteLogits as error:
        failed = error
    own = [] if failed is None else [{"rank": trainer.accelerator.process_index, **failed.facts, "where": str(failed)}]
    if bad := gather_object(own):
        where = bad[0]["where"].removeprefix("not finite: ")
        ranks = [{key: value for key, value in found.items() if key != "where"} for found in bad]
        raise nonfinite_while_writing(trainer, side, ranks, where) from failed


def _asked(
    trainer: GKDTrainerWithMetrics, teacher: Teacher, batches: list[Batch], options: DistillationOptions
) -> list[Batch]:
    """The batches with answers of a teacher that has no model in this process."""
    student: Any = trainer.unwrap(trainer.model)
    of_teacher: Any = getattr(trainer.data_collator, "teacher_processing_class", None)
    of_teacher = getattr(of_teacher, "tokenizer", of_teacher)  # all that is known of what ends its answers itself
    roles = token_roles(trainer.processing_class, student, (), of_teacher)
    limit = new_tokens(trainer, options)
    sampling = Sampling(options.temperature, limit, roles.stop, roles.forbidden, targets=True)
    with raised_on_all_ranks(trainer.accelerator), trainer.count_waiting():
        return answered_by(
            teacher,
            batches,
            sampling,
            seed=f"teacher:{trainer.args.seed}:{trainer.state.global_step}",
            pad_id=roles.pad,
            multiple=trainer.args.pad_to_multiple_of,
        )


def new_tokens(trainer: GKDTrainerWithMetrics, options: DistillationOptions) -> int:
    """Tokens that each answer of the next step may have."""
    return options.new_tokens(trainer.state.global_step, trainer.state.max_steps)


def dealt(trainer: GKDTrainerWithMetrics, batches: list[Batch]) -> list[Batch]:
    """The batches with rows of like length together, so that scoring and training do not pay for padding.

    Not images under FSDP and DeepSpeed, whose ranks have agreed on which batches have some.
    """
    if trainer.is_sharded and any(batch.has_images or batch.stand_in for batch in batches):
        return batches
    pad_id = trainer._tokenizer.pad_token_id
    return dealt_by_length(batches, pad_id, trainer.args.pad_to_multiple_of)
