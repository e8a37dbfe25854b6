"""What happens to checkpoints around a save: the manifest, and which older ones may go.

Upstream rotates before a save is known to be complete, counts folders that somebody has named `checkpoint-4.bak`, and
writes into a folder that is there already. Here:

| name | what |
|---|---|
| `checkpoint-<step>` | of the run's line; what `--resume auto` looks at |
| `checkpoint-<step>.old-<n>` | of a branch that was left by `--resume` of an older checkpoint; nothing removes it |
| `checkpoint-<step>.kdtrain-replaced` | while a step that was saved before is saved again |
| `checkpoint-<step>.kdtrain-removed` | being removed: no half of a checkpoint stays under its name |

A process that is killed leaves the last two behind; the next run in the folder cleans up.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from kdtrain.config.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, INDEX, WEIGHTS
from kdtrain.ranks import is_main
from kdtrain.runs.checkpoints import TRAINER_STATE, missing_files, numbered, step_of, why_not
from kdtrain.runs.folder import CHECKPOINT, MANIFEST
from kdtrain.runs.manifest import UNFINISHED, is_of_the_model, read_manifest, sync, why_damaged, write_manifest
from kdtrain.runs.resume import resume_command

logger = logging.getLogger(__name__)

_REPLACED, _REMOVED = ".kdtrain-replaced", ".kdtrain-removed"
_OF_A_CHECKPOINT = (
    MANIFEST, UNFINISHED, TRAINER_STATE, "optimizer.pt", WEIGHTS, INDEX, ADAPTER_WEIGHTS, ADAPTER_CONFIG,
    "config.json",
)  # fmt: skip


class CheckpointKeeper:
    """What a run does before and after each save; see `trainer/saving.py`.

    Args:
        resumed_from: the checkpoint that the run goes on from.
        facts: for the manifest.
    """

    def __init__(
        self,
        args: TrainingArguments,
        resumed_from: Path | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self._args = args
        self._run_dir = Path(args.output_dir)
        self._resumed_from = None if resumed_from is None else named_from(self._run_dir, resumed_from)
        self._facts = facts or {}

    def begin(self, checkpoint: Path) -> None:
        """Make an empty folder that says that it is not complete."""
        if checkpoint.exists():
            _make_way(checkpoint)
        checkpoint.mkdir(parents=True)
        (checkpoint / UNFINISHED).touch()
        sync(checkpoint)

    def finish(self, checkpoint: Path, finite: bool, best: str | None) -> None:
        """Write the manifest; only then remove what is older than `save_total_limit` allows."""
        if not finite:
            logger.warning(
                "The optimizer's state is not finite after step %d: %s is saved, and --resume auto will not take it.",
                step_of(checkpoint),
                checkpoint.name,
            )
        write_manifest(
            checkpoint,
            step=step_of(checkpoint),
            world_size=self._args.world_size,
            finite=finite,
            resumed_from=self._resumed_from,
            facts=self._facts,
        )
        (checkpoint / UNFINISHED).unlink(missing_ok=True)
        _remove(_with(checkpoint, _REPLACED))
        rotate(self._run_dir, checkpoint, self._args.save_total_limit, best)

    def why_no_model(self, checkpoint: Path) -> str | None:
        """Why the model of a checkpoint cannot be loaded for the one that was saved; None where it can be."""
        reason = why_damaged(checkpoint, only=is_of_the_model) if checkpoint.is_dir() else "is not there any more"
        if reason is None:
            return None
        return (
            f"{checkpoint}, the best checkpoint (training.load_best_model_at_end), {reason}. No model is saved. "
            f"Restore it, or save the model of the last step: {resume_command()} with "
            "training.load_best_model_at_end=false behind it."
        )


def _make_way(folder: Path) -> None:
    """Rename a checkpoint of the same step, which was saved before or cut off, or what somebody else has put there."""
    if any((folder / name).exists() for name in _OF_A_CHECKPOINT) or not any(folder.iterdir()):
        before = _with(folder, _REPLACED)
        _remove(before)
        folder.rename(before)
        return
    [name] = _left_behind([folder])
    logger.warning("%s holds no checkpoint: it is %s now.", folder, name)


def rotate(run_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints of a run, until `limit` are left, and what saves that were cut off have left.

    The newest, the newest that is finite, and the best one stay. Folders of a later step, which `--resume auto` has
    skipped, and those that hold no checkpoint are not counted.

    Args:
        newest: which was saved now.
        best: folder name of the checkpoint with the best metric.
    """
    earlier = [path for path in numbered(run_dir) if step_of(path) <= step_of(newest)]
    for left in (*run_dir.glob(f"{CHECKPOINT}*{_REMOVED}"), *(path for path in earlier if not _has_content(path))):
        _remove(left)
    ours = [path for path in earlier if _is_ours(path)]
    if limit is None:
        return
    kept = {newest.name, *(name for name in (best,) if name)}
    finite = [path.name for path in ours if read_manifest(path).get("finite", True) is True]
    kept |= set(finite[-1:])
    surplus = len(ours) - max(limit, len(kept))
    for path in [path for path in ours if path.name not in kept][: max(surplus, 0)]:
        _remove(path)


def leave_branch(run_dir: Path, checkpoint: Path) -> None:
    """Give the checkpoints that a run does not go on from other names; rank 0 alone.

    They are those of later steps; and all of them, but for its ancestors, where the run goes on from a checkpoint of
    another run, or of a branch that was left before.
    """
    if not is_main():
        return
    left = [path for path in numbered(run_dir) if path.resolve() != checkpoint.resolve() and _has_content(path)]
    left = [path for path in left if not _is_ancestor(path, checkpoint)]
    if not left:
        return
    logger.warning(
        "Going on from %s leaves another branch behind, kept as %s. --resume auto does not take it.",
        named_from(run_dir, checkpoint),
        ", ".join(_left_behind(left)),
    )


def _left_behind(folders: list[Path]) -> list[str]:
    """Give folders names that nothing here looks for; the new ones."""
    number = next(n for n in itertools.count(1) if not any(_with(path, f".old-{n}").exists() for path in folders))
    found = [path.rename(_with(path, f".old-{number}")).name for path in folders]
    sync(folders[0].parent)
    return found


def clean_up(run_dir: Path) -> None:
    """Finish what a process that was killed has begun; rank 0 alone, which holds the lock."""
    if not is_main() or not run_dir.is_dir():
        return
    for left in run_dir.glob(f"{CHECKPOINT}*{_REMOVED}"):
        _remove(left)
    for before in run_dir.glob(f"{CHECKPOINT}*{_REPLACED}"):
        checkpoint = before.with_name(before.name.removesuffix(_REPLACED))
        if checkpoint.exists() and why_not(checkpoint) is None:
            _remove(before)
        else:  # killed while it was saved again
            _remove(checkpoint)
            before.rename(checkpoint)


def named_from(run_dir: Path, checkpoint: Path) -> str:
    """A checkpoint's name, with its path where it is another run's."""
    checkpoint = checkpoint.resolve()
    return checkpoint.name if checkpoint.parent == run_dir.resolve() else str(checkpoint)


def _is_ancestor(path: Path, checkpoint: Path) -> bool:
    """Whether a checkpoint of the run's line was made on the way to another one."""
    if checkpoint.resolve().parent != path.resolve().parent:
        return False
    if checkpoint.resolve() in numbered(checkpoint.resolve().parent):
        return step_of(path) < step_of(checkpoint)
    ours, other = read_manifest(path), read_manifest(checkpoint)  # of a branch that was left
    return bool(ours and other) and ours["step"] < other["step"] and ours["time"] < other["time"]


def _is_ours(path: Path) -> bool:
    return (path / MANIFEST).is_file() or not missing_files(path)


def _has_content(path: Path) -> bool:
    """Whether a folder is more than what a save that was cut off has left."""
    return (path / MANIFEST).exists() or not (path / UNFINISHED).exists()


def _with(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _remove(path: Path) -> None:
    """Remove a folder, in one move for whoever looks for checkpoints."""
    if not path.exists():
        return
    try:
        if not path.name.endswith((_REMOVED, _REPLACED)):
            path = path.rename(_with(path, _REMOVED))
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s could not be removed: %s.", path, error.strerror or error)
