"""Of the ranks of a run that fail, one says why.

All of them see that a file is not there, and then print the same; and where one has failed, its launcher stops the
others, which say that as well. So the first one leaves what it says in a file that those of its machine know, and a
rank that has nothing else to say is silent.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

from kdtrain.errors import Interrupted, KdtrainError, LostRankError
from kdtrain.ranks import rank, under_launcher, world_size
from kdtrain.runs.launch import launchers_folder

_NAME = "kdtrain-{}-said"
_OLD_S = 3600.0


def to_say(error: KdtrainError, message: str) -> str | None:
    """What this process says of an error: the message, with its rank where another one has said something else; None
    where nothing is left to say.
    """
    if not under_launcher() or world_size() == 1:
        return message
    said = _said(message)
    if said is None:
        return message
    follows = isinstance(error, Interrupted | LostRankError)
    return None if follows or said == message else f"rank {rank()}: {message}"


def _said(message: str) -> str | None:
    """What another rank of this machine has said; None where this is the first."""
    path = _file()
    for old in path.parent.glob(_NAME.format("*")):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _OLD_S:  # of another launcher, which nobody else would remove
                old.unlink()
    try:
        with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(message)
        return None
    except FileExistsError:
        time.sleep(0.05)  # it may be written at this moment
        with contextlib.suppress(OSError):
            return path.read_text("utf-8")
    except OSError:
        return None
    return ""


def _file() -> Path:
    folder = launchers_folder()
    if folder is not None:
        return folder / _NAME.format("rank")
    # A launcher that was not ours has left nothing but itself: its process is the parent of the ranks.
    launch = f"{os.getuid()}-{os.getppid()}-{os.environ.get('TORCHELASTIC_RUN_ID', '')}"
    launch += f"-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{os.environ.get('MASTER_PORT', '')}"
    return Path(tempfile.gettempdir()) / _NAME.format("".join(c if c.isalnum() or c == "-" else "_" for c in launch))
