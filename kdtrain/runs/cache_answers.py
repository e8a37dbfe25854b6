"""`answers: teacher` with a cache: written into its folder before the targets, and found there by a run that trains."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig
from trl.experimental.gkd import GKDConfig

from kdtrain.config import RunConfig
from kdtrain.errors import DataError
from kdtrain.generation.answers import StoredAnswers, TeacherAnswers
from kdtrain.models.loading import load_config, trust_policy
from kdtrain.preflight.model_checks import check_models, teacher_side_checks
from kdtrain.preflight.positions import answered_rows
from kdtrain.runs import cache_folder
from kdtrain.runs.folder import ANSWERS
from kdtrain.runs.read_data import RunData
from kdtrain.runs.teacher_answers import answer_writer, check_images, fill
from kdtrain.teachers.cached.manifest import Manifest, content_of, identified

if TYPE_CHECKING:
    from kdtrain.runs.build import Reporter
    from kdtrain.runs.cache_teacher import OpenTeacher

_NAME = "answers of the teacher"


def write_answers_into(
    folder: Path,
    config: RunConfig,
    args: GKDConfig,
    data: RunData,
    teacher: OpenTeacher,
    identity: Mapping[str, Any],
    reporter: Reporter,
    at_the_end: ExitStack,
) -> dict[str, Any]:
    """Put the teacher's answers into the rows that ask for them; a collective. What was answered before is kept.

    Args:
        identity: `made_from` of the teacher and of what it reads.
        at_the_end: removes the rows with their answers, which are a file.

    Returns:
        which answers they are, as a part of `made_from`.
    """
    module = teacher.teacher.module
    rows = [*answered_rows(data.train, args), *answered_rows(data.evaluation, args)]
    sides = teacher_side_checks(teacher.teacher, teacher.collator)
    generating = [] if module is None else [module]
    check_models(sides, rows, teacher.collator, data.train, generating=generating, only_errors=True)
    check_images(data, teacher.collator)
    answers = TeacherAnswers(
        answer_writer(config, args, data, _generation_config(config), teacher.side, teacher.collator),
        folder / ANSWERS,
        identity={what: content_of(value) for what, value in identity.items()},
        progress=reporter.answers,
        rows_folder=_scratch(at_the_end),
    )
    with cache_folder.disk_errors(folder):
        fill(answers, config, data)
    return {_NAME: identified(f"up to {config.rlhf.most_new_tokens} tokens each", answers.name)}


def answers_of_cache(
    folder: Path, manifest: Manifest, config: RunConfig, data: RunData, at_the_end: ExitStack
) -> dict[str, Any]:
    """Put the answers that a cache has into the rows that ask for them; a collective. As `write_answers_into`.

    Raises:
        DataError: it has none, or none for some rows.
    """
    named = manifest.made_from.get(_NAME)
    if named is None:
        raise DataError(
            f"Data sources have answers: teacher, and the cache {cache_folder.shown(folder)} was written without: "
            "write one with this config (kdtrain cache CONFIG --out DIR), or set answers: data."
        )
    fill(StoredAnswers(folder / ANSWERS / str(content_of(named)), _scratch(at_the_end)), config, data)
    return {_NAME: named}


def _scratch(at_the_end: ExitStack) -> Path:
    return Path(at_the_end.enter_context(tempfile.TemporaryDirectory(prefix="kdtrain-")))


def _generation_config(config: RunConfig) -> GenerationConfig:
    """The student's, without its weights."""
    policy = trust_policy(config.model.trust_remote_code, config.model.revision)
    try:
        found: GenerationConfig = GenerationConfig.from_pretrained(config.model.model, revision=policy["revision"])
    except OSError:  # it has none of its own
        found = GenerationConfig.from_model_config(load_config(config.model.model, policy))
    return found
