"""The run folder: the names of its files, whether a run may use it, its config, and writing a file atomically.

| file in `training.output_dir` | what | written by |
|---|---|---|
| `run_config.json` | the config, defaults filled in | `folder.py` |
| `status.json` | how the run ended, or that it still goes | `status.py` |
| `logging.jsonl` | one record per logging step and evaluation | `log.py` |
| `teacher_answers/<settings>/` | `rank<R>.jsonl` and `.arrow`: `answers: teacher` | `generation/answers.py` |
| `checkpoint-<step>/` | what `--resume` goes on from, see `checkpoints.py` | transformers, `trainer/` |
| `model.safetensors` or `adapter_model.safetensors`, configs, tokenizer | the trained student | transformers |
| `visual_projectors.safetensors` | what visual KD trained beside the student | `feature_kd/` |
| `runs/` or another folder | of the tracker in `training.report_to` | transformers |
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from kdtrain.config import RunConfig
from kdtrain.config.model_folder import read_map
from kdtrain.errors import PreflightError
from kdtrain.ranks import is_main

logger = logging.getLogger(__name__)

CONFIG = "run_config.json"  # not config.json, which is the saved model's
STATUS = "status.json"
LOG = "logging.jsonl"
ANSWERS = "teacher_answers"
CHECKPOINT = "checkpoint-"  # and its step

_ANOTHER = "another folder (training.output_dir=… on the command line)"


def require_usable(run_dir: Path, resuming: bool) -> None:
    """Refuse a folder that cannot be written, or holds what a run must not write over."""
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


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Rank 0 makes the folder and writes the config; it warns of options that a resumed run changes."""
    if not is_main():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / CONFIG
    if file.exists():
        before, now = _flat(json.loads(file.read_text("utf-8"))), _flat(config.model_dump(mode="json"))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            changes = "; ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed)
            logger.warning("Going on with other options than the run began with: %s.", changes)
    write_atomically(file, config.model_dump_json(indent=2))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"rlhf": {"beta": 0.5}} as {"rlhf.beta": 0.5}."""
    if not isinstance(value, dict):
        return {prefix: value}
    children = (_flat(child, f"{prefix}.{name}".removeprefix(".")) for name, child in value.items())
    return {key: leaf for child in children for key, leaf in child.items()}


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one move: a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
