"""The run folder: the names of its files, whether a run may use it, its config, and writing a file atomically.

| file in `training.output_dir` | what | written by |
|---|---|---|
| `run_config.json` | the config, defaults filled in | `folder.py` |
| `status.json` | how the run ended, or that it still goes, and where it is | `status.py` |
| `run.lock` | while a run goes on: which process, where, since when | `lock.py` |
| `error.log` | tracebacks, where it failed | `status.py` |
| `nonfinite.json` | where NaN or infinity came from, where that ended it | `nonfinite.py` |
| `logging.jsonl` | one record per logging step and evaluation | `log.py` |
| `completions.parquet` | answers generated while training, to be looked at | `completions.py` |
| `evaluation.json` | student before and after, and teacher | `evaluate.py` |
| `report.html`, `report.json` | the run on one page, and its figures; with matplotlib `report.png` | `report/` |
| `teacher_answers/<settings>/` | `rank<R>.jsonl` and `.arrow`: `answers: teacher` | `generation/answers.py` |
| `checkpoint-<step>/` | what `--resume` goes on from, see `checkpoints.py` | transformers, `trainer/` |
| `checkpoint-<step>/kdtrain_manifest.json` | its files and their hashes; written last | `manifest.py` |
| `checkpoint-<step>.old-<n>/` | of a branch that was left by `--resume` of an older one | `rotation.py` |
| `model.safetensors` or `adapter_model.safetensors`, configs, tokenizer | the trained student | transformers |
| `visual_projectors.safetensors` | what visual KD trained beside the student | `feature_kd/` |
| `hidden_projectors.safetensors` | what hidden-state KD trained beside it | `feature_kd/` |
| a folder of the run's name, or another one | of a tracker in `training.report_to` | transformers |

With `--sweep` each run has such a folder in `training.output_dir`, but for `teacher_answers`. There lie:

| file | what | written by |
|---|---|---|
| `sweep.json` | the runs with their figures, ranked | `sweep.py` |
| `report.html` | all runs beside each other | `report/` |
| `teacher_answers/<settings>/` | as above, written once for all runs | `generation/answers.py` |
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdtrain.config import RunConfig
from kdtrain.config.model_folder import read_map
from kdtrain.disk import writing
from kdtrain.errors import CheckpointError, PreflightError
from kdtrain.ranks import is_main
from kdtrain.runs.resume import resume_command

logger = logging.getLogger(__name__)

CONFIG = "run_config.json"  # not config.json, which is the saved model's
STATUS = "status.json"
LOCK = "run.lock"
ERRORS = "error.log"
NONFINITE = "nonfinite.json"
LOG = "logging.jsonl"
COMPLETIONS = "completions.parquet"
EVALUATION = "evaluation.json"
REPORT = "report.html"
REPORT_DATA = "report.json"
SWEEP = "sweep.json"
ANSWERS = "teacher_answers"
CHECKPOINT = "checkpoint-"  # and its step
MANIFEST = "kdtrain_manifest.json"  # in a checkpoint
_UNFINISHED = ".{}.{}.tmp"  # of a file and a process

ANOTHER_FOLDER = "another folder (training.output_dir=… on the command line)"


def require_usable(run_dir: Path, resuming: bool) -> None:
    """Refuse a folder that cannot be written, or holds what a run must not write over."""
    if run_dir.exists() and not run_dir.is_dir():
        raise PreflightError(f"training.output_dir {run_dir} is a file. Name a folder.")
    existing = next((parent for parent in (run_dir, *run_dir.parents) if parent.exists()), Path("/"))
    if not existing.is_dir():
        raise PreflightError(f"training.output_dir {run_dir} lies in {existing}, which is a file. Name another folder.")
    if not os.access(existing, os.W_OK):
        raise PreflightError(f"training.output_dir {run_dir} cannot be written: {existing} is read-only.")
    # Ranks that start later find what rank 0 has written meanwhile.
    if not is_main() or not run_dir.is_dir() or not _written_into(run_dir):
        return
    if not is_run_folder(run_dir):
        raise PreflightError(
            f"training.output_dir {run_dir} is not empty, and holds no run of kdtrain. Name {ANOTHER_FOLDER}."
        )
    if not resuming and is_over(run_dir):
        raise PreflightError(
            f"training.output_dir {run_dir} holds a finished run, and no checkpoint to go on from: --resume auto "
            f"would begin anew and write over it. Name {ANOTHER_FOLDER}."
        )
    if not resuming:
        raise PreflightError(
            f"training.output_dir {run_dir} holds a run already. Go on with it by {resume_command()}, or name "
            f"{ANOTHER_FOLDER}."
        )


def answers_folder(run_dir: Path) -> Path:
    """Where answers of the teacher are kept: in the run folder, or once for all runs of a sweep."""
    return (run_dir.parent if (run_dir.parent / SWEEP).is_file() else run_dir) / ANSWERS


def is_over(run_dir: Path) -> bool:
    """Whether a run has finished in a folder, and left no checkpoint: what goes on there writes over its model."""
    return read_map(run_dir / STATUS).get("state") == "finished" and not any(run_dir.glob(f"{CHECKPOINT}*"))


def is_run_folder(folder: Path) -> bool:
    """Whether a run has written into a folder: its config, or its status, which is there a little earlier.

    Or nothing but checkpoints, as they are moved to another machine.
    """
    if all(path.is_dir() and path.name.startswith(CHECKPOINT) for path in _written_into(folder)):
        return True
    return "rlhf" in read_map(folder / CONFIG) or {"state", "exit_code", "rank"} <= read_map(folder / STATUS).keys()


def forget_evaluation(run_dir: Path) -> None:
    """Rank 0 removes the figures of a model that is about to be written over; those of a checkpoint stay true."""
    path = run_dir / EVALUATION
    if is_main() and path.is_file() and read_map(path).get("checkpoint") is None:
        path.unlink()
        logger.warning("%s was of the model before: evaluate again.", path)


def _written_into(folder: Path) -> list[Path]:
    """What is in a folder; a lock alone says of no run that it has written anything."""
    return [path for path in folder.iterdir() if not path.name.removeprefix(".").startswith(LOCK)]


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Rank 0 makes the folder and writes the config."""
    if not is_main():
        return
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    with writing(run_dir / CONFIG):
        write_atomically(run_dir / CONFIG, config.model_dump_json(indent=2))


def changed_options(run_dir: Path, config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Options that are others than those that the run in a folder was made with: their values then and now."""
    file = run_dir / CONFIG
    if not file.exists():
        return {}
    before, now = _flat(json.loads(file.read_text("utf-8"))), _flat(config.model_dump(mode="json"))
    keys = sorted(before.keys() | now.keys())
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"rlhf": {"beta": 0.5}} as {"rlhf.beta": 0.5}."""
    if not isinstance(value, dict):
        return {prefix: value}
    children = (_flat(child, f"{prefix}.{name}".removeprefix(".")) for name, child in value.items())
    return {key: leaf for child in children for key, leaf in child.items()}


class RecordError(CheckpointError):
    """What a run says of itself cannot be written; raised between two steps, so that its state can be saved."""


@contextmanager
def writing_record(path: Path) -> Iterator[None]:
    """`writing`, of what is written between two steps.

    Raises:
        RecordError: it cannot be written.
    """
    try:
        with writing(path, f"Then go on with {resume_command()}"):
            yield
    except CheckpointError as error:
        raise RecordError(str(error)) from error.__cause__


class SameFolder:
    """Whether the run folder is still the one that training began in: another one in its place gets nothing."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._began = run_dir, _identity(run_dir)

    def check(self) -> None:
        """Raise if it was moved, deleted or replaced.

        Raises:
            CheckpointError: with where it was.
        """
        if _identity(self._path) != self._began:
            raise CheckpointError(
                f"training.output_dir {self._path} is not there any more: it was moved, deleted or replaced while the "
                f"run went on. Nothing was written elsewhere. Put it back, and go on with {resume_command()}"
            )


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one move: a reader sees the old text or the new one, never a part."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new file, to be written inside, that takes the place of `path` at the end; after an error nothing is there."""
    temporary = path.with_name(_UNFINISHED.format(path.name, os.getpid()))
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed have left of a file that one process alone writes."""
    for left in path.parent.glob(_UNFINISHED.format(path.name, "*")):
        left.unlink(missing_ok=True)
