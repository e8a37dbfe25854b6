"""The trained student in the run folder, there whole or not at all; and on the hub with `training.push_to_hub`.

It is written into a folder in the run folder, and moved from there file by file, the weights last: a full disk or a
kill leaves the model that was there before, or none.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from kdtrain.config.model_folder import WEIGHTS
from kdtrain.errors import CheckpointError, KdtrainError
from kdtrain.models.loading import first_line
from kdtrain.trainer import GKDTrainerWithMetrics

_UNFINISHED = ".model.tmp"


def save_final_model(trainer: GKDTrainerWithMetrics, run_dir: Path) -> None:
    """Save the student with its tokenizer; on all ranks.

    Raises:
        NonFiniteError: its weights are not finite; nothing was written.
        CheckpointError: the run folder is not there any more.
        OSError, SafetensorError: the disk is full, say; nothing of the model is left then.
    """
    staged = run_dir / _UNFINISHED
    try:
        if trainer.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(staged), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            _move(staged, run_dir)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)


def _move(staged: Path, run_dir: Path) -> None:
    stem = Path(WEIGHTS).stem
    new = sorted(staged.iterdir(), key=lambda path: (path.name.startswith(stem), path.name))
    for path in new:
        path.replace(run_dir / path.name)
    names = {path.name for path in new}
    for path in run_dir.glob(f"{stem}*.safetensors*"):  # of an earlier model in more files, or fewer
        if path.name not in names:
            path.unlink()


def push(trainer: GKDTrainerWithMetrics, run_dir: Path) -> None:
    """Push the saved student to the hub, where the options say so; on all ranks.

    Raises:
        CheckpointError: it failed; the model is in the run folder.
    """
    if not trainer.args.push_to_hub:
        return
    try:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
    except KdtrainError:
        raise
    except Exception as error:  # of the network, and of the hub, which have many
        name = trainer.hub_model_id or trainer.args.hub_model_id or run_dir.name
        command = f"kdtrain export {shlex.quote(str(run_dir))} {shlex.quote(f'{run_dir}-export')} --push {name}"
        raise CheckpointError(
            f"The model is saved in {run_dir}, and could not be pushed to {name}: {first_line(error)} Push it later "
            f"by: {command}{'' if trainer.args.hub_private_repo else ' --public'}"
        ) from error
