"""The commands, and the entry point. Each command is a module of `commands/`: it parses, calls, and prints a result.

Results go to stdout, everything else to stderr. How a process logs, fails and ends is in `process.py`.
"""

from __future__ import annotations

import difflib
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kdtrain import __version__
from kdtrain.cli import process, streams
from kdtrain.cli.commands.cache import cache
from kdtrain.cli.commands.evaluate import evaluate
from kdtrain.cli.commands.export import export
from kdtrain.cli.commands.facts import env, schema
from kdtrain.cli.commands.fit import fit
from kdtrain.cli.commands.init import init
from kdtrain.cli.commands.preview import preview
from kdtrain.cli.commands.report import report
from kdtrain.cli.commands.validate import validate
from kdtrain.data.errors import show
from kdtrain.errors import CheckpointError, ConfigError, KdtrainError
from kdtrain.runs.lost_rank import lost_ranks_named
from kdtrain.runs.parent import end_with_parent
from kdtrain.runs.signals import every_signal_named

_OTHER_NAMES = {
    "train": "fit", "run": "fit", "distill": "fit", "distil": "fit", "start": "fit", "finetune": "fit", "sft": "fit",
    "eval": "evaluate", "test": "evaluate", "compare": "evaluate", "check": "validate", "lint": "validate",
    "show": "preview", "inspect": "preview", "plot": "report", "merge": "export", "push": "export", "new": "init",
    "recipes": "init", "precompute": "cache", "version": "--version", "help": "--help",
}  # fmt: skip


# Their results are files; of what they print nothing is missed. The others have no result but that.
_WRITE_FILES = ("fit", "cache", "evaluate", "export", "report", "init")


class _Commands(TyperGroup):
    """The commands, and what to say of a name that is none of them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1)
            meant = _OTHER_NAMES.get(name) or (near[0] if near else "")
            hint = f"Did you mean kdtrain {meant}?" if meant else f"There are {', '.join(self.commands)}."
            raise ConfigError(f"There is no command {show(name, 40)}. {hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what may end any of them from outside has its exit code and its message."""
        with lost_ranks_named(), every_signal_named():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Distil a large language model into a small one from one YAML file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (init, validate, preview, fit, evaluate, report, export, cache, schema, env):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _stands_somewhere() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def main() -> None:
    """Entry point: run a command and end the process with the exit code that says what happened."""
    process.use_utf8()
    process.owns_process = streams.survive()
    end_with_parent()
    arguments = sys.argv[1:]
    # `accelerate launch -m kdtrain CONFIG`: people forget the command, and it can only be one.
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        sys.argv[1:] = arguments = ["fit", *arguments]
    try:
        if arguments and not arguments[0].startswith("-") and not _stands_somewhere():
            raise ConfigError("The working directory was deleted, or moved away. Go into one that is there (cd).")
        process.require_utf8(arguments)
        code = app(args=arguments, standalone_mode=False)
        if arguments[:1] and arguments[0] not in _WRITE_FILES and (error := streams.lost()) is not None:
            raise CheckpointError(f"Writing to stdout failed: {error.strerror}. What it has got is not complete.")
    except KdtrainError as error:
        process.fail(error)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of the command line
            error.show()
            sys.exit(error.exit_code)
        if isinstance(error, typer.Abort) and isinstance(error.__cause__, Exception):  # which it makes of an EOFError
            error = error.__cause__
        process.fail_with_a_bug(error)
    process.leave(code or 0)
