"""`status.json` of a run folder: how a run ended, or that it still goes, and where it is; and `error.log`.

| key | what |
|---|---|
| `state` | running, finished, stopped or failed |
| `exit_code`, `message` | how it ended; null and what it does meanwhile |
| `rank`, `pid`, `host` | the process that says so |
| `time` | when, in seconds since 1970 |
| `step` | optimizer steps so far, as of the last record |
| `last_checkpoint` | the folder's name; null where there is none |
| `best` | the step that won so far: `step`, `metric`, `value`; null without evaluation |
| `resumed_from` | path of the checkpoint that the run went on from; null where it began at step 0 |
| `teacher` | what its answers have cost, where a server writes them |
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdtrain.config.model_folder import read_map
from kdtrain.errors import CheckpointError, Interrupted, KdtrainError
from kdtrain.ranks import rank
from kdtrain.runs.changed import ChangedRunError
from kdtrain.runs.folder import ERRORS, STATUS, write_atomically, writing_record
from kdtrain.runs.lock import TakenError, goes_on

_PROGRESS: dict[str, Any] = {"step": 0, "last_checkpoint": None, "best": None, "resumed_from": None}


@contextmanager
def tracked_status(run_dir: Path) -> Iterator[None]:
    """Keep `status.json` of a run that has begun true: a launcher's exit status says nothing about a worker's.

    A run that never began leaves nothing behind, not even the folder that building the trainer makes.
    """
    existed = run_dir.exists()
    try:
        yield
    except ChangedRunError:  # nothing has begun: what the folder says of its run stays true
        raise
    except BaseException as error:
        state = "stopped" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
        code, message = 130 if isinstance(error, KeyboardInterrupt) else 1, repr(error)
        if isinstance(error, KdtrainError):
            code, message = error.exit_code, str(error)
        if isinstance(error, TakenError):
            raise
        if (run_dir / STATUS).exists():
            if state == "failed":
                _keep_traceback(run_dir / ERRORS, error)
            with contextlib.suppress(CheckpointError):  # the same full disk, say: it hides no other error
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
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Write `status.json` if the run folder exists; rank 0 always, another rank only to report its failure.

    Args:
        teacher: what answers have cost in all runs in this folder: `requests`, and tokens as the server has counted
            them. None keeps what is there.
        progress: `step`, `last_checkpoint`, `best` and `resumed_from`, or some of them; the others keep what is there.
    """
    if not run_dir.is_dir() or (rank() != 0 and state != "failed"):
        return
    before = read_map(run_dir / STATUS)
    if state in ("failed", "stopped") and before.get("state") == "failed":
        return  # the first failure is the cause; the others, and a launcher's SIGTERM, follow from it
    status: dict[str, Any] = {"state": state, "exit_code": exit_code, "message": message}
    status |= {"rank": rank(), "time": time.time(), "pid": os.getpid(), "host": socket.gethostname()}
    status |= {key: before.get(key, default) for key, default in _PROGRESS.items()} | dict(progress or {})
    cost = teacher or teacher_cost(run_dir)
    status |= {"teacher": dict(cost)} if cost else {}
    with writing_record(run_dir / STATUS):
        write_atomically(run_dir / STATUS, json.dumps(status, indent=2) + "\n")


def write_progress(run_dir: Path, **progress: Any) -> None:
    """Write where a run is that goes on; nothing where another rank has said that it failed."""
    if read_map(run_dir / STATUS).get("state") == "running":
        write_status(run_dir, "running", progress=progress)


def note_death(run_dir: Path, exit_code: int) -> None:
    """Write how a run ended whose processes did not, because they were killed; called where its launcher has ended."""
    before = read_map(run_dir / STATUS)
    if before.get("state") in (None, "finished") or before.get("exit_code") == exit_code:
        return
    message = before.get("message") if before["state"] == "failed" else None
    status = {**before, "state": "failed", "exit_code": exit_code, "time": time.time()}
    status["message"] = message or "A process of the run was killed, and with it the run ended."
    with contextlib.suppress(OSError):
        write_atomically(run_dir / STATUS, json.dumps(status, indent=2) + "\n")


def read_status(run_dir: Path) -> dict[str, Any]:
    """What `status.json` holds; `died` in place of `running` where no process holds the folder's lock any more."""
    status = read_map(run_dir / STATUS)
    return {**status, "state": "died"} if status.get("state") == "running" and not goes_on(run_dir) else status


def teacher_cost(run_dir: Path) -> dict[str, int]:
    """What `status.json` says that answers of the teacher have cost."""
    found = read_map(run_dir / STATUS).get("teacher")
    return found if isinstance(found, dict) else {}


def _keep_traceback(path: Path, error: BaseException) -> None:
    """Append to the log of what went wrong: a run that is resumed may fail again."""
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}, rank {rank()}\n{text}\n")
        error.__dict__["error_log"] = path  # for the last message
