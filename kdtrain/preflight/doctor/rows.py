"""What the encoded rows say: whether what is evaluated on was trained on, and how much of the data is not there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress

import datasets

from kdtrain.config.tree import KeyPath, Problem
from kdtrain.data.dataset import BuildReport
from kdtrain.data.row_key import row_keys

# Shares of the tokens, the rows and the answers above which something is said as a warning.
_MUCH_CUT, _MANY_DROPPED, _MANY_ENDLESS, _MANY_REPEATED = 0.05, 0.2, 0.5, 0.01
_TEXT = ("input_ids", "labels")


def row_findings(report: BuildReport, option: KeyPath, max_length: int, *, generated: bool) -> list[Problem]:
    """What became of the rows of one split.

    Args:
        report: of `build_dataset`.
        option: that names them.
        generated: whether other answers take the place of the rows' own.
    """
    return [*_cut(report, option, max_length), *_supervised(report, option, generated), *_ends(report, option)]


def _cut(report: BuildReport, option: KeyPath, max_length: int) -> Iterator[Problem]:
    if not report.tokens_cut:
        return
    share = report.tokens_cut / max(report.tokens_read, 1)
    rows = report.dropped / max(report.dropped + report.rows_kept, 1)
    message = (
        f"data.max_length ({max_length}) takes {share:.1%} of the tokens away: {report.truncated} rows of "
        f"{_name(option)} are cut, {report.dropped} dropped; the longest has {report.longest} tokens."
    )
    much = share >= _MUCH_CUT or rows >= _MANY_DROPPED
    hint = "Raise data.max_length, or split long rows."
    if report.truncated:
        hint = f"A cut answer has no end, and the student does not learn to stop. {hint}"
    else:
        hint = (
            f"That is what data.on_overlength: drop asks for. If these rows should train: {hint[0].lower()}{hint[1:]}"
        )
    yield Problem(("data", "max_length"), message, hint if much else "", level="warning" if much else "info")


def _supervised(report: BuildReport, option: KeyPath, generated: bool) -> Iterator[Problem]:
    if report.supervised_tokens or generated or report.teacher_answer_rows:
        return
    message = f"No token of {_name(option)} is supervised: {report.rows_kept} rows, and none has an answer to learn."
    hint = "Give the rows answers, have the teacher write them (answers: teacher), or the student (rlhf.lmbda: 1)."
    yield Problem(option, message, hint)


def _ends(report: BuildReport, option: KeyPath) -> Iterator[Problem]:
    answered = report.rows_kept - report.plain_text_rows - report.prompt_only_rows
    if answered <= 0 or report.unterminated_rows < _MANY_ENDLESS * answered:
        return
    message = (
        f"{report.unterminated_rows} of {answered} answers of {_name(option)} end without a token that ends a turn: "
        "the student will not learn to stop."
    )
    hint = "Raise data.max_length where answers are cut, or use a chat template that ends the assistant's turn."
    yield Problem(option, message, hint, level="warning")


def _name(option: KeyPath) -> str:
    return ".".join(map(str, option))


# ---- rows that are evaluated on and trained on -----------------------------------------------------------------------


def repeated_findings(train: datasets.Dataset, evaluation: datasets.Dataset | None) -> list[Problem]:
    """Rows of the evaluation that are trained on word for word, images included."""
    if evaluation is None or not {*_TEXT} <= {*train.column_names} & {*evaluation.column_names}:
        return []
    repeated = _repeated(train, evaluation)
    if not repeated:
        return []
    share = repeated / len(evaluation)
    message = (
        f"{repeated} of {len(evaluation)} rows of data.eval ({share:.1%}) are rows of data.train word for word: "
        "evaluation is on what was trained on."
    )
    hint = "Take them out of one of the two, or hold rows out by content: data.eval: 5%."
    level = "warning" if share >= _MANY_REPEATED else "info"
    return [Problem(("data", "eval"), message, hint, level=level)]  # type: ignore[arg-type]


def _repeated(train: datasets.Dataset, evaluation: datasets.Dataset) -> int:
    """How many rows; images are compared only where the text is the same, for their bytes take time."""
    alike = _same(train.select_columns(_TEXT), evaluation.select_columns(_TEXT))
    if "images" not in train.column_names or "images" not in evaluation.column_names or not any(alike):
        return sum(alike)
    texts = {*row_keys(evaluation.select_columns(_TEXT).select(list(compress(range(len(alike)), alike))))}
    twins = [i for i, key in enumerate(row_keys(train.select_columns(_TEXT))) if key in texts]
    columns = [*_TEXT, "images"]
    some = evaluation.select(list(compress(range(len(alike)), alike)))
    return sum(_same(train.select(twins).select_columns(columns), some.select_columns(columns)))


def _same(train: datasets.Dataset, evaluation: datasets.Dataset) -> list[bool]:
    """Which rows of the evaluation are among those of training."""
    own = list(row_keys(evaluation))
    trained = {*own} & {*row_keys(train)}
    return [key in trained for key in own]
