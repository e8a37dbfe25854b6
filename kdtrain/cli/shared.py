"""What several commands share: their arguments, how a config is loaded, launching, the console.

Nothing here imports torch before a command needs it: help and static validation answer at once.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdtrain.cli import complete, process
from kdtrain.cli.meeting import check_variables
from kdtrain.errors import ConfigError
from kdtrain.ranks import is_main, under_launcher, world_size

if TYPE_CHECKING:
    from rich.console import Console

    from kdtrain.config import RunConfig
    from kdtrain.config.load import FileCheck

logger = logging.getLogger("kdtrain")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file that is the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.SUB=VALUE]...", help="Options that win, such as rlhf.beta=0.1.", autocompletion=complete.option
    ),
]
LogFormat = Annotated[str, typer.Option(help="text, or json: one per line.", autocompletion=complete.log_format)]
NoLaunch = Annotated[bool, typer.Option("--no-launch", help="Stay in this process, and start no others.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Warnings and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Tracebacks and the libraries' own messages.")]
AsJson = Annotated[bool, typer.Option("--json", help="As JSON on stdout.")]


def loaded(
    config: Path,
    overrides: list[str] | None,
    log_format: str,
    debug: bool,
    *,
    files: FileCheck,
    new_cache: bool = False,
) -> RunConfig:
    """The config of a command that several processes may run, whose log only one of them shows.

    `files` looks at the files that the config names, before torch is imported.
    """
    from kdtrain.config import ConfigLoader
    from kdtrain.runs import launch

    set_up(log_format, debug)
    if launch.launched_by_us() or not is_main():
        logger.setLevel(logging.ERROR)  # the launching process, or rank 0, logs the same
    return ConfigLoader.load(config, overrides or [], files=files, new_cache=new_cache)


def set_up(log_format: str, debug: bool) -> None:
    """Logging as `--log-format` and `--debug` say; and whether what a launcher says of this process can be."""
    process.set_up_logging(log_format, debug)
    check_variables()
    if log_format not in ("text", "json"):
        raise ConfigError(f"--log-format must be text or json, got {log_format!r}")


def launch_options(config: Path, overrides: Sequence[str], given: Mapping[str, int | str | None]) -> list[str]:
    """What `--num-processes` and its like say, as options of the config, which they win over; that is said once."""
    from kdtrain.config.sources import Composer
    from kdtrain.config.tree import get
    from kdtrain.runs import launch

    said = {name: value for name, value in given.items() if value is not None}
    if not said:
        return []
    root = Composer().compose(config, overrides)
    for name, value in said.items():
        node = get(root, ("launch", name))
        before = None if node is None else node.value
        if before is not None and before != value and not launch.launched_by_us() and is_main():
            logger.warning("--%s %s wins over launch.%s: %s.", name.replace("_", "-"), value, name, before)
    return [f"launch.{name}={json.dumps(value)}" for name, value in said.items()]


def refuse_several_processes(config: RunConfig, no_launch: bool) -> None:
    """A sweep is one process: refuse what would be several, with the ways out."""
    from kdtrain.cli.environment import visible_gpus
    from kdtrain.runs import launch

    if no_launch and not under_launcher():
        return
    if config.launch.config_file and not under_launcher():
        raise ConfigError(
            "--sweep is one process, and launch.config_file starts others. Take it out: launch.config_file="
        )
    count = world_size() if under_launcher() else launch.wanted_processes(config, visible_gpus())
    if count > 1:
        raise ConfigError(
            f"--sweep makes its runs one after the other in one process, and here there would be {count}. Add "
            "launch.num_processes=1, with CUDA_VISIBLE_DEVICES=0 in front of the command where there are several GPUs; "
            "or make the runs one by one, without --sweep."
        )


def launch_if_wanted(config: RunConfig, quiet: bool, run_dir: Path | None = None) -> None:
    """Hand this command to `accelerate launch`, and end with it, where several processes are wanted.

    `run_dir`: where the run says how it ended; here that is said of one that was killed.
    """
    from kdtrain.cli.environment import visible_gpus
    from kdtrain.runs import launch
    from kdtrain.runs.status import note_death

    if under_launcher():
        return
    devices = visible_gpus()
    processes = launch.wanted_processes(config, devices)
    if processes > 1 or config.launch.config_file:
        command = launch.launch_command(config, processes, sys.argv[1:], on_cpu=devices == 0)
        if not quiet:
            logger.info(launch.shown(command))
        code = launch.run_launcher(command, processes)
        if code and run_dir is not None:
            note_death(run_dir, code)
        if code and process.in_json():  # the launcher's own last words are text
            logger.critical("The run failed.", extra={"values": {"exit_code": code}})
        sys.exit(code)


def console_for(quiet: bool, log_format: str) -> Console:
    """Where progress is shown; on a terminal it says what the next seconds are for."""
    from rich.console import Console

    console = Console(stderr=True)
    if not quiet and log_format == "text" and console.is_terminal:
        console.print("loading torch and trl …", style="dim")
    return console
