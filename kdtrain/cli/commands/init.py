"""`kdtrain init`: the recipes that are shipped, and copies of them to begin with."""

from __future__ import annotations

import json
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from kdtrain.data.errors import show
from kdtrain.disk import writing
from kdtrain.errors import ConfigError

SCHEMA = "kdtrain.schema.json"  # what the first line of each recipe names
_PURPOSE_LINE = 1


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
            metavar="NAME", help="The recipe. Left out: all of them, a line each.", autocompletion=_complete
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where it goes, which is made if it is not there.")
    ] = Path("."),
) -> None:
    """Copy a recipe to begin with: a config file that says what each of its options does.

    Beside it goes the JSON Schema of the config, by which an editor completes and checks it. Nothing is overwritten.
    """
    if name is None:
        _list()
        return
    copy = copied(name, folder)
    typer.echo(f"{copy}: {recipes()[name]}")
    typer.echo(f"Its first lines say which data it wants, and what else. Next: kdtrain validate {copy}")


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
