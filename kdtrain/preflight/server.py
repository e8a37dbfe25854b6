"""Whether a teacher's server can be trusted, asked once before the first step: by one rank, for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from kdtrain.preflight.model_checks import report
from kdtrain.ranks import is_main
from kdtrain.teachers.served import ServedTeacher
from kdtrain.teachers.server_probe import ProbeResult, probe

logger = logging.getLogger(__name__)

_LOOKED_AT, _FEW, _ENOUGH = 64, 3, 16


def check_server(
    teacher: ServedTeacher,
    rows: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    scores: bool,
    writes: bool,
    tokens: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Find out what the server does, and set the teacher by it; a collective.

    Args:
        rows: of `rows_to_ask_about`.
        tokenizer: the one that they were encoded with.
        scores: whether the run needs targets.
        writes: whether it needs answers.
        tokens: that the run will ask about, for an estimate of its time.
        chat_template_kwargs: as conversations are rendered for the teacher.

    Raises:
        PreflightError: the run would fail, or train on wrong targets.
    """

    options = {"scores": scores, "writes": writes}
    result = _by_one_rank(
        lambda: ask_server(
            teacher, rows, tokenizer, **options, tokens=tokens, chat_template_kwargs=chat_template_kwargs
        )
    )
    settle(teacher, result)
    _report(teacher, result)


def ask_server(teacher: ServedTeacher, rows: Sequence[Sequence[int]], tokenizer: Any, **options: Any) -> ProbeResult:
    """As `probe`, also with a processor in place of its tokenizer."""
    return probe(teacher, rows, getattr(tokenizer, "tokenizer", tokenizer), **options)


def _by_one_rank(ask: Callable[[], ProbeResult]) -> ProbeResult:
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
    found: ProbeResult = shared[0]
    return found


def settle(teacher: ServedTeacher, result: ProbeResult) -> None:
    """Let the teacher ask as the probe has found that it must."""
    teacher.route, teacher.api, teacher.writes_targets = result.route, result.api, result.writes_targets
    if result.fingerprint is not None:
        teacher.servers.verify = result.fingerprint.verifier(teacher)


def _report(teacher: ServedTeacher, result: ProbeResult) -> None:
    """Raise the errors, log the warnings, and what is well as one line."""
    well = [finding for finding in result.findings if finding.level == "info"]
    rest = [finding for finding in result.findings if finding.level != "info"]
    report(replace(one, message=f"{one.message}.", hint=f"{one.hint}." if one.hint else "") for one in rest)
    if is_main() and well:
        route = f"scored by {result.route}, {result.tokens_per_second:,.0f} tokens/s" if result.route else result.api
        logger.info(
            "Teacher %s: %s; %d things are as they should be (kdtrain validate --deep lists them).",
            teacher.model,
            route,
            len(well),
        )


def rows_to_ask_about(data: Any) -> list[list[int]]:
    """Token ids of a few rows as the teacher reads them, without images; of encoded rows.

    Args:
        data: has a column `input_ids`, and `teacher_input_ids` where the teacher reads other tokens.
    """
    known = getattr(data, "column_names", None) or ()
    columns = [name for name in ("input_ids", "teacher_input_ids", "images") if name in known]
    if "input_ids" not in columns:
        return []
    some = data.select_columns(columns)[:_LOOKED_AT]
    own = some.get("teacher_input_ids") or [None] * len(some["input_ids"])
    images = some.get("images") or [None] * len(some["input_ids"])
    rows = [list(other or ids) for ids, other, image in zip(some["input_ids"], own, images, strict=True) if not image]
    enough = [row for row in rows if len(row) >= _ENOUGH] or rows
    return [list(row) for row in dict.fromkeys(map(tuple, enough))][:_FEW]
