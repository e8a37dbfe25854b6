"""`kdtrain fit`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdtrain.cli import complete, process
from kdtrain.cli.meeting import meeting
from kdtrain.cli.shared import (
    ConfigFile,
    Debug,
    LogFormat,
    NoLaunch,
    Overrides,
    Quiet,
    console_for,
    launch_if_wanted,
    launch_options,
    loaded,
    refuse_several_processes,
    set_up,
)
from kdtrain.cli.terminal import wrapped
from kdtrain.errors import ConfigError
from kdtrain.ranks import is_main, world_size

if TYPE_CHECKING:
    from kdtrain.config import RunConfig

logger = logging.getLogger("kdtrain")


def fit(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="auto: from the newest checkpoint. Or a path.")] = None,
    allow_changes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY,…",
            help="What may differ at --resume; data.content.",
            autocompletion=complete.changeable,
        ),
    ] = None,
    allow_world_size_change: Annotated[
        bool,
        typer.Option("--allow-world-size-change", help="A resumed stream may have other processes."),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Build all, try a window of each kind; no file."),
    ] = False,
    sweep: Annotated[bool, typer.Option("--sweep", help="A run for each of rlhf.beta=0,0.1,1, compared.")] = False,
    num_processes: Annotated[
        int | None, typer.Option(metavar="N", help="launch.num_processes: of all machines.")
    ] = None,
    num_machines: Annotated[
        int | None, typer.Option(metavar="M", help="launch.num_machines: how many there are.")
    ] = None,
    machine_rank: Annotated[
        int | None, typer.Option(metavar="R", help="launch.machine_rank: this one, from 0.")
    ] = None,
    main_process_ip: Annotated[
        str | None, typer.Option(metavar="IP", help="launch.main_process_ip: of machine 0.")
    ] = None,
    no_launch: NoLaunch = False,
    quiet: Quiet = False,
    log_format: LogFormat = "text",
    debug: Debug = False,
) -> None:
    """Train: model, report.html and logs go to training.output_dir. Of several processes it prints and runs the line
    of `accelerate launch`.
    """
    set_up(log_format, debug)
    launching = {
        "num_processes": num_processes,
        "num_machines": num_machines,
        "machine_rank": machine_rank,
        "main_process_ip": main_process_ip,
    }
    overrides = [*(overrides or []), *launch_options(config, overrides or [], launching)]
    if sweep:
        _sweep(config, overrides, resume, allow_changes, dry_run, no_launch, quiet, log_format, debug)
        return
    from kdtrain.config.diagnose import InvalidConfigError
    from kdtrain.preflight.files import all_files
    from kdtrain.runs.changed import refuse_changed_options
    from kdtrain.runs.lock import refuse_if_locked
    from kdtrain.runs.sweep_plan import with_sweep_named

    try:
        run_config = loaded(config, overrides, log_format, debug, files=all_files)
    except InvalidConfigError as error:
        raise with_sweep_named(error, overrides) from None
    run_dir = Path(run_config.training["output_dir"])
    refuse_if_locked(run_dir)
    allowed = _allowed(allow_changes, resume)
    if allow_world_size_change and resume is None:
        raise ConfigError("--allow-world-size-change is of a run that is resumed: add --resume auto, or remove it.")
    refuse_changed_options(run_config, resume, allowed)
    if not no_launch:
        launch_if_wanted(run_config, quiet, run_dir)
    _fit_here(run_config, resume, dry_run, quiet, log_format, allowed, allow_world_size_change)


def _sweep(
    config: Path,
    overrides: list[str],
    resume: str | None,
    allow_changes: list[str] | None,
    dry_run: bool,
    no_launch: bool,
    quiet: bool,
    log_format: str,
    debug: bool,
) -> None:
    """Make the runs of a sweep in this process."""
    from kdtrain.runs.sweep_plan import plan_sweep

    set_up(log_format, debug)
    if resume not in (None, "auto"):
        raise ConfigError(
            "--resume PATH is of one run. With --sweep it is --resume auto: runs that are missing are made."
        )
    allowed = _allowed(allow_changes, resume)
    plan = plan_sweep(config, overrides)
    refuse_several_processes(plan.runs[0].config, no_launch)
    console = console_for(quiet, log_format)
    from kdtrain.cli.sweep import sweep

    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    process.quiet_libraries(keep_bars=console.is_terminal and not quiet)
    sweep(plan, console, resume is not None, allowed, dry_run, quiet, log_format)


def _allowed(allow_changes: list[str] | None, resume: str | None) -> tuple[str, ...]:
    """The names of `--allow-changes`, checked."""
    from kdtrain.config.changes import checked_names

    if allow_changes and resume is None:
        raise ConfigError("--allow-changes is of a run that is resumed: add --resume auto, or remove it.")
    return checked_names(allow_changes or [])


def _fit_here(
    config: RunConfig,
    resume: str | None,
    dry_run: bool,
    quiet: bool,
    log_format: str,
    allowed: Sequence[str] = (),
    other_world_size: bool = False,
) -> None:
    """Train in this process, and print what came out."""
    console = console_for(quiet, log_format)
    from kdtrain.cli import outcome
    from kdtrain.cli.environment import warn_of_unseen_gpus
    from kdtrain.cli.progress import ConsoleReporter
    from kdtrain.config.arguments import build_train_arguments
    from kdtrain.runs.fit import fit as run_fit

    process.allow_many_files()
    if is_main():
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
    with meeting():
        arguments = build_train_arguments(config)
        if world_size() > 1:
            arguments.training_args.device  # noqa: B018 - the processes meet
    warn_of_unseen_gpus()
    process.quiet_libraries(keep_bars=console.is_terminal and not quiet)
    reporter = ConsoleReporter(console, log_format, quiet)
    result = run_fit(
        arguments,
        reporter,
        resume=resume,
        allow_changes=allowed,
        allow_world_size_change=other_world_size,
        dry_run=dry_run,
    )
    if is_main():
        written = outcome.as_json(result, dry_run) if log_format == "json" else outcome.as_text(result, dry_run)
        process.write_out(written if log_format == "json" else wrapped(written, sys.stdout))
    process.end_rank(0)
