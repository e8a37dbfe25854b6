"""The run folder: the names of its files, whether a run may use a folder, and writing a file atomically.

| file in `training.output_dir` | what | written by |
|---|---|---|
| `run_config.json` | the config, defaults filled in | `fit.py` |
| `status.json` | how the run ended, or that it still goes | `status.py` |
| `logging.jsonl` | one record per logging step and evaluation | `log.py` |
| `teacher_answers/<settings>/` | `rank<R>.jsonl` and `.arrow`: `answers: teacher` | `generation/answers.py` |
| `checkpoint-<step>/` | what `--resume` goes on from, see `checkpoints.py` | transformers, `trainer/` |
| `model.safetensors` or `adapter_model.safetensors`, configs, tokenizer | the trained student | transformers |
| `visual_projectors.safetensors` | what visual KD trained beside the student | `feature_kd/` |
| `runs/` or another folder | of the tracker in `training.report_to` | transformers |
"""

from __future__ import annotations

import os
from pathlib import Path

from kdtrain.config.model_folder import read_map
from kdtrain.errors import PreflightError
from kdtrain.ranks import is_main

CONFIG = "run_config.json"  # not config.json, which is the saved model's
STATUS = "status.json"
LOG = "logging.jsonl"
ANSWERS = "teacher_answers"
CHECKPOINT = "checkpoint-"  # and its step

_ANOTHER = "another folder (training.output_dir=… on the command line)"


def require_usable(run_dir: Path, resuming: bool) -> None:
    """Refuse a folder that cannot be written, or holds what a run must not write over.

    Raises:
        PreflightError: naming the way out.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise PreflightError(f"training.output_dir {run_dir} is a file. Name a folder.")
    existing = next((parent for parent in (run_dir, *run_dir.parents) if parent.exists()), Path("/"))
    if not os.access(existing, os.W_OK):
        raise PreflightError(f"training.output_dir {run_dir} cannot be written: {existing} is read-only.")
    # Ranks that start later find what rank 0 has written meanwhile.
    if not is_main() or not run_dir.is_dir() or not any(run_dir.iterdir()):
        return
    if not is_run_folder(run_dir):
        raise PreflightError(
            f"training.output_dir {run_dir} is not empty, and holds no run of kdtrain. Name {_ANOTHER}."
        )
    if not resuming:
        raise PreflightError(
            f"training.output_dir {run_dir} holds a run already. Go on with it by --resume auto, or name {_ANOTHER}."
        )


def is_run_folder(folder: Path) -> bool:
    """Whether a run has written into a folder: its config, or its status, which is there a little earlier.

    Or nothing but checkpoints, as they are moved to another machine.
    """
    if all(path.is_dir() and path.name.startswith(CHECKPOINT) for path in folder.iterdir()):
        return True
    return "rlhf" in read_map(folder / CONFIG) or {"state", "exit_code", "rank"} <= read_map(folder / STATUS).keys()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one move: a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
