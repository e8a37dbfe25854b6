"""What `kdtrain fit` starts: `accelerate launch`, and how it ends said in a line, not by a traceback of the launcher's.

    kdtrain fit -> python -m kdtrain.runs.agent launch … -> the ranks

Its exit code is that of the rank that failed first, 128 + the signal's number where one was killed or a signal came.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from kdtrain.runs.signals import ENDING, end_silently_at_interrupts

if __name__ == "__main__":
    end_silently_at_interrupts()  # until the launcher hears signals, which it imports torch for

from kdtrain.runs.launch import EXIT_CODE_FILE
from kdtrain.runs.parent import STARTED_BY, end_with_parent, started_by_me

# A signal to the launcher goes on to the ranks. torch waits 30 s for what they do about it, then kills them: a large
# checkpoint takes longer, and whoever has no time to wait kills the launcher.
_SAVING_S = 600

# They tell of each signal and of each rank that has ended.
_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")


def main() -> int:
    """Launch, with the arguments of `accelerate`; returns the exit code."""
    heard = [signum for signum in (*ENDING, signal.SIGQUIT) if signal.getsignal(signum) is not signal.SIG_IGN]
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(signal.Signals(signum).name for signum in heard))
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVING_S)))
    end_with_parent()
    os.environ[STARTED_BY] = started_by_me()[STARTED_BY]
    from accelerate.commands.accelerate_cli import main as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in _LOGGERS:
        logging.getLogger(name).addFilter(lambda record: False)  # not a level, which torch sets later
    try:
        accelerate()
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _code(f"rank {rank}", failure.pid, failure.exitcode)
    except subprocess.CalledProcessError as error:
        return _code("the process that trains", None, error.returncode)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _code(what: str, pid: int | None, code: int) -> int:
    """The exit code; of a process that was killed it is said here, for itself it cannot."""
    if code >= 0:
        return code
    # Those that end with it have said their own, and the first of them would count.
    Path(os.environ.get(EXIT_CODE_FILE, os.devnull)).write_text(str(128 - code))
    name = signal.Signals(-code).name
    why = " The system does that where the machine's memory is exhausted." if name == "SIGKILL" else ""
    pid_text = "" if pid is None else f" (pid {pid})"
    print(
        f"kdtrain: {what}{pid_text} was ended by {name}, and the others with it.{why} Saved checkpoints are intact.",
        file=sys.stderr,
    )
    return 128 - code


if __name__ == "__main__":
    sys.exit(main())
