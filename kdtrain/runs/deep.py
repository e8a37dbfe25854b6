"""`validate --deep`: what only the world can tell about a config, without training and without the student's weights.

    the static check -> a few rows, encoded -> the teacher: its server asked, or its weights loaded -> its alignment

So far the teacher's part. What is not looked at yet is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoConfig
from trl.experimental.gkd import GKDConfig

from kdtrain.config import RunConfig
from kdtrain.config.adapters import adapter_base, is_adapter_folder
from kdtrain.config.arguments import build_train_arguments
from kdtrain.config.tree import KeyPath, Problem
from kdtrain.data import Collator, build_dataset
from kdtrain.errors import KdtrainError, VocabularyError
from kdtrain.models.probe import OPTION_OF
from kdtrain.models.processing import load_processing
from kdtrain.preflight.alignment import check_alignment, few_rows
from kdtrain.preflight.server import ask_server, row_with_image, rows_to_ask_about, settle
from kdtrain.runs.build import teacher_side
from kdtrain.runs.read_data import encoding_options, sources_of
from kdtrain.teachers import Teacher, teacher_autocast
from kdtrain.teachers.served import ServedTeacher

_FIRST_ROWS = 64  # of each source
_ANY_NUMBER = 10**9
_NOT_YET = Problem(
    (),
    "Not looked at: the student's weights, rows beyond the first, images, memory, disk",
    "kdtrain fit CONFIG --dry-run builds everything, and runs one window",
    "info",
)
_NO_TEACHER = Problem(("rlhf", "llm_kd_weight"), "No teacher is asked in this run", level="info")


class _Stopped(Exception):
    """What comes next needs what has failed."""


def deep_findings(config: RunConfig) -> list[Problem]:
    """What is found out about a config that the static check has passed.

    Returns:
        errors with which `fit` would stop, warnings, and level "info" for what is as it should be.
    """
    if not config.asks_teacher:
        return [_NO_TEACHER, _NOT_YET]
    findings: list[Problem] = []
    with suppress(_Stopped):
        _look(config, build_train_arguments(config).training_args, findings)
    return [*findings, _NOT_YET]


def _look(config: RunConfig, args: GKDConfig, findings: list[Problem]) -> None:
    with _as_finding(findings, OPTION_OF["student"]):
        processing = load_processing(
            config.model.model,
            trust_remote_code=config.model.trust_remote_code,
            revision=config.model.revision,
            processor_kwargs=config.data.processor_kwargs,
            side="student",
        )
        size = _vocabulary_size(config)
    with _as_finding(findings, ("data", "train")):
        data = _first_rows(config, args, processing)
    served = config.rlhf.teacher.is_served
    with ExitStack() as at_the_end:
        with _as_finding(findings, ("rlhf", "teacher", "base_url") if served else OPTION_OF["teacher"]):
            teacher = teacher_side(config, args, processing, size)
            assert teacher.teacher is not None
            at_the_end.callback(teacher.teacher.close)
        collator = Collator(processing, teacher.processing)
        if isinstance(teacher.teacher, ServedTeacher):
            with _as_finding(findings, ("rlhf", "teacher", "base_url")):
                _ask(config, args, teacher.teacher, collator, data, findings)
        if config.options.lm_kd_active and not any(finding.level == "error" for finding in findings):
            _align(args, teacher.teacher, collator, data, findings)


@contextmanager
def _as_finding(findings: list[Problem], option: KeyPath) -> Iterator[None]:
    """An error of ours as a finding about an option; what follows needs what was not built."""
    try:
        yield
    except KdtrainError as error:
        where = OPTION_OF["teacher"] if isinstance(error, VocabularyError) else option
        findings.append(Problem(where, str(error).removesuffix(".")))
        raise _Stopped from None


def _vocabulary_size(config: RunConfig) -> int:
    """Columns of the student's logits, as its config says."""
    name = config.model.model
    found = AutoConfig.from_pretrained(
        adapter_base(name) if is_adapter_folder(name) else name,
        trust_remote_code=config.model.trust_remote_code,
        revision=config.model.revision,
    )
    return int(found.get_text_config().vocab_size)


def _first_rows(config: RunConfig, args: GKDConfig, processing: Any) -> Any:
    """Some encoded training rows; bad ones are left out, which `kdtrain preview` shows."""
    sources = [
        replace(source, limit=_FIRST_ROWS if source.limit is None else min(source.limit, _FIRST_ROWS))
        for source in sources_of(config.data.train)
    ]
    options = encoding_options(config, args.seed, "train")
    return build_dataset(sources, processing, new_parts=True, max_bad_rows=_ANY_NUMBER, **options)[0]


def _ask(
    config: RunConfig, args: GKDConfig, teacher: ServedTeacher, collator: Collator, data: Any, findings: list[Problem]
) -> None:
    """What the server does; the teacher then asks as the run would."""
    rows = rows_to_ask_about(data)
    steps = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    mean = sum(map(len, rows)) / max(len(rows), 1)
    result = ask_server(
        teacher,
        rows,
        collator.processing_class,
        scores=config.options.lm_kd_active,
        writes=config.answers_from_teacher or config.rlhf.seq_kd,
        tokens=round(mean * steps * (config.launch.num_processes or 1)) if steps > 0 else None,
        chat_template_kwargs={**config.data.chat_template_kwargs, **config.rlhf.teacher.chat_template_kwargs},
        teacher_processing=collator.teacher_processing_class,
        image_row=row_with_image(data, collator) if config.options.lm_kd_active else None,
    )
    findings += result.findings
    settle(teacher, result)


def _align(args: GKDConfig, teacher: Teacher, collator: Collator, data: Any, findings: list[Problem]) -> None:
    """Whether the teacher's targets stand at the right tokens."""
    batch = few_rows(data, collator, args.per_device_train_batch_size)
    option = ("rlhf", "teacher", "base_url") if teacher.module is None else OPTION_OF["teacher"]
    if batch is None:
        message = "Whether its targets stand at the right tokens is not known: the first rows have no answers"
        findings.append(Problem(option, message, level="info"))
        return
    with _as_finding(findings, option):
        accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=args.mixed_precision)
        teacher.place(accelerator)
        with torch.no_grad(), teacher_autocast(accelerator):
            findings += [
                replace(finding, message=finding.message.removesuffix("."), hint=finding.hint.removesuffix("."))
                for finding in check_alignment(teacher, batch.to(accelerator.device), option=option)
            ]
