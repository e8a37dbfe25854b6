"""The processes of a run find each other: variables that cannot be right are refused, and waiting is said.

torch waits for minutes without a word. Often nobody else will come: the variables are left from another program, or
from the job that a shell was started in.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from kdtrain.cli import process
from kdtrain.data.errors import show
from kdtrain.errors import PreflightError
from kdtrain.ranks import VARIABLES, rank, under_launcher, world_size
from kdtrain.runs.launch import launched_by_us

logger = logging.getLogger(__name__)

_SAID_AFTER_S = 15.0
_HERE = ("localhost", "127.0.0.1", "::1")


def check_variables() -> None:
    """Refuse what no launcher writes.

    Raises:
        PreflightError: they are incomplete, or no numbers.
    """
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    for name in found:
        if name != "MASTER_ADDR" and not found[name].isdecimal():
            raise PreflightError(f"{name} is {show(repr(found[name]))}, and has to be a number. {_unset(found)}")
    if world_size() == 1:
        _refuse_alone()
        return
    missing = [name for name in VARIABLES if name not in found and name != "LOCAL_RANK"]
    if missing:
        raise PreflightError(
            f"WORLD_SIZE is {world_size()}, as a launcher of several processes sets it, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set. {_unset(found)}"
        )
    if rank() >= world_size():
        raise PreflightError(f"RANK is {rank()}, and WORLD_SIZE {world_size()}: ranks count from 0. {_unset(found)}")
    if not _has_launcher():
        logger.warning("This process takes itself for rank %d of %d. %s", rank(), world_size(), _unset(found))


@contextmanager
def meeting() -> Iterator[None]:
    """Inside, the processes meet. Where they do not, that is said after 15 s.

    And where all of them would be on this machine and no launcher is known, the process ends then: exit code 3.
    """
    if world_size() == 1:
        yield
        return
    timer = threading.Timer(_SAID_AFTER_S, _say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say() -> None:
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized():
            return
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    what = f"rank {rank()} of {world_size()} waits for the others at {found['MASTER_ADDR']}:{found['MASTER_PORT']}"
    if _has_launcher() or found["MASTER_ADDR"] not in _HERE:
        logger.error(
            "%s, for %.0f s now. Are they started, and is that address reached from here?", what, _SAID_AFTER_S
        )
        return
    message = f"kdtrain: {what}, and after {_SAID_AFTER_S:.0f} s not all of them are there. {_unset(found)}"
    print(message, file=sys.stderr, flush=True)
    process.end_now(PreflightError.exit_code)  # the main thread is in torch, and hears no exception


def _refuse_alone() -> None:
    """Refuse to be the one process that `accelerate launch` has made of several without a word.

    So it does for --cpu and `distributed_type: MULTI_CPU`: the address at which the others would be met is set, and
    nothing says that there are others.
    """
    of_accelerate = "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ
    if of_accelerate and not under_launcher() and not _of_mpi() and not _asked_for_one():
        raise PreflightError(
            "accelerate launch was asked for several processes, and has started this one alone, as it does with --cpu "
            "and distributed_type: MULTI_CPU. Use --multi_gpu or MULTI_GPU, which is right on a CPU too, or start with "
            "`kdtrain fit --num-processes N`. If one process is meant: unset MASTER_PORT."
        )


def _asked_for_one() -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        words = psutil.Process(os.getppid()).cmdline()
        text = " ".join(words).replace("=", " ").replace("-", "_")
        return "__num_processes 1 " in text
    return False


def _has_launcher() -> bool:
    """Whether a launcher has started this process just now; what a shell in a SLURM job inherits is none."""
    of_torch = launched_by_us() or "TORCHELASTIC_RUN_ID" in os.environ
    return of_torch or _of_mpi() or os.environ.get("SLURM_NTASKS") == str(world_size())


def _of_mpi() -> bool:
    return any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))


def _unset(found: dict[str, str]) -> str:
    return (
        f"If no launcher was meant to start this process, these variables are left over: unset {' '.join(found)}. "
        "Several processes are started by `kdtrain fit` itself (launch.num_processes), torchrun or accelerate launch."
    )
