"""What becomes of the findings of a preflight: a log, a list, or an error that names all that stops the run.

Checks do not know who asks. `kdtrain fit` logs warnings once and stops with every error of a stage in one numbered
list; `kdtrain validate --deep` lists everything with its place in the config.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from kdtrain.config.tree import KeyPath, Problem
from kdtrain.errors import KdtrainError, PreflightError, VocabularyError
from kdtrain.models.probe import OPTION_OF
from kdtrain.ranks import is_main

logger = logging.getLogger(__name__)

_listed: ContextVar[list[Problem] | None] = ContextVar("listed", default=None)


@contextmanager
def listed() -> Iterator[list[Problem]]:
    """Inside, `report` adds warnings and facts to this list in place of the log."""
    found: list[Problem] = []
    token = _listed.set(found)
    try:
        yield found
    finally:
        _listed.reset(token)


def is_listing() -> bool:
    """Whether somebody lists the findings: what is well is then said in full."""
    return _listed.get() is not None


def report(findings: Iterable[Problem]) -> None:
    """List or log what is worth knowing, on the main process, and raise the errors, all in one."""
    errors = []
    found = _listed.get()
    for finding in dict.fromkeys(findings):
        if finding.level == "error":
            errors.append(finding)
        elif found is not None:
            found.append(finding)
        elif is_main():
            logger.log(logging.INFO if finding.level == "info" else logging.WARNING, "%s", _text(finding))
    if errors:
        raise _as_error(errors)


@contextmanager
def about(option: KeyPath) -> Iterator[None]:
    """Say which option of the config an error of ours belongs to, unless it says so itself."""
    try:
        yield
    except KdtrainError as error:
        if not error.problems:
            where = OPTION_OF["teacher"] if isinstance(error, VocabularyError) else option
            error.problems = (Problem(where, str(error)),)
        raise


class Together:
    """Several checks, none of which needs another: what is wrong is raised at the end, all of it.

    A check that needs what a failed one would have made belongs behind `done`.
    """

    def __init__(self) -> None:
        self._errors: list[PreflightError] = []

    @contextmanager
    def check(self, option: KeyPath = ()) -> Iterator[None]:
        """One of them; `option` is what its errors belong to, where they do not say so."""
        try:
            with about(option):
                yield
        except PreflightError as error:
            self._errors.append(error)

    def done(self) -> None:
        """Raise what was found: an error alone as it is, several as a numbered list."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise _as_error([problem for error in self._errors for problem in error.problems])


def problems_of(error: KdtrainError, option: KeyPath = ()) -> list[Problem]:
    """An error as findings on one line each, without the full stop that a list of findings has none of."""
    return [in_a_list(problem) for problem in error.problems or (Problem(option, str(error)),)]


def in_a_list(finding: Problem) -> Problem:
    """The words of a finding on one line, without their last full stop."""
    message, hint = (" ".join(text.split()).removesuffix(".") for text in (finding.message, finding.hint))
    return replace(finding, message=message, hint=hint)


def _as_error(errors: list[Problem]) -> PreflightError:
    texts = [_text(error) for error in errors]
    if len(texts) > 1:
        numbered = (f"{number}. {text}" for number, text in enumerate(texts, start=1))
        texts = [f"{len(texts)} things stop this run before it begins:", *numbered]
    raised = PreflightError("\n".join(texts))
    raised.problems = tuple(errors)
    return raised


def _text(finding: Problem) -> str:
    return f"{finding.message} {finding.hint}".strip()
