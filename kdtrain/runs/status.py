"""`status.json` of a run folder: how a run ended, or that it still goes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdtrain.config.model_folder import read_map
from kdtrain.errors import Interrupted, KdtrainError
from kdtrain.ranks import rank
from kdtrain.runs.folder import STATUS, write_atomically


@contextmanager
def tracked_status(run_dir: Path) -> Iterator[None]:
    """Keep `status.json` of a run that has begun true: a launcher's exit status says nothing about a worker's.

    A run that never began leaves nothing behind, not even the folder that building the trainer makes.
    """
    existed = run_dir.exists()
    try:
        yield
    except BaseException as error:
        state = "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        code, message = 130 if isinstance(error, KeyboardInterrupt) else 1, repr(error)
        if isinstance(error, KdtrainError):
            code, message = error.exit_code, str(error)
        if (run_dir / STATUS).exists():
            write_status(run_dir, state, code, message)
        elif not existed:
            with contextlib.suppress(OSError):  # somebody else's files keep it
                run_dir.rmdir()
        raise
    write_status(run_dir, "finished", 0)


def write_status(
    run_dir: Path,
    state: str,
    exit_code: int | None = None,
    message: str = "",
    teacher: Mapping[str, int] | None = None,
) -> None:
    """Write `status.json` if the run folder exists; rank 0 always, another rank only to report its failure.

    Args:
        teacher: what answers have cost in all runs in this folder: `requests`, and tokens as the server has counted
            them. None keeps what is there.
    """
    if not run_dir.is_dir() or (rank() != 0 and state != "failed"):
        return
    if state == "failed" and read_map(run_dir / STATUS).get("state") == "failed":
        return  # the first failure is the cause, the others follow from it
    status: dict[str, Any] = {"state": state, "exit_code": exit_code, "message": message}
    status |= {"rank": rank(), "time": time.time()}
    cost = teacher or teacher_cost(run_dir)
    status |= {"teacher": dict(cost)} if cost else {}
    write_atomically(run_dir / STATUS, json.dumps(status, indent=2) + "\n")


def teacher_cost(run_dir: Path) -> dict[str, int]:
    """What `status.json` says that answers of the teacher have cost."""
    found = read_map(run_dir / STATUS).get("teacher")
    return found if isinstance(found, dict) else {}
