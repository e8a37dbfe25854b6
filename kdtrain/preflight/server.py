"""Whether a teacher's server can be trusted, asked once before the first step: by one rank, for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from kdtrain.data.collate import Collator
from kdtrain.data.with_images import first_batch_with_images
from kdtrain.losses.reduce import IGNORE_INDEX
from kdtrain.preflight.findings import is_listing, report
from kdtrain.ranks import is_main
from kdtrain.teachers.served.images import ImageRow
from kdtrain.teachers.served.probe import ProbeResult, probe
from kdtrain.teachers.served.teacher import ServedTeacher, rows_to_score

logger = logging.getLogger(__name__)

_LOOKED_AT, _FEW, _ENOUGH = 64, 3, 16
_Found = TypeVar("_Found")


def check_server(
    teacher: ServedTeacher,
    rows: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    scores: bool,
    writes: bool,
    tokens: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    teacher_processing: Any = None,
    image_row: ImageRow | None = None,
) -> None:
    """Find out what the server does, and set the teacher by it; a collective.

    Args:
        rows: of `rows_to_ask_about`.
        tokenizer: the one that they were encoded with.
        scores: whether the run needs targets.
        writes: whether it needs answers.
        tokens: that the run will ask about, for an estimate of its time.
        chat_template_kwargs: as conversations are rendered for the teacher.
        teacher_processing: what the config names as the teacher's tokenizer.
        image_row: of `row_with_image`.

    Raises:
        PreflightError: the run would fail, or train on wrong targets.
    """

    options = {
        "scores": scores,
        "writes": writes,
        "tokens": tokens,
        "chat_template_kwargs": chat_template_kwargs,
        "teacher_processing": teacher_processing,
        "image_row": image_row,
    }
    result = by_one_rank(lambda: ask_server(teacher, rows, tokenizer, **options))
    settle(teacher, result)
    _report(teacher, result)


def ask_server(
    teacher: ServedTeacher,
    rows: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    teacher_processing: Any = None,
    **options: Any,
) -> ProbeResult:
    """As `probe`, also with processors in place of their tokenizers."""
    own, other = (getattr(one, "tokenizer", one) for one in (tokenizer, teacher_processing))
    return probe(teacher, rows, own, teacher_tokenizer=other, **options)


def by_one_rank(ask: Callable[[], _Found]) -> _Found:
    """The result of rank 0, or its error, on all ranks: none of them may wait for one that has failed."""
    shared: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            shared = [ask()]
        except Exception as error:
            shared = [error]
    if PartialState().num_processes > 1:
        broadcast_object_list(shared)
    if isinstance(shared[0], Exception):
        raise shared[0]
    found: _Found = shared[0]
    return found


def settle(teacher: ServedTeacher, result: ProbeResult) -> None:
    """Let the teacher ask as the probe has found that it must."""
    teacher.route, teacher.api, teacher.writes_targets = result.route, result.api, result.writes_targets
    if result.fingerprint is not None:
        teacher.servers.verify = result.fingerprint.verifier(teacher)


def _report(teacher: ServedTeacher, result: ProbeResult) -> None:
    """Raise the errors, log the warnings, and what is well as one line."""
    if is_listing():
        report(result.findings)
        return
    well = [finding for finding in result.findings if finding.level == "info"]
    rest = [finding for finding in result.findings if finding.level != "info"]
    report(replace(one, message=_ended(one.message), hint=_ended(one.hint[:1].upper() + one.hint[1:])) for one in rest)
    if is_main() and well:
        route = f"scored by {result.route}, {result.tokens_per_second:,.0f} tokens/s" if result.route else result.api
        logger.info(
            "Teacher %s: %s; %d checks of it are passed.",
            teacher.model,
            route,
            len(well),
        )


def _ended(text: str) -> str:
    """A finding's words, which stand alone in a list, as a sentence among others."""
    return text if not text or text.endswith((".", "?")) else f"{text}."


def rows_to_ask_about(data: Any) -> list[list[int]]:
    """Token ids of a few rows as the teacher reads them; of rows with images their answers alone. Of encoded rows.

    Args:
        data: has columns `input_ids` and `labels`, and `teacher_input_ids` where the teacher reads other tokens.
    """
    known = getattr(data, "column_names", None) or ()
    columns = [name for name in ("input_ids", "labels", "teacher_input_ids", "images") if name in known]
    if "input_ids" not in columns:
        return []
    some = data.select_columns(columns)[:_LOOKED_AT]
    rows = [_text_of({name: values[i] for name, values in some.items()}) for i in range(len(some["input_ids"]))]
    enough = [row for row in rows if len(row) >= _ENOUGH] or rows
    return [list(row) for row in dict.fromkeys(map(tuple, enough))][:_FEW]


def rows_for_other(data: Any, collator: Collator) -> list[list[int]]:
    """The same for a teacher with another tokenizer: a few rows in its tokens."""
    if "input_ids" not in (getattr(data, "column_names", None) or ()):
        return []
    tokens = collator([data[i] for i in range(min(len(data), _FEW))]).teacher_tokens
    assert tokens is not None
    return [ids[mask.bool()].tolist() for ids, mask in zip(tokens.input_ids, tokens.attention_mask, strict=True)]


def _text_of(row: Mapping[str, Any]) -> list[int]:
    if row.get("images"):
        return [label for label in row["labels"] if label != IGNORE_INDEX]
    return list(row.get("teacher_input_ids") or row["input_ids"])


def row_with_image(data: Any, collator: Any) -> ImageRow | None:
    """A row whose image the server must look at; None where there is none.

    Raises:
        PreflightError: such a row cannot be sent.
    """
    batch = first_batch_with_images(data, collator) if "images" in (getattr(data, "column_names", None) or ()) else None
    if batch is None:
        return None
    return next((row for row in rows_to_score(batch) if isinstance(row, ImageRow)), None)
