"""`kdtrain init`: the recipes that are shipped, and copies of them to begin with; and a student from a teacher."""

from __future__ import annotations

import json
import sys
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from kdtrain.cli import process
from kdtrain.cli.shared import Debug
from kdtrain.config.paths import data_path
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
    debug: Debug = False,
) -> None:
    """Copy a recipe to begin with: a config file that says what each of its options does.

    Or make a student from a teacher: --from MODEL --layers N --data PATH DIR writes a model into DIR. Nothing is
    overwritten.
    """
    if source is not None:
        _prune(source, name, folder, layers, width, data, rows, debug)
        return
    given = {"--layers": layers, "--width": width, "--data": data, "--rows": rows}
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
    if sys.stderr.isatty():
        typer.echo("loading torch and transformers …", err=True)
    from kdtrain.cli.pruned import as_text
    from kdtrain.runs.pruned import Wanted, prune

    process.quiet_libraries(keep_bars=False)
    wanted = Wanted(source, layers, width, data_path(data), rows or _ROWS)
    process.write_out(as_text(prune(wanted, Path(name)), source) + "\n")


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
