"""`kdtrain cache`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdtrain.cli import process
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
    loaded,
)
from kdtrain.errors import ConfigError
from kdtrain.ranks import is_main, world_size

if TYPE_CHECKING:
    from kdtrain.config import RunConfig

logger = logging.getLogger("kdtrain")


def cache(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the cache; must be given.")] = None,
    mode: Annotated[str | None, typer.Option(help="topk (default), sample, hidden; for alm chunks.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Of topk: 50, or a server's top_k.")] = None,
    draws: Annotated[int | None, typer.Option(min=1, help="Of sample: 50.")] = None,
    hidden_dtype: Annotated[str | None, typer.Option(help="Of hidden: auto, or int8 (half the size).")] = None,
    verify: Annotated[int, typer.Option(min=0, help="Rows to compute again and compare.")] = 0,
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="PATH", help="Targets of axolotl or DistillKit: no teacher is asked."),
    ] = None,
    no_launch: NoLaunch = False,
    quiet: Quiet = False,
    log_format: LogFormat = "text",
    debug: Debug = False,
) -> None:
    """Write the teacher's targets of all rows to disk, once.

    Stopped, the same command goes on where it was. Then train from them:
    kdtrain fit config.yaml rlhf.teacher.backend=cache rlhf.teacher.path=DIR
    """
    from kdtrain.preflight.files import cache_files, data_files

    files = cache_files if source is None else data_files  # where no teacher is asked, it need not be there
    run_config = loaded(config, overrides, log_format, debug, files=files, new_cache=source is not None)
    if out is None:
        raise ConfigError("--out DIR is missing: the folder that the cache is written into.")
    wanted = {"mode": mode, "top_k": top_k, "draws": draws, "hidden_dtype": hidden_dtype, "verify": verify}
    default_mode = "chunks" if run_config.options.crosses_tokenizers else "topk"
    _check_cache_options(wanted, default_mode, imported=source is not None)
    run_config = _for_cache(run_config)
    if not no_launch and source is None:
        launch_if_wanted(run_config, quiet)
    _cache_here(run_config, out, source or wanted, quiet, log_format)


def _check_cache_options(wanted: Mapping[str, Any], default_mode: str, *, imported: bool) -> None:
    """Refuse values that there are not, and options of another mode or of a teacher that is not asked."""
    for name, default in _OF_TEACHER.items() if imported else ():
        if wanted[name] != default:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect with --from: the file has what it has.")
    for name, choices in (("mode", (None, *_MODES)), ("hidden_dtype", (None, "auto", "int8"))):
        if wanted[name] not in choices:
            named = ", ".join(filter(None, choices))
            raise ConfigError(f"--{name.replace('_', '-')} is one of {named}, got {wanted[name]!r}.")
    for name, mode in (("top_k", "topk"), ("draws", "sample"), ("hidden_dtype", "hidden")):
        if wanted[name] is not None and (wanted["mode"] or default_mode) != mode:
            raise ConfigError(
                f"--{name.replace('_', '-')} is an option of --mode {mode}, not of --mode "
                f"{wanted['mode'] or default_mode}."
            )


_MODES = ("topk", "sample", "hidden", "chunks")
_OF_TEACHER = {"mode": None, "top_k": None, "draws": None, "hidden_dtype": None, "verify": 0}


def _for_cache(config: RunConfig) -> RunConfig:
    """Without what cuts models into pieces for training: each process asks a whole teacher."""
    pieces = ("deepspeed", "fsdp", "fsdp_config")
    training = {name: value for name, value in config.training.items() if name not in pieces}
    launching = config.launch.model_copy(update={"config_file": None})
    return config.model_copy(update={"training": training, "launch": launching})


def _cache_here(config: RunConfig, out: Path, wanted: Mapping[str, Any] | Path, quiet: bool, log_format: str) -> None:
    """Write the cache in this process, of a teacher or of another tool's file, and print what came out."""
    console = console_for(quiet, log_format)
    from kdtrain.cli.progress import CacheProgress, describe_cache
    from kdtrain.config.arguments import build_train_arguments
    from kdtrain.runs.cache import write_cache
    from kdtrain.runs.cache_import import import_cache
    from kdtrain.runs.cache_options import Wanted

    if is_main():
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
    with meeting():
        arguments = build_train_arguments(config)
        if world_size() > 1:
            arguments.training_args.device  # noqa: B018 - the processes meet
    process.quiet_libraries(keep_bars=console.is_terminal and not quiet)
    reporter = CacheProgress(console, log_format, quiet)
    if isinstance(wanted, Path):
        result = import_cache(arguments, wanted, out, reporter)
    else:
        given = {name: value for name, value in wanted.items() if value is not None}
        result = write_cache(arguments, out, Wanted(**given), reporter)
    if is_main():
        typer.echo(describe_cache(result, lmbda=config.rlhf.lmbda))
    process.end_rank(0)
