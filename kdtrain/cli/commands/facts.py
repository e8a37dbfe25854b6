"""`kdtrain schema` and `kdtrain env`: what is known without a run."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def schema() -> None:
    """Print the JSON Schema of the config, for editors."""
    from kdtrain.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def env(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Versions, devices, optional parts; secrets as set or unset only."""
    from kdtrain.cli.environment import environment

    facts = environment()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            typer.echo(f"{key}:")
            for name, fact in value.items():
                typer.echo(f"  {name}: {fact}")
        else:
            typer.echo(f"{key}: {', '.join(value) if isinstance(value, list) else value}")
