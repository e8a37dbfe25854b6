"""`status.json` of a run folder: how a run ended, or that it still goes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def write_status(run_dir: Path, state: str, exit_code: int | None = None, message: str = "") -> None:
    """Write `status.json` if the run folder exists; rank 0 always, another rank only to report its failure."""
    if not run_dir.is_dir() or (rank() != 0 and state != "failed"):
        return
    if state == "failed" and read_map(run_dir / STATUS).get("state") == "failed":
        return  # the first failure is the cause, the others follow from it
    status = {"state": state, "exit_code": exit_code, "message": message, "rank": rank(), "time": time.time()}
    write_atomically(run_dir / STATUS, json.dumps(status, indent=2) + "\n")
