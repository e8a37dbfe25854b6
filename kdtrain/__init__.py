"""kdtrain: distil a large language or vision-language model into a small one from one YAML file.

Importing this package imports neither torch nor transformers, so that `kdtrain --help` and `kdtrain validate` answer
at once. The Python API is `kdtrain.fit`, and what lives in `kdtrain.config`, `kdtrain.trainer`, `kdtrain.losses` and
`kdtrain.teachers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import TrainerCallback

    from kdtrain.runs.fit import RunResult

try:
    __version__ = version("kdtrain")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def fit(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    callbacks: Sequence[TrainerCallback] = (),
    train_dataset: Any = None,
    eval_dataset: Any = None,
    model: Any = None,
    teacher: Any = None,
    resume: str | None = None,
    allow_changes: Sequence[str] = (),
    allow_world_size_change: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Train as the command `kdtrain fit` does, in this process: the same checks, run folder, status and log.

    Args:
        config: a YAML file, or a mapping of the same form.
        overrides: `key.sub=value`, which win over it.
        callbacks: of transformers, beside those of the run.
        train_dataset, eval_dataset: rows in place of the path in `data.train` and `data.eval`, whose other options
            (columns, limit, weight, ce, answers) hold for them: a `datasets.Dataset`, or a list of rows as they stand
            in a file.
        model: the student in place of `model.model`: a name, or a loaded model, which is trained in place. The
            tokenizer is that of `model.model`, or of the folder that the model was loaded from.
        teacher: the teacher in place of `rlhf.teacher_model`: a name, a loaded model, or a `kdtrain.teachers.Teacher`.
        resume: "auto" (the newest complete checkpoint, or a clean start) or a checkpoint's path.
        allow_changes: what may differ from the run that made the checkpoint: options such as "rlhf.beta", sections, or
            "data.content".
        allow_world_size_change: whether a run that streams its rows goes on with another number of processes.
        dry_run: build everything and run a window of each kind forward and backward; no step, no file.
        quiet: show no progress; warnings come through `logging`.

    Raises:
        KdtrainError: what the command ends with; `exit_code` is its exit code.
        Interrupted: SIGINT or SIGTERM, after the state was saved.
    """
    from kdtrain.runs.python_api import checked_changes, prepare

    allowed = checked_changes(allow_changes, resume)
    arguments, given = prepare(
        config,
        overrides,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        model=model,
        teacher=teacher,
        callbacks=callbacks,
    )
    from rich.console import Console

    from kdtrain.cli.progress import ConsoleReporter
    from kdtrain.runs.fit import fit as run

    reporter = ConsoleReporter(Console(stderr=True), quiet=quiet)
    return run(
        arguments,
        reporter,
        resume=resume,
        allow_changes=allowed,
        allow_world_size_change=allow_world_size_change,
        dry_run=dry_run,
        given=given,
    )
