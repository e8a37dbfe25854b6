"""`kdtrain evaluate`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdtrain.cli import process
from kdtrain.cli.meeting import meeting
from kdtrain.cli.shared import Debug, set_up
from kdtrain.errors import ConfigError
from kdtrain.ranks import is_main

if TYPE_CHECKING:
    from kdtrain.config import RunConfig
    from kdtrain.config.tree import Problem
    from kdtrain.runs.open_run import TrainedRun
    from kdtrain.runs.tasks import Tasks

logger = logging.getLogger("kdtrain")


def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN_DIR|CONFIG", help="A run, or its config file.")],
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN|KEY=VALUE]...",
            help="The same with other seeds. Options that win.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="STEP|PATH", help="The student of a checkpoint, not of the end.")
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Another run, to compare with; one for each run."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="NAME,…", help="Tasks of lm-eval, beside the rows.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with task files of yours, for --tasks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="What evaluation.json holds, on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Warnings and errors only, beside the table.")] = False,
    debug: Debug = False,
) -> None:
    """Was it worth it? Student before and after, and teacher, on data.eval.

    Prints a table, and writes evaluation.json into the run folder. --against says whether the run BEATS another one, is
    NO BETTER, or INCONCLUSIVE: one pair of runs is about these rows, three pairs or more are about seeds.

    kdtrain evaluate runs/kd-1 runs/kd-2 --against runs/ce-1 --against runs/ce-2
    """
    set_up("text", debug)
    logger.setLevel(logging.ERROR if not is_main() else logging.WARNING if quiet else logging.INFO)
    runs, others = _opened(target, more or [], checkpoint, against or [])
    asked = _tasks(tasks, include_path)
    if not quiet and sys.stderr.isatty():
        typer.echo("loading torch and trl …", err=True)  # some seconds without a sign otherwise
    from kdtrain.cli import evaluation

    process.quiet_libraries(keep_bars=False)
    with meeting():
        text = evaluation.evaluated(runs, others, asked, as_json, quiet)
    if is_main():
        process.write_out(text)
    process.end_rank(0)


def _tasks(named: str | None, include_path: Path | None) -> Tasks | None:
    from kdtrain.runs.tasks import Tasks

    if named is None:
        if include_path is not None:
            raise ConfigError("--include-path is where tasks are looked for: name some, --tasks NAME,…")
        return None
    names = [name.strip() for name in named.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names no task: for example --tasks arc_easy,hellaswag")
    tasks = Tasks(names, include_path)
    tasks.check()
    return tasks


def _opened(
    target: Path, more: Sequence[str], checkpoint: str | None, against: Sequence[Path]
) -> tuple[list[TrainedRun], list[TrainedRun]]:
    """The runs, and those that they are compared with; what is missing of them is said before torch is imported.

    Args:
        more: further run folders, and options `key.sub=value`: what is a folder is no option.
    """
    from kdtrain.preflight.files import compared_files, evaluation_files
    from kdtrain.runs.open_run import open_run

    further = [item for item in more if "=" not in item or Path(item).is_dir()]
    overrides = [item for item in more if item not in further]
    if further and checkpoint is not None and not checkpoint.isdecimal():
        raise ConfigError("--checkpoint PATH is of one run. With several, name a step that all of them have.")

    def files(config: RunConfig) -> Iterator[Problem]:
        yield from evaluation_files(config)
        yield from compared_files(config) if against else ()

    runs = [open_run(path, overrides, checkpoint, files=files) for path in (target, *map(Path, further))]
    return runs, [open_run(path, files=compared_files) for path in against]
