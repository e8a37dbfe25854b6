"""What config and device led to: the table at the start of a run."""

from __future__ import annotations

from pathlib import Path

from kdtrain.config import RunConfig
from kdtrain.config.in_words import divergence_in_words
from kdtrain.data import BuildReport
from kdtrain.models.parts import count_parameters, trained_parts
from kdtrain.models.quantization import weight_types
from kdtrain.runs.checkpoints import steps_done
from kdtrain.teachers import CachedTeacher, MixedTeacher, SelfTeacher, ServedTeacher, Teacher
from kdtrain.teachers.several import SeveralTeachers
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.row_order import planned_steps, rows_per_batch

_PARTS = {"llm": "language model", "vit": "vision encoder", "aligner": "aligner"}

_WEIGHTS = {"base": "its adapter off", "live": "as it is at each step", "ema": "a moving average of what is trained"}


def plan(
    trainer: GKDTrainerWithMetrics, config: RunConfig, report: BuildReport, checkpoint: Path | None = None
) -> dict[str, str]:
    """The table's rows, name to text; of a run that goes on from a checkpoint, if one is given."""
    args, ranks = trainer.args, trainer.accelerator.num_processes
    total, trainable = count_parameters(trainer.model)
    rows = rows_per_batch(trainer) * args.gradient_accumulation_steps
    tokens = report.total_tokens / report.rows_per_epoch
    steps, per_epoch = planned_steps(trainer, report.rows_per_epoch)
    length = f"{steps:,}, {steps / per_epoch:.2f} epochs of {report.rows_per_epoch:,} rows"
    if report.streamed:
        length = f"{steps:,}, of {steps * rows:,} rows of a stream, whose end is not known"
    if checkpoint is not None:
        length = f"{trainer.rows.last_step(checkpoint):,}, of which {steps_done(checkpoint):,} are done"
    plan = {
        "student": f"{config.model.model}: {total:,} parameters, {trainable:,} trained, {weight_types(trainer.model)}",
        "teacher": "none" if trainer.teacher is None else _describe_teacher(trainer, config),
        "loss": _describe_loss(trainer, config),
        "answers": _describe_answers(trainer, config),
        "step": f"{rows} rows = {args.per_device_train_batch_size} x {args.gradient_accumulation_steps} accumulated x "
        f"{ranks} {'process' if ranks == 1 else 'processes'}, about {rows * tokens:,.0f} tokens",
        "steps": length,
        "device": _describe_device(trainer),
        "output": str(config.training["output_dir"]),
    }
    if trainer.options.crosses_tokenizers:
        plan["tokenizers"] = _describe_alignment(trainer)
    if trained := trained_parts(trainer.model):
        plan["trained"] = ", ".join(f"{_PARTS[part]} {count:,}" for part, count in trained.items())
    vocabulary = trainer.vocabulary
    if vocabulary is not None and vocabulary.student != vocabulary.teacher:
        plan["vocabulary"] = f"{vocabulary.shared:,} shared, padding beyond it left out"
    return plan


def _describe_teacher(trainer: GKDTrainerWithMetrics, config: RunConfig) -> str:
    teacher = trainer.teacher
    assert teacher is not None
    if not isinstance(teacher, SeveralTeachers):
        return _describe_one(teacher, config)
    shares = dict(zip(teacher.by_name, teacher.shares, strict=True)) if isinstance(teacher, MixedTeacher) else {}
    described = []
    for name, one in teacher.by_name.items():
        share = f" ({shares[name]:.0%})" if shares else ""
        described.append(f"{name}{share}: {_describe_one(one, config.of_teacher(name))}")
    how = "the mean of all" if shares else "each row's own"
    return f"{how}; {'; '.join(described)}"


def _describe_one(teacher: Teacher, config: RunConfig) -> str:
    if isinstance(teacher, ServedTeacher):
        where = ", ".join(teacher.servers.urls)
        return f"{teacher.model} at {where}, its {teacher.top_k} most likely tokens"
    if isinstance(teacher, CachedTeacher):
        form = teacher.reader.form
        what = {
            "topk": f"the {form.entries} most likely tokens",
            "sample": f"{form.entries} draws at temperature {form.temperature:g}",
            "hidden": f"hidden states, {form.hidden_dtype}",
            "chunks": "log-likelihoods of chunks of text",
        }
        return f"the cache {teacher.folder}: {what[form.mode]}; no model is loaded"
    if isinstance(teacher, SelfTeacher):
        return f"the student itself, {_WEIGHTS[teacher.weights]}"
    if teacher.module is None:
        return type(teacher).__name__
    parameters, _ = count_parameters(teacher.module)
    described = f"{config.rlhf.teacher_model}: {parameters:,} parameters, {weight_types(teacher.module)}"
    placement = config.rlhf.teacher.placement
    return described if placement == "auto" else f"{described}, {placement}"


def _describe_loss(trainer: GKDTrainerWithMetrics, config: RunConfig) -> str:
    options = trainer.options
    terms = []
    if options.lm_kd_active:
        what = options.cross_tokenizer or divergence_in_words(config)
        terms.append(f"{options.llm_kd_weight:g} x {what}")
    if options.ce_weight > 0:
        terms.append(f"{options.ce_weight:g} x cross-entropy")
    if options.visual_kd is not None:
        terms.append(f"{options.visual_kd.weight:g} x visual ({', '.join(options.visual_kd.targets)})")
    if (hidden := trainer.hidden) is not None:
        terms.append(f"{hidden.options.weight:g} x hidden states, {hidden.options.distance} of {hidden.in_words}")
    return " + ".join(terms)


def _describe_alignment(trainer: GKDTrainerWithMetrics) -> str:
    found = trainer.alignment_of_rows
    if found is None or not found.chunks:
        return "two, no answer of the first rows is in both"
    return (
        f"two: {found.share:.1%} of the answers' bytes aligned (of the worst row {found.worst:.1%}), {found.chunks:,} "
        f"chunks of {found.tokens_of_a_chunk()}, in {found.rows:,} rows"
    )


def _describe_answers(trainer: GKDTrainerWithMetrics, config: RunConfig) -> str:
    data = "the data, and the teacher's where a source says so" if config.answers_from_teacher else "the data"
    if not trainer.options.lm_kd_active:
        return f"from {data}"
    rest = "the teacher" if trainer.seq_kd else data
    student = f"from the student{_describe_samples(trainer)}"
    if trainer.lmbda in (0, 1):
        return student if trainer.lmbda else f"from {rest}"
    return f"{trainer.lmbda:.0%} of steps {student}, the others from {rest}"


def _describe_samples(trainer: GKDTrainerWithMetrics) -> str:
    options = trainer.options
    number = f", {options.samples_per_prompt} to each prompt" if options.samples_per_prompt > 1 else ""
    kept = ", those that match the row's answer" if options.select_regex is not None else ""
    select = {"all": "", "best": ", the best of them trains", "weighted": ", weighted by the teacher"}[options.select]
    return f"{number}{kept}{select if number else ''}"


def _describe_device(trainer: GKDTrainerWithMetrics) -> str:
    accelerator = trainer.accelerator
    kind = f" ({accelerator.distributed_type.value.lower()})" if accelerator.num_processes > 1 else ""
    precision = accelerator.mixed_precision
    return f"{accelerator.device}{kind}, " + ("no mixed precision" if precision == "no" else f"mixed {precision}")
