"""What is asked of both models before the first step, in the order in which it is paid for.

Their config says what kind they are (`probe.refuse_other_kinds`, before weights are loaded). Then come a forward on a
few tokens, the lengths of the rows, one image, and for a model that will generate a short answer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn

from kdtrain.data.collate import Collator
from kdtrain.generation import refuse_marked_answers, who_shares_a_batch
from kdtrain.positions import Rows, length_findings, rope_findings
from kdtrain.probe import TextLook, look_at_image, look_at_text, report_findings
from kdtrain.ranks import is_main
from kdtrain.visual_term import first_row_with_images

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        name: "student" or "teacher".
        model: not wrapped; of a PEFT model its base.
        look: of `look_at_text`.
        processing: its tokenizer or processor, where it is known.
        virtual: tokens that prompt learning puts before each row: the look's positions are those behind them.
    """

    name: str
    model: Any
    look: TextLook
    processing: Any = None
    virtual: int = 0


def both_sides(student: Any, teacher: Any, collator: Any, teacher_model: Any = None) -> list[Side]:
    """The student, and the teacher where it is a model in this process.

    Args:
        student: not wrapped.
        teacher: a `Teacher`, or None.
        collator: knows the processors, if it is ours.
        teacher_model: the teacher's module as it was before it was wrapped; None is as it is.
    """
    ours = isinstance(collator, Collator)
    processing = collator.processing_class if ours else None
    base = student.get_base_model() if is_peft_model(student) else student
    look, virtual = look_at_text(base, "student"), _virtual_tokens(student)
    sides = [Side("student", base, _behind(virtual, look), processing, virtual)]
    if teacher is not None and isinstance(getattr(teacher, "look", None), TextLook):
        its = (collator.teacher_processing_class or processing) if ours else None
        model = teacher.module if teacher_model is None else teacher_model
        virtual = _virtual_tokens(model)
        sides.append(Side("teacher", model, _behind(virtual, teacher.look), its, virtual))
    return sides


def _virtual_tokens(model: Any) -> int:
    config = model.active_peft_config if is_peft_model(model) else None
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def _behind(virtual: int, look: TextLook) -> TextLook:
    return look if look.positions is None else replace(look, positions=look.positions - virtual)


def check_models(
    sides: Sequence[Side],
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
    report_findings(finding for finding in findings if finding.level == "error" or not only_errors)
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


def _check_images(
    sides: Sequence[Side], collator: Any, train: Any, autocast: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Each model on a row with an image as its own processor prepares it, so that a misfit is told with its side."""
    row = None if train is None or not isinstance(collator, Collator) else first_row_with_images(train, collator)
    if row is None:
        return
    with autocast():
        report_findings(
            finding
            for side in sides
            for finding in look_at_image(side.model, side.name, side.processing, collator, row)
        )
