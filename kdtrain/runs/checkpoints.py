"""Checkpoints of a run: which can be resumed from, and which one `--resume` means.

A checkpoint holds what transformers saves (weights or an adapter, optimizer, scheduler, random numbers,
`trainer_state.json`, which is written last), and beside it, one file per rank, the sums that no record has covered yet
(`unlogged_<rank>.safetensors`) and what visual KD trains (`visual_projectors.safetensors`).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from kdtrain.config.model_folder import ADAPTER_WEIGHTS, INDEX, WEIGHTS
from kdtrain.errors import CheckpointError
from kdtrain.runs.folder import CHECKPOINT, is_over

logger = logging.getLogger(__name__)

_TRAINER_STATE = "trainer_state.json"


def checkpoint_to_resume(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint that `--resume` means: a path, or for "auto" the newest complete one; None for a clean start."""
    if resume is None:
        return None
    if resume != "auto":
        checkpoint = Path(resume).resolve()
        if not checkpoint.exists():
            raise CheckpointError(f"--resume {resume}: there is no such checkpoint. Give its path, or auto.")
        if missing := missing_files(checkpoint):
            raise CheckpointError(f"{checkpoint} cannot be resumed from: it lacks {', '.join(missing)}.")
        return checkpoint
    steps = {path: path.name.removeprefix(CHECKPOINT) for path in run_dir.glob(f"{CHECKPOINT}*")}
    found = sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: -int(steps[path]))
    newest, skipped = None, {}
    for path in found:
        lacking = ", ".join(missing_files(path))
        if not lacking:
            newest = path
            break
        skipped[path.name] = lacking
    if newest is None and skipped:
        lacks = "; ".join(f"{name} lacks {lacking}" for name, lacking in skipped.items())
        raise CheckpointError(
            f"--resume auto: no checkpoint in {run_dir} is complete: {lacks}. Restore what is missing, or begin anew "
            "in another folder (training.output_dir=… on the command line)."
        )
    for name, lacking in skipped.items():
        logger.warning("%s is skipped: it lacks %s.", name, lacking)
    if newest is None and is_over(run_dir):
        logger.warning("No checkpoint in %s: clean start, over the model of the run that has finished there.", run_dir)
    else:
        logger.warning("Resuming from %s." if newest else "No checkpoint in %s yet: clean start.", newest or run_dir)
    return newest


def steps_done(checkpoint: Path) -> int:
    """Optimizer steps that were taken when a checkpoint was saved."""
    return int(json.loads((checkpoint / _TRAINER_STATE).read_text(encoding="utf-8"))["global_step"])


def missing_files(checkpoint: Path) -> list[str]:
    """What a checkpoint lacks to be resumed from; empty when it is complete.

    DeepSpeed and FSDP keep their state in folders of their own instead of `optimizer.pt`.
    """
    if not checkpoint.is_dir():
        return ["the folder itself"]
    sharded = any(checkpoint.glob("global_step*")) or any(checkpoint.glob("pytorch_model_fsdp*"))
    wanted = (_TRAINER_STATE,) if sharded else (_TRAINER_STATE, "optimizer.pt", "scheduler.pt")
    missing = [name for name in wanted if not _holds_something(checkpoint / name)]
    weights = (WEIGHTS, INDEX, ADAPTER_WEIGHTS)
    if not sharded and not any(_holds_something(checkpoint / name) for name in weights):
        missing.append(" or ".join(weights))
    return missing


def _holds_something(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
