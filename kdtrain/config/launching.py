"""How a run is launched: its processes and machines, from the config and from accelerate's own file together.

Nothing here imports torch or accelerate: what cannot work is refused before either is loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdtrain.config.schema import RunConfig
from kdtrain.config.tree import KeyPath, Problem

BUILT_IN = ("ddp", "fsdp2", "zero2", "zero3")
"""Names of `launch.config_file` that are files of this package; a file of that name is ./fsdp2."""
DEFAULT_PORT = 29500
"""Of the first machine, where several meet: accelerate's own."""

_FOLDER = Path(__file__).parent / "accelerate"
_FILE: KeyPath = ("launch", "config_file")


@dataclass(frozen=True)
class Launching:
    """What a run is launched with; what the config says wins over accelerate's file."""

    file: Path | None
    """accelerate's."""
    of_file: Mapping[str, Any]
    """What it holds; nothing where it cannot be read, which `run_files.py` says."""
    is_built_in: bool
    processes: int | None
    """Of all machines; None is one for each visible device."""
    machines: int
    machine_rank: int | None
    ip: str | None
    port: int

    @property
    def kind(self) -> str:
        """accelerate's `distributed_type`, in capitals; empty without a file."""
        return str(self.of_file.get("distributed_type", "")).upper()


def launching(config: RunConfig) -> Launching:
    """The launch that a config asks for."""
    launch, built_in = config.launch, config.launch.config_file in BUILT_IN
    file = None if launch.config_file is None else accelerate_file(launch.config_file)
    held = {} if file is None else read_map(file)
    theirs = {} if built_in else held  # the numbers in ours are examples
    count = theirs.get("num_processes")
    of_file = count if isinstance(count, int) and count > 0 else None
    return Launching(
        file=file,
        of_file=held,
        is_built_in=built_in,
        processes=launch.num_processes or of_file,
        machines=launch.num_machines or _number(theirs.get("num_machines")) or 1,
        machine_rank=launch.machine_rank if launch.machine_rank is not None else _number(theirs.get("machine_rank")),
        ip=launch.main_process_ip or theirs.get("main_process_ip"),
        port=launch.main_process_port or _number(theirs.get("main_process_port")) or DEFAULT_PORT,
    )


def accelerate_file(config_file: str) -> Path:
    """The file that `launch.config_file` means."""
    return _FOLDER / f"{config_file}.yaml" if config_file in BUILT_IN else Path(config_file)


def read_map(file: Path) -> dict[str, Any]:
    """What a YAML file holds; nothing where it is not there or no map."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def launch_problems(config: RunConfig) -> Iterator[Problem]:
    """What of a launch cannot work, or would become another one without a word."""
    found = launching(config)
    yield from _of_kind(config, found)
    yield from _of_machines(config, found)
    if found.file is not None and found.of_file and found.processes is None and not found.is_built_in:
        message = f"{found.file} says no num_processes, and accelerate wants it"
        yield Problem(_FILE, message, "set launch.num_processes, or --num-processes")
    if found.processes and found.processes % found.machines:
        message = f"{found.processes} processes cannot be spread evenly over {found.machines} machines"
        yield Problem(
            ("launch", "num_processes"), message, f"num_processes counts all machines: a multiple of {found.machines}"
        )


def _of_kind(config: RunConfig, found: Launching) -> Iterator[Problem]:
    """What accelerate's file says of how the models are spread."""
    several = found.machines > 1 or (found.processes or 1) > 1
    if found.kind in ("MULTI_CPU", "NO") and several and not found.of_file.get("mpirun_config"):
        message = f"of distributed_type: {found.kind} accelerate makes one process on each machine, which trains alone"
        yield Problem(_FILE, message, "write MULTI_GPU, which is right on a CPU too, or launch.config_file: ddp")
    if found.kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        hint = "pip install deepspeed, or take fsdp2"
        yield Problem(_FILE, "needs the package deepspeed, which is not installed", hint)
    pieces = [name for name in ("deepspeed", "fsdp") if config.training.get(name)]
    if found.kind in ("DEEPSPEED", "FSDP") and pieces:
        message = f"training.{pieces[0]} says already how the models are cut into pieces"
        yield Problem(_FILE, message, f"remove training.{pieces[0]}, or take launch.config_file: ddp")
    options = found.of_file.get("fsdp_config") or {}
    if found.kind == "FSDP" and "SHARDED" in str(options.get("fsdp_state_dict_type", "")).upper():
        message = "fsdp_state_dict_type: SHARDED_STATE_DICT saves pieces and no model, with which the run would end"
        yield Problem(_FILE, message, "write FULL_STATE_DICT")


def _of_machines(config: RunConfig, found: Launching) -> Iterator[Problem]:
    """Whether several machines can find each other."""
    launch = config.launch
    if found.machines == 1:
        for name in ("machine_rank", "main_process_ip", "main_process_port"):
            if getattr(launch, name) is not None:
                message = "has no effect: the run is on one machine"
                yield Problem(("launch", name), message, "set launch.num_machines", level="warning", on_key=True)
        return
    path: KeyPath = ("launch", "num_machines")
    if found.ip is None:
        message = f"{found.machines} machines need an address at which they meet"
        yield Problem(path, message, "give --main-process-ip, the address of the machine of rank 0, on each")
    if found.machine_rank is None:
        hint = f"give --machine-rank on each, 0 to {found.machines - 1}, with otherwise the same command"
        yield Problem(path, "nothing says which of the machines this one is", hint)
    elif found.machine_rank >= found.machines:
        message = f"there are {found.machines} machines, and their ranks count from 0"
        yield Problem(("launch", "machine_rank"), message, f"0 to {found.machines - 1}")
