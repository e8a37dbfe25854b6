"""What is asked of both models before the first step, in the order in which it is paid for.

Their configs say what kind they are (`models/kinds.py`, before weights are loaded). Then come a forward on a few
tokens, the lengths of the rows, one image, and for a model that will generate a short answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from kdtrain.config.tree import Problem
from kdtrain.data.collate import Collator
from kdtrain.data.multimodal import multimodal
from kdtrain.data.with_images import first_row_with_images
from kdtrain.errors import PreflightError
from kdtrain.generation.generate import refuse_marked_answers
from kdtrain.generation.padding import who_shares_a_batch
from kdtrain.models import probe
from kdtrain.models.pieces import runs_on
from kdtrain.preflight.findings import Together, report
from kdtrain.preflight.positions import RowLengths, length_findings, rope_findings
from kdtrain.ranks import is_main

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedModel:
    """One of the two models."""

    name: probe.Side
    model: PreTrainedModel
    """Not wrapped; of a PEFT model its base."""
    look: probe.TextLook
    """Its positions are those behind the virtual tokens."""
    processing: PreTrainedTokenizerBase | ProcessorMixin | None = None
    """Its tokenizer or processor, where it is known."""
    virtual: int = 0
    """Tokens that prompt learning puts before each row."""


def both_sides(
    student: PreTrainedModel | PeftModel, teacher: Any, collator: Any, teacher_model: Any = None
) -> list[CheckedModel]:
    """The student, and the teacher where it is a model in this process.

    Args:
        collator: knows the processors, if it is a `Collator` of this package.
        teacher_model: the teacher's module as it was before it was wrapped; None is as it is.
    """
    known = isinstance(collator, Collator)
    processing = collator.processing_class if known else None
    base = student.get_base_model() if is_peft_model(student) else student
    sides = [_checked("student", base, probe.look_at_text(base, "student"), processing, student)]
    return sides + teacher_side_checks(teacher, collator, teacher_model)


def teacher_side_checks(teacher: Any, collator: Any, teacher_model: Any = None) -> list[CheckedModel]:
    """The teacher alone, where it is a model in this process; arguments as of `both_sides`."""
    if teacher is None or not isinstance(getattr(teacher, "look", None), probe.TextLook):
        return []
    known = isinstance(collator, Collator)
    of_teacher = (collator.teacher_processing_class or collator.processing_class) if known else None
    model = teacher.module if teacher_model is None else teacher_model
    return [_checked("teacher", model, teacher.look, of_teacher, model)]


def _checked(
    name: probe.Side, base: PreTrainedModel, look: probe.TextLook, processing: Any, tuned: Any
) -> CheckedModel:
    config = tuned.active_peft_config if is_peft_model(tuned) else None
    virtual = config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0
    if look.positions is not None:
        look = replace(look, positions=look.positions - virtual)
    return CheckedModel(name, base, look, processing, virtual)


def check_models(
    sides: Sequence[CheckedModel],
    rows: Sequence[RowLengths],
    collator: Any,
    train: Any,
    *,
    generating: Sequence[nn.Module],
    only_errors: bool = False,
    is_sharded: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Warn of what will be worse than it looks, and refuse what would end the run or make its numbers wrong.

    Beside the look at a text it costs a forward on one row with an image, and all that is found is one list; of models
    that will write answers, a few tokens of them more.

    Args:
        train: where a row with an image is looked for; None where there is no data yet.
        generating: the models that will write answers.
        only_errors: both models are checked again later, when more is known.
        is_sharded: FSDP or DeepSpeed will wrap the models: no image is tried.
        autocast: what training runs forwards in.
    """
    for model in generating:
        refuse_marked_answers(model)
    multiple = getattr(collator, "pad_to_multiple_of", None)
    findings, sound = [], []
    for side in sides:
        read = [some for some in rows if some.side in (None, side.name)]
        own = [*side.look.findings, *length_findings(side, read, multiple), *rope_findings(side, read)]
        findings += own
        if all(finding.level != "error" for finding in own):
            sound.append(side)
    together = Together()
    with together.check():
        report(finding for finding in findings if finding.level == "error" or not only_errors)
    unseen = dict.fromkeys(side.name for side in sides if not side.look.looked)  # of several teachers once
    if unseen and is_main():
        logger.warning(
            "Not looked at, since ZeRO-3 has the models in pieces: whether %s honour padding, or see the tokens that "
            "they have to predict.",
            " and ".join(unseen),
        )
    can_run = not is_sharded and not unseen
    if can_run and train is not None and isinstance(collator, Collator):
        row = first_row_with_images(train, collator)
        if row is not None:
            with together.check(), autocast():
                report(finding for side in sound for finding in image_findings(side, collator, row))
    together.done()
    if not can_run:
        return
    for model in generating:
        who_shares_a_batch(model, runs_on(model))


def image_findings(side: CheckedModel, collator: Collator, row: Mapping[str, Any]) -> list[Problem]:
    """One image through a model, as its own processor prepares it: what does not fit is named with its side.

    Args:
        row: of the data, with an image.
    """
    model, option = side.model, probe.OPTION_OF[side.name]
    processor = multimodal(side.processing)
    if processor is None:  # a tokenizer: its model reads text
        return []
    try:
        inputs = collator.prepared_by(side.processing, row)
    except PreflightError as error:
        message = f"The {side.name}'s processor ({probe.name_of(model)}) cannot prepare an image: {error}"
        return [Problem(option, message)]
    device = runs_on(model)
    ids = torch.tensor([inputs.ids])
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs.token_tensors, **inputs.visual}
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    says = probe.as_preflight_error("the model says")
    try:
        with probe.evaluating(model), probe.own_random_state(device), says:
            model(**moved, use_cache=False)
        return []
    except PreflightError as error:
        model_says = str(error)
    image_tokens = sum(i in processor.image_ids for i in inputs.ids)
    made = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.visual.items())
    vision = getattr(model.config, "vision_config", None)
    sizes = {name: getattr(vision, name, None) for name in ("image_size", "patch_size", "spatial_merge_size")}
    expected = ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None)
    message = (
        f"The {side.name}'s processor does not fit the {side.name} ({probe.name_of(model)}): for a row with an image "
        f"the processor makes {made} and {image_tokens} image tokens, and {model_says} Its sizes: "
        f"{expected or 'unknown'}."
    )
    hint = (
        "Put the processor files (preprocessor_config.json, processor_config.json) of the model that the folder came "
        "from into it."
    )
    return [Problem(option, message, hint)]
