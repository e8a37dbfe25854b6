"""Checkpoints of a run: which can be resumed from, and which one `--resume` means.

A checkpoint holds what transformers saves (weights or an adapter, optimizer, scheduler, random numbers,
`trainer_state.json`), beside it, one file per rank, the sums that no record has covered yet
(`unlogged_<rank>.safetensors`) and what feature terms train (`…_projectors.safetensors`), and last the manifest, by
which it is verified; see `manifest.py`.

The folders `checkpoint-<step>` of a run are one line: each was made by going on from the one before. Where a run goes
on from an older one, `rotation.py` gives those of the branch that is left other names.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from torch import distributed

from kdtrain.config.model_folder import ADAPTER_WEIGHTS, INDEX, WEIGHTS, read_map
from kdtrain.errors import CheckpointError
from kdtrain.ranks import is_main
from kdtrain.runs.folder import ANOTHER_FOLDER, CHECKPOINT, MANIFEST, STATUS, is_over
from kdtrain.runs.manifest import by_size, read_manifest, why_damaged

logger = logging.getLogger(__name__)

TRAINER_STATE = "trainer_state.json"
_ANEW = f"begin anew in {ANOTHER_FOLDER}"
_NUMBERED = re.compile(re.escape(CHECKPOINT) + "(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Found:
    """What was found in a run folder."""

    newest: Path | None
    """The newest checkpoint that is complete and undamaged."""
    skipped: dict[str, str]
    """Newer ones, by name: what is wrong with them, as the rest of a sentence."""


def checkpoint_to_resume(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint that `--resume` means: a path, or for "auto" the newest complete one; None for a clean start.

    Rank 0 looks, and says it to the others: a folder changes while one after the other looks.

    Raises:
        CheckpointError: the one that is named is not complete; or there are some, and none is.
    """
    if resume is None:
        return None
    by_size()  # on all ranks: where it raises, no other one waits
    answer: list[tuple[Path | None, str | None]] = [(None, None)]
    if is_main():
        try:
            answer = [(_chosen(run_dir, resume), None)]
        except CheckpointError as error:
            answer = [(None, str(error))]
        except OSError as error:
            answer = [(None, f"--resume {resume}: {error.filename} cannot be read: {error.strerror}.")]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(answer)
    [(checkpoint, problem)] = answer
    if problem is not None:
        raise CheckpointError(problem)
    if checkpoint is not None and not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not on this machine: all of them need the same folder.")
    return checkpoint


def newest_complete(run_dir: Path) -> Found:
    """The newest checkpoint of a run that can be resumed from, and what is wrong with those that are newer."""
    skipped: dict[str, str] = {}
    for path in reversed(numbered(run_dir)):
        reason = why_not(path)
        if reason is None:
            return Found(path, skipped)
        skipped[path.name] = reason
    return Found(None, skipped)


def numbered(run_dir: Path) -> list[Path]:
    """Folders `checkpoint-<step>` of a run, by step: neither a link, nor one that somebody has named in another way."""
    found = (path for path in run_dir.iterdir()) if run_dir.is_dir() else ()
    return sorted(
        (path for path in found if _NUMBERED.fullmatch(path.name) and path.is_dir() and not path.is_symlink()),
        key=step_of,
    )


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(path.name.partition("-")[2])


def steps_done(checkpoint: Path) -> int:
    """Optimizer steps that were taken when a checkpoint was saved."""
    return int(json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"])


def why_not(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, as the rest of a sentence about it; None where it can be."""
    if not checkpoint.is_dir():
        return "is no folder"
    if reason := why_damaged(checkpoint):
        return reason
    if missing := missing_files(checkpoint):
        alone = "holds the model alone (training.save_only_model: true)"
        return alone if _is_model_alone(checkpoint, missing) else f"lacks {', '.join(missing)}"
    if read_manifest(checkpoint).get("finite", True) is not True:
        return "has an optimizer state that is not finite"
    if not isinstance(read_map(checkpoint / TRAINER_STATE).get("global_step"), int):
        return f"has a damaged {TRAINER_STATE} (it names no step)"
    return None


def missing_files(checkpoint: Path) -> list[str]:
    """What a checkpoint lacks to be resumed from, by its form; empty when it has all of it.

    DeepSpeed and FSDP keep their state in folders of their own instead of `optimizer.pt`.
    """
    if not checkpoint.is_dir():
        return ["the folder itself"]
    sharded = _is_sharded(checkpoint)
    wanted = (TRAINER_STATE,) if sharded else (TRAINER_STATE, "optimizer.pt", "scheduler.pt")
    missing = [name for name in wanted if not _holds_something(checkpoint / name)]
    if not any(_holds_something(path) for path in checkpoint.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    weights = (WEIGHTS, INDEX, ADAPTER_WEIGHTS)
    if not sharded and not any(_holds_something(checkpoint / name) for name in weights):
        missing.append(" or ".join(weights))
    shards = set((read_map(checkpoint / INDEX).get("weight_map") or {}).values())
    return missing + sorted(name for name in shards if not _holds_something(checkpoint / name))


def _chosen(run_dir: Path, resume: str) -> Path | None:
    if resume == "auto":
        return _chosen_by_itself(run_dir)
    checkpoint = Path(resume).resolve()
    if not checkpoint.exists():
        raise CheckpointError(f"--resume {resume}: there is no such checkpoint. Give its path, or auto.")
    if reason := why_not(checkpoint):
        raise CheckpointError(f"{checkpoint} cannot be resumed from: it {reason}.{_instead(run_dir, checkpoint)}")
    _say_if_unverified(checkpoint)
    return checkpoint


def _chosen_by_itself(run_dir: Path) -> Path | None:
    found = newest_complete(run_dir)
    if found.newest is None and found.skipped:
        reasons = "; ".join(f"{name} {reason}" for name, reason in found.skipped.items())
        raise CheckpointError(
            f"--resume auto: no checkpoint in {run_dir} is complete: {reasons}. Restore what is missing, or {_ANEW}."
        )
    for name, reason in found.skipped.items():
        logger.warning("%s is skipped: it %s.", name, reason)
    if found.newest is not None:
        _say_if_unverified(found.newest)
        logger.info("Resuming from %s.", found.newest)
        return found.newest
    source = read_map(run_dir / STATUS).get("resumed_from")
    if isinstance(source, str) and (Path(source).exists() or Path(source).parent != run_dir.resolve()):
        return _before_the_first_save(run_dir, Path(source))
    if others := sorted(path.name for path in run_dir.glob(f"{CHECKPOINT}*")):
        raise CheckpointError(
            f"--resume auto: {run_dir} holds no checkpoint of its run but those that it does not take: "
            f"{', '.join(others)}. Name one with --resume PATH, or {_ANEW}."
        )
    if is_over(run_dir):
        logger.warning("No checkpoint in %s: clean start, over the model of the run that has finished there.", run_dir)
    else:
        logger.info("No checkpoint in %s yet: clean start.", run_dir)
    return None


def _before_the_first_save(run_dir: Path, source: Path) -> Path:
    """What a run went on from that has ended before it saved a checkpoint of its own."""
    if reason := why_not(source):
        raise CheckpointError(
            f"--resume auto: the run in {run_dir} went on from {source} and has saved no checkpoint since. That one "
            f"{reason}. Name another one with --resume PATH, or {_ANEW}."
        )
    _say_if_unverified(source)
    logger.warning("Resuming from %s, which the run here went on from: it has saved no checkpoint since.", source)
    return source


def _say_if_unverified(checkpoint: Path) -> None:
    if not (checkpoint / MANIFEST).exists():
        logger.warning(
            "%s has no %s (another tool or an earlier version has written it): its files can be read, whether they are "
            "as they were saved is not known.",
            checkpoint,
            MANIFEST,
        )


def _instead(run_dir: Path, refused: Path) -> str:
    """What else there is to go on from, as a sentence of its own."""
    for path in reversed(numbered(run_dir)):
        if path.resolve() != refused and not missing_files(path):
            return f" Name another one, such as {path}, or take --resume auto."
    return ""


def _is_sharded(checkpoint: Path) -> bool:
    return any(checkpoint.glob("global_step*")) or any(checkpoint.glob("pytorch_model_fsdp*"))


def _is_model_alone(checkpoint: Path, missing: list[str]) -> bool:
    state = ["optimizer.pt", "scheduler.pt", "rng_state.pth"]
    return missing == state and bool(read_map(checkpoint / TRAINER_STATE))


def _holds_something(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
