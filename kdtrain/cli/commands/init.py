"""`kdtrain init`: the recipes that are shipped, and copies of them to begin with; and a student from a teacher."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from kdtrain.cli import process
from kdtrain.cli.shared import Debug
from kdtrain.data.errors import show
from kdtrain.disk import writing
from kdtrain.errors import ConfigError
from kdtrain.runs.new_folder import require_new

SCHEMA = "kdtrain.schema.json"  # what the first line of each recipe names
_PURPOSE_LINE = 1
_ROWS = 256


def recipes() -> dict[str, str]:
    """What is shipped: the name of each recipe, and its purpose in one line."""
    found = (path for path in files("kdtrain.cli").joinpath("recipes").iterdir() if path.name.endswith(".yaml"))
    return {
        path.name.removesuffix(".yaml"): _purpose(path.read_text("utf-8"))
        for path in sorted(found, key=lambda path: path.name)
    }


def _purpose(text: str) -> str:
    return text.splitlines()[_PURPOSE_LINE].removeprefix("# ")


def _complete(incomplete: str) -> list[str]:
    return [name for name in recipes() if name.startswith(incomplete)]


def init(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|DIR",
            help="The recipe (left out: a list of them); with --from: DIR.",
            autocompletion=_complete,
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Where the recipe goes; made if it is not there.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", metavar="MODEL", help="Cut a student out of it: a folder, hub id or run.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="Its layers: the N that change the text most.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(metavar="W", help="Its hidden size; MLPs in proportion, heads stay.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Rows to see by what to keep, as data.train.")
    ] = None,
    rows: Annotated[int | None, typer.Option(metavar="R", help="The first R of them: 256.")] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Of MODEL on the hub: a branch, a tag or a commit.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Copy a recipe to begin with: a config file that says what each of its options does.

    Or make a student from a teacher: --from MODEL --layers N --data PATH DIR writes a model into DIR. Nothing is
    overwritten.
    """
    if source is not None:
        _prune(source, name, folder, layers, width, data, rows, revision, debug)
        return
    given = {"--layers": layers, "--width": width, "--data": data, "--rows": rows, "--revision": revision}
    if lone := next((option for option, value in given.items() if value is not None), None):
        raise ConfigError(f"{lone} is about a student from a teacher: kdtrain init --from MODEL {lone} … DIR")
    if name is None:
        _list()
        return
    copy = copied(name, folder or Path("."))
    typer.echo(f"{copy}: {recipes()[name]}")
    typer.echo(f"Its first lines say which data it wants, and what else. Next: kdtrain validate {copy}")


def _prune(
    source: str,
    name: str | None,
    folder: Path | None,
    layers: int | None,
    width: int | None,
    data: str | None,
    rows: int | None,
    revision: str | None,
    debug: bool,
) -> None:
    """Cut a student out of a teacher, and print what became of it."""
    usage = "kdtrain init --from MODEL --layers N [--width W] --data PATH DIR"
    if name is None or folder is not None:
        raise ConfigError(f"With --from there is one name, DIR, the folder of the student: {usage}")
    for option, value in (("--layers N", layers), ("--data PATH", data)):
        if value is None:
            why = "the layers of the student" if layers is None else "rows, by which is seen what to keep"
            raise ConfigError(f"{option} is missing: {why}. {usage}")
    if rows is not None and rows < 1:
        raise ConfigError(f"--rows {rows}: give at least 1.")
    assert layers is not None
    assert data is not None
    process.set_up_logging("text", debug)
    require_new(Path(name))
    path = _checked(source, revision, data)
    if sys.stderr.isatty():
        typer.echo("loading torch and transformers …", err=True)
    from kdtrain.cli.pruned import as_text
    from kdtrain.runs.pruned import Wanted, prune

    process.quiet_libraries(keep_bars=False)
    wanted = Wanted(os.path.expanduser(source), layers, width, path, rows or _ROWS, revision)
    process.write_out(as_text(prune(wanted, Path(name)), replace(wanted, data=data)) + "\n")


def _checked(source: str, revision: str | None, data: str) -> str:
    """The rows' absolute path, or id on the hub; model and rows are there, as far as `validate` would see it.

    Raises:
        ConfigError: with what it would say.
    """
    from kdtrain.config.load import check_config
    from kdtrain.preflight.files import cache_files

    config = {
        "model": {"model": source},
        "data": {"train": {"path": data}, "max_bad_rows": _ROWS},  # others can do without a bad one
        "rlhf": {"llm_kd_weight": 0},
        "training": {"output_dir": "unused"},
    }
    result = check_config(config, files=cache_files)
    if result.config is None:
        first = result.errors[0]
        option = f"--data {data}" if first.path.startswith("data") else f"--from {source}"
        said = f"{option}: {first.message}{f'; {first.hint}' if first.hint else ''}"
        raise ConfigError(said if said.endswith("?") else f"{said}.")
    for found in result.warnings:
        process.logger.warning("%s (%s)", found.message, found.hint)
    if revision is not None and Path(result.config.model.model).is_absolute():
        raise ConfigError(f"--revision {revision}: {source} is a folder, and only models on the hub have revisions.")
    return result.config.data.train[0].path


def _list() -> None:
    found = recipes()
    width = max(map(len, found))
    for name, purpose in found.items():
        typer.echo(f"{name:{width}}  {purpose}")
    typer.echo("\nkdtrain init NAME [DIR] copies one.")


def copied(name: str, folder: Path) -> Path:
    """Copy a recipe into `folder`, with the schema that it names.

    Raises:
        ConfigError: there is no such recipe, or something of that name is there already.
        CheckpointError: the folder cannot be written.
    """
    if name not in (known := recipes()):
        close = get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else "kdtrain init alone lists them."
        raise ConfigError(f"there is no recipe {show(name)}. {hint}")
    if folder.suffix in (".yaml", ".yml"):
        raise ConfigError(f"DIR is a folder, and {show(str(folder))} looks like a file. Name the folder alone.")
    target, schema = folder / f"{name}.yaml", folder / SCHEMA
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} is there already, and is left as it is. Name another folder, or move it away.")
    text = files("kdtrain.cli").joinpath("recipes", target.name).read_bytes()
    with writing(target):
        folder.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            file.write(text)
        if not schema.exists() or _is_ours(schema):
            schema.write_text(_schema(), encoding="utf-8")
    return target


def _schema() -> str:
    from kdtrain.config import json_schema

    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _is_ours(schema: Path) -> bool:
    """Whether a file is the schema of some version, which may be replaced by that of this one."""
    try:
        found = json.loads(schema.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("title") == json.loads(_schema())["title"]
