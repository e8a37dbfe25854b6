"""`status.json` of a run folder: how a run ended, or that it still goes."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdtrain.errors import KdtrainError

STATUS = "status.json"


@contextmanager
def tracked_status(run_dir: Path) -> Iterator[None]:
    """Keep `status.json` of a run that has begun true: a launcher's exit status says nothing about a worker's.

    A run that never began leaves nothing behind, not even the folder that building the trainer makes.
    """
    existed = run_dir.exists()
    try:
        yield
    except BaseException as error:
        code = error.exit_code if isinstance(error, KdtrainError) else 1
        code = 130 if isinstance(error, KeyboardInterrupt) else code
        if (run_dir / STATUS).exists():
            state = "stopped" if code in (130, 143) else "failed"
            write_status(run_dir, state, code, str(error) if isinstance(error, KdtrainError) else repr(error))
        elif not existed:
            with contextlib.suppress(OSError):  # somebody else's files keep it
                run_dir.rmdir()
        raise
    write_status(run_dir, "finished", 0, "")


def write_status(run_dir: Path, state: str, exit_code: int | None, message: str) -> None:
    """Write `status.json` if the run folder exists; rank 0 always, another rank only to report its failure."""
    rank = int(os.environ.get("RANK", "0"))
    if not run_dir.is_dir() or (rank != 0 and state != "failed"):
        return
    if state == "failed" and _read_state(run_dir) == "failed":
        return  # the first failure is the cause, the others follow from it
    status = {"state": state, "exit_code": exit_code, "message": message, "rank": rank, "time": time.time()}
    write_atomically(run_dir / STATUS, json.dumps(status, indent=2) + "\n")


def _read_state(run_dir: Path) -> str | None:
    try:
        return json.loads((run_dir / STATUS).read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError):
        return None


def write_atomically(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
