"""What is asked of both models before the first step, in the order in which it is paid for.

Their configs say what kind they are (`model_kinds.refuse_other_kinds`, before weights are loaded). Then come a forward
on a few tokens, the lengths of the rows, one image, and for a model that will generate a short answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from kdtrain.data.multimodal import Processed, multimodal
from kdtrain.errors import PreflightError
from kdtrain.feature_kd.images import first_row_with_images
from kdtrain.generation.generate import refuse_marked_answers
from kdtrain.generation.padding import who_shares_a_batch
from kdtrain.models.probe import (
    OPTION_OF,
    Side,
    TextLook,
    as_preflight_error,
    evaluating,
    look_at_text,
    name_of,
    own_random_state,
)
from kdtrain.preflight.positions import Rows, length_findings, rope_findings
from kdtrain.ranks import is_main

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckedModel:
    """One of the two models.

    Attributes:
        name: "student" or "teacher".
        model: not wrapped; of a PEFT model its base.
        look: of `look_at_text`.
        processing: its tokenizer or processor, where it is known.
        virtual: tokens that prompt learning puts before each row: the look's positions are those behind them.
    """

    name: Side
    model: PreTrainedModel
    look: TextLook
    processing: PreTrainedTokenizerBase | ProcessorMixin | None = None
    virtual: int = 0


def both_sides(
    student: PreTrainedModel | PeftModel, teacher: Any, collator: Any, teacher_model: Any = None
) -> list[CheckedModel]:
    """The student, and the teacher where it is a model in this process.

    Args:
        student: not wrapped.
        teacher: a `Teacher`, or None.
        collator: knows the processors, if it is a `Collator` of this package.
        teacher_model: the teacher's module as it was before it was wrapped; None is as it is.
    """
    known = isinstance(collator, Collator)
    processing = collator.processing_class if known else None
    base = student.get_base_model() if is_peft_model(student) else student
    look, virtual = look_at_text(base, "student"), _virtual_tokens(student)
    sides = [CheckedModel("student", base, _behind(virtual, look), processing, virtual)]
    if teacher is not None and isinstance(getattr(teacher, "look", None), TextLook):
        of_teacher = (collator.teacher_processing_class or processing) if known else None
        model = teacher.module if teacher_model is None else teacher_model
        virtual = _virtual_tokens(model)
        sides.append(CheckedModel("teacher", model, _behind(virtual, teacher.look), of_teacher, virtual))
    return sides


def _virtual_tokens(model: PreTrainedModel | PeftModel) -> int:
    config = model.active_peft_config if is_peft_model(model) else None
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def _behind(virtual: int, look: TextLook) -> TextLook:
    return look if look.positions is None else replace(look, positions=look.positions - virtual)


def check_models(
    sides: Sequence[CheckedModel],
    rows: Sequence[Rows],
    collator: Any,
    train: Any,
    *,
    generating: Sequence[nn.Module] = (),
    only_errors: bool = False,
    in_pieces: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Warn of what will be worse than it looks, and refuse what would end the run or make its numbers wrong.

    Args:
        rows: of `rows_of_a_run` or `answered_rows`.
        train: where a row with an image is looked for; None where there is no data yet.
        generating: the models that will write answers.
        only_errors: there will be another look, which knows more.
        in_pieces: FSDP or DeepSpeed will wrap the models: no image is looked at.
        autocast: what training runs forwards in.

    Raises:
        PreflightError: all errors of a kind together.
        NotAvailableError: a model that will write answers cannot yet.
    """
    for model in generating:
        refuse_marked_answers(model)
    multiple = getattr(collator, "pad_to_multiple_of", None)
    findings = [finding for side in sides for finding in side.look.findings]
    for side in sides:
        findings += length_findings(side.model, side.name, side.look, rows, multiple, side.virtual)
        findings += rope_findings(side.model, side.name, rows)
    report(finding for finding in findings if finding.level == "error" or not only_errors)
    unseen = [side.name for side in sides if not side.look.looked]
    if unseen and is_main():
        logger.warning(
            "Not looked at, since ZeRO-3 has the models in pieces: whether %s honour padding, or see the tokens that "
            "they have to predict.",
            " and ".join(unseen),
        )
    if not in_pieces and not unseen:
        _check_images(sides, collator, train, autocast)
        for model in generating:
            who_shares_a_batch(model, next(model.parameters()).device)


def report(findings: Iterable[Problem]) -> None:
    """Log the warnings, on the main process, and raise the errors, all in one.

    Raises:
        PreflightError: there is an error among them.
    """
    errors = []
    for finding in dict.fromkeys(findings):
        text = f"{finding.message} {finding.hint}".strip()
        if finding.level == "error":
            errors.append(text)
        elif is_main():
            logger.warning(text)
    if errors:
        raise PreflightError("\n".join(errors))


# ---- images ----------------------------------------------------------------------------------------------------------


def _check_images(
    sides: Sequence[CheckedModel],
    collator: Any,
    train: Any,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Each model on a row with an image as its own processor prepares it, so that a misfit is named with its side."""
    row = None if train is None or not isinstance(collator, Collator) else first_row_with_images(train, collator)
    if row is None:
        return
    with autocast():
        report(finding for side in sides for finding in image_findings(side, collator, row))


def image_findings(side: CheckedModel, collator: Collator, row: Mapping[str, Any]) -> list[Problem]:
    """One image through a model, as its own processor prepares it: what does not fit is named with its side.

    Args:
        side: nothing is looked at where its processing is a tokenizer.
        collator: reads the images.
        row: of the data, with an image.
    """
    model, option = side.model, OPTION_OF[side.name]
    processor = multimodal(side.processing)
    if processor is None:
        return []
    try:
        inputs = collator.prepared_by(side.processing, row)
    except PreflightError as error:
        message = f"The {side.name}'s processor ({name_of(model)}) cannot prepare an image: {error}"
        return [Problem(option, message)]
    device = next(model.parameters()).device
    ids = torch.tensor([inputs.ids])
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs.token_tensors, **inputs.visual}
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    try:
        with evaluating(model), own_random_state(device), as_preflight_error("the model says"):
            model(**moved, use_cache=False)
    except PreflightError as error:
        tokens = sum(i in processor.image_ids for i in inputs.ids)
        return [_misfit(side, inputs, tokens, str(error))]
    return []


def _misfit(side: CheckedModel, inputs: Processed, image_tokens: int, model_says: str) -> Problem:
    made = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.visual.items())
    vision = getattr(side.model.config, "vision_config", None)
    sizes = {name: getattr(vision, name, None) for name in ("image_size", "patch_size", "spatial_merge_size")}
    expected = ", ".join(f"{name} {value}" for name, value in sizes.items() if value is not None)
    return Problem(
        OPTION_OF[side.name],
        f"The {side.name}'s processor does not fit the {side.name} ({name_of(side.model)}): for a row with an image "
        f"the processor makes {made} and {image_tokens} image tokens, and {model_says} Its sizes: "
        f"{expected or 'unknown'}.",
        "Put the processor files (preprocessor_config.json, processor_config.json) of the model that the folder came "
        "from into it.",
    )
