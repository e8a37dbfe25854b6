"""`validate --deep`: what only the world can tell about a config, without training.

Everything is built as `fit` builds it: rows are read, both models loaded, a server asked, and all that `fit` looks at
before its first step is looked at. So what stops the one stops the other, and what is listed here is what `fit` would
warn of. Nothing is written but the cache of encoded rows, which `fit` then finds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from transformers import TrainerCallback

from kdtrain.config import RunConfig
from kdtrain.config.arguments import build_train_arguments
from kdtrain.config.tree import Problem
from kdtrain.data import BuildReport
from kdtrain.errors import KdtrainError
from kdtrain.models.probe import OPTION_OF
from kdtrain.preflight.findings import in_a_list, listed, problems_of, report
from kdtrain.runs.build import Given, build_trainer, option_of_teacher
from kdtrain.runs.failures import readable_failures
from kdtrain.runs.resources import time_findings, tokens_per_row
from kdtrain.runs.student import student_config
from kdtrain.trainer.completions import Completion
from kdtrain.trainer.dry_run import timed_windows

_NO_TEACHER = Problem(("rlhf", "llm_kd_weight"), "No teacher is asked in this run", level="info")


class _Silent:
    """A reporter of a run that shows nothing."""

    def data(self, name: str, report: BuildReport) -> None:
        pass

    def answers(self, done: int, total: int) -> None:
        pass

    def plan(self, rows: Mapping[str, str]) -> None:
        pass

    def completions(self, found: Sequence[Completion]) -> None:
        pass

    def callbacks(self) -> list[TrainerCallback]:
        return []

    def close(self) -> None:
        pass


def deep_findings(config: RunConfig) -> list[Problem]:
    """What is found out about a config that the static check has passed.

    Returns:
        errors with which `fit` would stop, warnings, and level "info" for what is as it should be.
    """
    errors: list[Problem] = []
    with ExitStack() as at_the_end, listed() as found:
        args = build_train_arguments(config).training_args
        args.output_dir = at_the_end.enter_context(tempfile.TemporaryDirectory())
        args.report_to = []
        try:
            with readable_failures(args):
                trainer, rows = build_trainer(config, args, _Silent(), True, Given(), at_the_end)
                report(time_findings(trainer, rows))
        except KdtrainError as error:
            errors = problems_of(error)
    nobody = [] if config.asks_teacher else [_NO_TEACHER]
    return [_at_its_option(finding, config) for finding in (*errors, *map(in_a_list, found), *nobody)]


def measured_step(config: RunConfig) -> float:
    """Seconds of a step of the run in this process, on this device: see `timed_windows`.

    Raises:
        KdtrainError: `fit` would stop too.
    """
    with ExitStack() as at_the_end, listed():
        args = build_train_arguments(config).training_args
        args.output_dir = at_the_end.enter_context(tempfile.TemporaryDirectory())
        args.report_to = []
        with readable_failures(args):
            trainer, rows = build_trainer(config, args, _Silent(), True, Given(), at_the_end)
            return timed_windows(trainer, tokens_per_row(rows))[1].step_s


def _at_its_option(finding: Problem, config: RunConfig) -> Problem:
    """A finding about the teacher, where another option than `rlhf.teacher_model` names it."""
    # Beside a cache `teacher_model` says only what it was made of.
    names = (
        config.rlhf.teacher_model is not None and config.rlhf.teacher.backend != "cache" and not config.rlhf.teachers
    )
    return (
        finding if names or finding.path != OPTION_OF["teacher"] else replace(finding, path=option_of_teacher(config))
    )


def student_vocabulary(config: RunConfig) -> int:
    """Columns of the student's logits, as its config says."""
    return int(student_config(config).get_text_config().vocab_size)
