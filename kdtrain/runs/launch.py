"""When and how `fit` hands itself to `accelerate launch`, and whether the processes it got are those asked for.

Most ways of asking accelerate for two processes on a CPU silently give one: `--cpu` and `distributed_type: MULTI_CPU`
do. `--multi_gpu` with `use_cpu` in the training arguments works, and is what is used here.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kdtrain.errors import PreflightError
from kdtrain.ranks import under_launcher, world_size
from kdtrain.runs.signals import passed_on_to

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kdtrain.config import RunConfig
    from kdtrain.trainer import GKDTrainerWithMetrics

_EXIT_CODE_FILE = "KDTRAIN_EXIT_CODE_FILE"


def launched_by_us() -> bool:
    """Whether `kdtrain fit` started the launcher of this process."""
    return _EXIT_CODE_FILE in os.environ


def wanted_processes(config: RunConfig, visible_devices: int) -> int:
    """Ranks that a run is to have: what the config says, else one for each visible accelerator, else one."""
    return config.launch.num_processes or max(visible_devices, 1)


def launch_command(config: RunConfig, num_processes: int, arguments: Sequence[str], on_cpu: bool) -> list[str]:
    """The `accelerate launch` command line that runs `kdtrain fit` with these arguments.

    Args:
        arguments: everything after `kdtrain`, as the user typed it.
        on_cpu: no accelerator is there.
    """
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    if config.launch.config_file:
        command += ["--config_file", config.launch.config_file]
        if config.launch.num_processes is not None:  # else the file says how many, over all machines
            command += ["--num_processes", str(num_processes)]
    else:
        command += ["--num_processes", str(num_processes), "--num_machines", "1", "--dynamo_backend", "no"]
        command += ["--mixed_precision", "no"]  # decided by training.bf16 and training.fp16
        if num_processes > 1:
            command += ["--multi_gpu"]
        # Port 0 lets the launcher find a free one, so that two runs can share a machine.
        command += ["--main_process_port", "0"]
    if on_cpu:
        command += ["--num_cpu_threads_per_process", str(max((os.cpu_count() or 1) // num_processes, 1))]
    return [*command, "-m", "kdtrain", *arguments]


def run_launcher(command: Sequence[str]) -> int:
    """Run the launcher to its end; return the exit code of the worker that failed first, 0 if none did.

    A launcher exits with 1 whatever befell a worker, so workers leave their code in a file that this process names.
    """
    with tempfile.TemporaryDirectory() as folder:
        exit_code = Path(folder) / "exit_code"
        process = subprocess.Popen(command, env={**os.environ, _EXIT_CODE_FILE: str(exit_code)})
        with passed_on_to(process):
            status = process.wait()
        return int(exit_code.read_text()) if status and exit_code.exists() else status


def report_exit_code(code: int) -> None:
    """Leave a failing worker's exit code to the process that launched it; the first one counts."""
    path = os.environ.get(_EXIT_CODE_FILE)
    if path and code:
        with contextlib.suppress(FileExistsError, FileNotFoundError), open(path, "x") as file:
            file.write(str(code))


def shown(command: Sequence[str]) -> str:
    """The command as one would type it."""
    text = shlex.join(command)
    return text.replace(f"{sys.executable} -m accelerate.commands.accelerate_cli", "accelerate", 1)


def check_world(accelerator: Accelerator, config: RunConfig) -> None:
    """Refuse a world that is not the one asked for.

    Raises:
        PreflightError: fewer or more processes than the launcher or the config said.
    """
    got = accelerator.num_processes
    asked = world_size()
    if got != asked:
        raise PreflightError(
            f"The launcher started {asked} processes, but each of them is alone (world size {got}): they would train "
            "independent models. Remove training.use_cpu and training.ddp_backend, and launch with `kdtrain fit`."
        )
    wanted = config.launch.num_processes
    if wanted is not None and under_launcher() and wanted != got:
        raise PreflightError(
            f"launch.num_processes is {wanted}, but the launcher started {got}. Change one of them, or start with "
            "`kdtrain fit`, which launches by itself."
        )


def check_wrapped(trainer: GKDTrainerWithMetrics) -> None:
    """Refuse to train several ranks that would never average their gradients, or without the DeepSpeed asked for.

    Some ways of launching give a world of two without the wrapper that reduces gradients, and exit with 0.

    Raises:
        PreflightError: naming the wrapper that there is.
    """
    import torch  # the process that starts a launcher does without it

    if trainer.args.deepspeed and not trainer.is_deepspeed_enabled:
        # accelerate takes ACCELERATE_USE_CPU, which some launchers set, for a wish to go without.
        raise PreflightError(
            "training.deepspeed is set, but this run is without DeepSpeed (its distributed type is "
            f"{trainer.accelerator.distributed_type.value}). Unset ACCELERATE_USE_CPU, or remove the option."
        )
    if trainer.accelerator.num_processes == 1 or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    if not isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel):
        raise PreflightError(
            f"{trainer.accelerator.num_processes} processes, but the model is wrapped in "
            f"{type(trainer.model_wrapped).__name__} (distributed type {trainer.accelerator.distributed_type}): "
            "gradients would not be averaged. Launch with `kdtrain fit` and launch.num_processes, or with torchrun."
        )
