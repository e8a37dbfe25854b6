"""Which checkpoints of a run can be resumed from, and reading their weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kdtrain.errors import CheckpointError
from kdtrain.load_report import listed, wrong_weights
from kdtrain.model_folder import require_sound

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def missing_files(checkpoint: Path) -> list[str]:
    """What a checkpoint lacks to be resumed from; empty when it is complete.

    DeepSpeed and FSDP keep their state in folders of their own instead of `optimizer.pt`.
    """
    if not checkpoint.is_dir():
        return ["the folder itself"]
    sharded = any(checkpoint.glob("global_step*")) or any(checkpoint.glob("pytorch_model_fsdp*"))
    wanted = ("trainer_state.json",) if sharded else _STATE
    missing = [name for name in wanted if not _holds_something(checkpoint / name)]
    if not sharded and not any(_holds_something(checkpoint / name) for name in _WEIGHTS):
        missing.append(" or ".join(_WEIGHTS))
    return missing


def newest_complete(run_dir: Path) -> tuple[Path | None, dict[str, list[str]]]:
    """The newest complete checkpoint of a run, and what was skipped: name -> missing files."""
    found = sorted(
        (int(match[1]), path)
        for path in (run_dir.iterdir() if run_dir.is_dir() else ())
        if (match := _NAME.fullmatch(path.name))
    )
    skipped: dict[str, list[str]] = {}
    for _, path in reversed(found):
        missing = missing_files(path)
        if not missing:
            return path, skipped
        skipped[path.name] = missing
    return None, skipped


def require_complete(checkpoint: Path) -> Path:
    """The checkpoint, if it can be resumed from.

    Raises:
        CheckpointError: files are missing.
    """
    missing = missing_files(checkpoint)
    if missing:
        raise CheckpointError(f"{checkpoint} cannot be resumed from: it lacks {', '.join(missing)}.")
    return checkpoint


def _holds_something(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def load_weights(model: Any, folder: str | Path) -> None:
    """Load saved weights into a model, as `from_pretrained` reads them: whatever names they were saved under.

    Raises:
        CheckpointError: weights are missing, or do not fit.
    """
    try:
        require_sound(Path(folder), "checkpoint")
        saved, found = type(model).from_pretrained(
            folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        wrong = wrong_weights(found, saved.config)  # what is missing would be random numbers
        if wrong:
            raise ValueError(f"{len(wrong)} weights are wrong: {listed(wrong)}.")
        model.load_state_dict(saved.state_dict())
    except Exception as error:
        raise CheckpointError(
            f"The weights in {folder} do not fit {type(model).__name__}: {str(error).strip().splitlines()[0]} Resume "
            "with the model that the run began with, or start anew in another output_dir."
        ) from error
