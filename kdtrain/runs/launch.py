"""When and how `fit` hands itself to `accelerate launch`, and whether the processes it got are those asked for.

Most ways of asking accelerate for two processes on a CPU silently give one: `--cpu` and `distributed_type: MULTI_CPU`
do. `--multi_gpu` with `use_cpu` in the training arguments works, and is what is used here. FSDP on a CPU accelerate
takes for plain data parallelism without a word: it is refused.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdtrain.config import RunConfig
from kdtrain.config.launching import launching
from kdtrain.errors import PreflightError
from kdtrain.ranks import under_launcher, world_size
from kdtrain.runs.parent import GRACE_S, started_by_me
from kdtrain.runs.signals import passed_on_to

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

_ACCELERATE = (sys.executable, "-m", "kdtrain.runs.agent")
EXIT_CODE_FILE = "KDTRAINEXIT_CODE_FILE"
PROCESSES = "KDTRAIN_PROCESSES"
"""Variable with the processes that `kdtrain fit` has asked its launcher for."""


def launched_by_us() -> bool:
    """Whether `kdtrain fit` started the launcher of this process."""
    return EXIT_CODE_FILE in os.environ


def launchers_folder() -> Path | None:
    """A folder that the ranks of a launcher share that `kdtrain fit` has started; it goes with the launcher."""
    path = Path(os.environ.get(EXIT_CODE_FILE, ""))
    return path.parent if launched_by_us() and path.parent.is_dir() else None


def wanted_processes(config: RunConfig, visible_devices: int) -> int:
    """Ranks that a run is to have on all machines: what config or accelerate's file says, else one for each visible
    accelerator, else one for each machine."""
    found = launching(config)
    return found.processes or max(visible_devices, 1) * found.machines


def launch_command(config: RunConfig, num_processes: int, arguments: Sequence[str], on_cpu: bool) -> list[str]:
    """The `accelerate launch` command line that runs `kdtrain` with these arguments."""
    command, found = [*_ACCELERATE, "launch"], launching(config)
    command += ["--config_file", str(found.file)] if found.file else []
    if found.file is None or found.is_built_in or config.launch.num_processes is not None:
        command += ["--num_processes", str(num_processes)]
    if found.file is None or found.is_built_in or config.launch.num_machines is not None:
        command += ["--num_machines", str(found.machines)]
    if found.file is None:
        command += ["--dynamo_backend", "no", "--mixed_precision", "no"]  # decided by training.bf16 and training.fp16
        command += ["--multi_gpu"] if num_processes > 1 else []
    if found.machines > 1:
        command += ["--machine_rank", str(found.machine_rank), "--main_process_ip", str(found.ip)]
        command += ["--main_process_port", str(found.port)]
    elif found.file is None or found.is_built_in:
        # Port 0 lets the launcher find a free one, so that two runs can share a machine.
        command += ["--main_process_port", "0"]
    if on_cpu:
        here = max(num_processes // found.machines, 1)
        command += ["--num_cpu_threads_per_process", str(max((os.cpu_count() or 1) // here, 1))]
    return [*command, "-m", "kdtrain", *arguments]


def run_launcher(command: Sequence[str], num_processes: int) -> int:
    """Run the launcher to its end; return the exit code of the worker that failed first, 0 if none did.

    Of several workers that end within moments a launcher does not know which was the first, so they leave their code in
    a file that this process names.
    """
    with tempfile.TemporaryDirectory() as folder:
        exit_code = Path(folder) / "exit_code"
        environment = {**started_by_me(), EXIT_CODE_FILE: str(exit_code), PROCESSES: str(num_processes)}
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        with passed_on_to(process):
            status = process.wait()
        if status < 0:  # it was killed
            logger.error("The launcher was ended by %s, and the run with it.", signal.Signals(-status).name)
            status = 128 - status
            _see_ended(exit_code)
        return int(exit_code.read_text()) if status and exit_code.exists() else status


def _see_ended(exit_code: Path) -> None:
    """Wait for the ranks of a launcher that is gone: they end by themselves, see `parent.py`, or are killed here."""
    import psutil

    ranks = [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get(EXIT_CODE_FILE) == str(exit_code)
    ]
    for process in psutil.wait_procs(ranks, timeout=GRACE_S + 5)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()


def report_exit_code(code: int) -> None:
    """Leave a failing worker's exit code to the process that launched it; the first one counts."""
    path = os.environ.get(EXIT_CODE_FILE)
    if path and code:
        with contextlib.suppress(FileExistsError, FileNotFoundError), open(path, "x") as file:
            file.write(str(code))


def shown(command: Sequence[str]) -> str:
    """The command as one would type it."""
    return shlex.join(command).replace(shlex.join(_ACCELERATE), "accelerate", 1)


def check_world(args: TrainingArguments, config: RunConfig) -> None:
    """Refuse fewer or more processes than the launcher or the config said, and pieces that nobody would cut.

    To be called when the processes have met, before a model is loaded.
    """
    got, asked = args.world_size, max(world_size(), int(os.environ.get(PROCESSES, 1)))
    if got == 1 < asked:
        raise PreflightError(
            f"The launcher was asked for {asked} processes, but each of them is alone (world size {got}): they would "
            "train independent models. Remove training.use_cpu and training.ddp_backend, and launch with `kdtrain fit`."
        )
    wanted = config.launch.num_processes
    if got != asked or (wanted is not None and under_launcher() and wanted != got):
        raise PreflightError(
            f"launch.num_processes is {asked if wanted is None else wanted}, but the launcher started {got}. Change "
            "one of them, or start with `kdtrain fit`, which launches by itself."
        )
    if args.device.type == "cpu" and (args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"):
        raise PreflightError(
            "FSDP needs GPUs: on a CPU accelerate ignores it, and each process would hold whole models. Set "
            "launch.config_file: ddp, or zero3, which cuts models into pieces on a CPU too, and remove training.fsdp."
        )
