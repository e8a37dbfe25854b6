"""`kdtrain export`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdtrain.cli import process
from kdtrain.cli.shared import Debug
from kdtrain.errors import ConfigError
from kdtrain.runs.new_folder import require_new
from kdtrain.runs.open_run import open_run

logger = logging.getLogger("kdtrain")

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def export(
    target: Annotated[Path, typer.Argument(metavar="RUN_DIR|CONFIG", help="A run, or its config file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Options that win: model.model=… if it moved."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="STEP|PATH", help="The student of a checkpoint, not of the end.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="auto: as it was saved. float32, bfloat16, float16."),
    ] = "auto",
    version: Annotated[int, typer.Option("--transformers", metavar="4|5", help="4: transformers 4 reads it too.")] = 5,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Push it to the hub as well; private.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push: everybody may read it.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Warnings and errors only.")] = False,
    debug: Debug = False,
) -> None:
    """Write a run's student as a model folder: adapter merged, with tokenizer or processor and a model card.

    The folder loads with from_pretrained and is served as it is. Nothing in it names this machine.
    """
    process.set_up_logging("text", debug)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    _check(target, out, dtype, version, push, public)
    run = open_run(target, overrides or [], checkpoint, only_student=True)
    require_new(out)
    if not quiet and sys.stderr.isatty():
        typer.echo("loading torch and transformers …", err=True)
    from kdtrain.cli.export import as_text
    from kdtrain.runs.export import export as run_export
    from kdtrain.runs.hub import Repository

    process.quiet_libraries(keep_bars=False)
    repository = None if push is None else Repository(push, public)
    found = run_export(run, out, dtype=dtype, version=version, repository=repository)
    process.write_out(as_text(found, public))


def _check(target: Path, out: Path, dtype: str, version: int, push: str | None, public: bool) -> None:
    if "=" in str(out) and not out.exists():
        raise ConfigError(f"OUT, the folder to write, is missing before {out}: kdtrain export {target} OUT {out}")
    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype is one of {', '.join(_DTYPES)}, got {dtype!r}.")
    if version not in (4, 5):
        raise ConfigError(f"--transformers is 5, or 4 for a folder that transformers 4 reads, got {version}.")
    if public and push is None:
        raise ConfigError("--public is about --push REPO, which is not given.")
