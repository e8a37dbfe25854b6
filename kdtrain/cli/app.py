"""The commands: parse, call, print a result. How a process logs, fails and ends is in `process.py`.

Results go to stdout, everything else to stderr. Nothing here imports torch before a command needs it: help and static
validation answer at once.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdtrain import __version__
from kdtrain.cli import process
from kdtrain.errors import ConfigError, KdtrainError, NotAvailableError, PreflightError
from kdtrain.ranks import is_main, under_launcher
from kdtrain.runs.signals import keyboard_interrupts_named

if TYPE_CHECKING:
    from kdtrain.config import RunConfig
    from kdtrain.config.diagnose import Diagnostic
    from kdtrain.config.load import CheckResult

logger = logging.getLogger("kdtrain")

app = typer.Typer(
    help="Distil a large language model into a small one from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file that is the run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Options that win over the file, such as rlhf.beta=0.1."),
]
LogFormat = Annotated[str, typer.Option(help="text, or json for one object per line.")]


@app.command()
def fit(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="auto: the newest complete checkpoint, or a clean start. Or a checkpoint's path.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, one window forward and backward, no step, no file.")
    ] = False,
    no_launch: Annotated[
        bool, typer.Option("--no-launch", help="Stay in this process, whatever launch.num_processes says.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Warnings and errors only.")] = False,
    log_format: LogFormat = "text",
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks and the libraries' own messages.")] = False,
) -> None:
    """Train.

    Under a launcher this runs in the process it is in. Otherwise, with several GPUs or launch.num_processes above 1, it
    prints and runs the `accelerate launch` line that does the same. The final model and tokenizer, logging.jsonl and
    status.json are in training.output_dir.
    """
    from kdtrain.config import ConfigLoader
    from kdtrain.runs import launch

    process.set_up_logging(log_format, debug)
    if log_format not in ("text", "json"):
        raise ConfigError(f"--log-format must be text or json, got {log_format!r}")
    if launch.launched_by_us() or not is_main():
        logger.setLevel(logging.ERROR)  # the launching process, or rank 0, logs the same
    run_config = ConfigLoader.load(config, overrides or [])
    if not no_launch and not under_launcher():
        from kdtrain.cli.environment import visible_gpus

        devices = visible_gpus()
        processes = launch.wanted_processes(run_config, devices)
        if processes > 1 or run_config.launch.config_file:
            command = launch.launch_command(run_config, processes, sys.argv[1:], on_cpu=devices == 0)
            if not quiet:
                logger.info(launch.shown(command))
            sys.exit(launch.run_launcher(command))
    with keyboard_interrupts_named():
        _fit_here(run_config, resume, dry_run, quiet, log_format)


def _fit_here(config: RunConfig, resume: str | None, dry_run: bool, quiet: bool, log_format: str) -> None:
    """Train in this process, and print what came out."""
    from rich.console import Console

    console = Console(stderr=True)
    if not quiet and log_format == "text" and console.is_terminal:
        console.print("loading torch and trl …", style="dim")  # some seconds without a sign otherwise
    from kdtrain.cli.progress import ConsoleReporter, describe
    from kdtrain.config.arguments import build_train_arguments
    from kdtrain.runs.fit import fit as run_fit

    if is_main():
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
    arguments = build_train_arguments(config)
    process.quiet_libraries(keep_bars=console.is_terminal and not quiet)
    reporter = ConsoleReporter(console, log_format, quiet)
    result = run_fit(arguments, reporter, resume=resume, dry_run=dry_run)
    if is_main():
        what = "dry run passed" if dry_run else f"{result.steps} steps, model in {result.run_dir}"
        cost = "".join(f", {count:,} {name.replace('_', ' ')}" for name, count in result.teacher.items())
        typer.echo(f"{what} ({result.seconds:.0f} s)" + (f"; the teacher's answers:{cost[1:]}" if cost else ""))
        if dry_run:
            typer.echo(f"{describe(result.metrics)}  peak_memory_gib {result.metrics['peak_memory_gib']:.2f}")
    process.end_rank(0)


@app.command()
def validate(
    config: ConfigFile,
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also ask the teacher: its server, or its weights on a few rows.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks and the libraries' own messages.")] = False,
) -> None:
    """Check a config file: every problem at once, each with its place. Does not import torch; under a second.

    --deep goes on to what only the world can tell. It reads a few rows, asks the teacher's server what it does (or
    loads the teacher), and lists what it found, with what to do about it; the exit code is 3 where fit would stop.
    """
    from kdtrain.config import check_config

    if deep:
        process.set_up_logging("text", debug)
    result = check_config(config, overrides or [], model_files=True)
    findings = [*result.errors, *result.warnings]
    if deep and not result.errors:
        with keyboard_interrupts_named():
            findings += _deep_findings(result)
    if as_json:
        process.write_out(json.dumps([finding.to_dict() for finding in findings], indent=2) + "\n")
    else:
        _show_findings(config, findings, numbered=deep)
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(ConfigError.exit_code if result.errors else PreflightError.exit_code)


def _show_findings(config: Path, findings: Sequence[Diagnostic], *, numbered: bool) -> None:
    for number, finding in enumerate(findings, start=1):
        # Of what is well, the line in the file need not be shown.
        text = finding.render() if finding.level != "info" else f"{finding.headline}{_hint(finding)}"
        text = f"{number}. {text}" if numbered else text
        typer.echo(text + "\n", err=finding.level != "error" and not numbered)
    counts = ((sum(finding.level == level for finding in findings), level) for level in ("error", "warning"))
    found = ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts if count)
    typer.echo(f"{config}: {found or 'no problems found'}")


def _hint(finding: Diagnostic) -> str:
    return f"\n  = {finding.hint}" if finding.hint else ""


def _deep_findings(result: CheckResult) -> list[Diagnostic]:
    """What is found beyond the static check, with its places."""
    from rich.console import Console

    waiting = Console(stderr=True)
    with (
        waiting.status("asking the teacher …") if waiting.is_terminal else nullcontext()
    ):  # some seconds without a sign
        from kdtrain.runs.deep import deep_findings

        process.quiet_libraries(keep_bars=False)
        assert result.config is not None
        return result.placed(deep_findings(result.config))


@app.command()
def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows of each split are shown.")] = 5,
    all_rows: Annotated[
        bool, typer.Option("--all", help="Read all rows, as fit does, and not the first 1000 of each source.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON: rows, then bad rows, notes and counts.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks and the libraries' own messages.")] = False,
) -> None:
    """Show rows as the student will read them, and what it is trained to write in them. Loads no model.

    Also what became of the others: bad and over-long rows with their place and reason, notes, counts, and what fit
    would refuse. The rows shown are of as many kinds as there are. For example:

    kdtrain preview config.yaml --rows 3 data.train_on=last
    """
    process.set_up_logging("text", debug)
    with keyboard_interrupts_named():
        process.write_out(_preview(config, overrides or [], rows, all_rows, as_json))


def _preview(config: Path, overrides: list[str], rows: int, all_rows: bool, as_json: bool) -> str:
    """What is printed."""
    from rich.console import Console

    from kdtrain.config import ConfigLoader

    run_config = ConfigLoader.load(config, overrides)
    waiting = Console(stderr=True)
    with waiting.status("reading rows …") if waiting.is_terminal else nullcontext():  # some seconds without a sign else
        from kdtrain.cli import preview as printed
        from kdtrain.runs.preview import preview as read_rows

        process.quiet_libraries(keep_bars=False)
        splits = read_rows(run_config, rows=rows, all_rows=all_rows)
    return printed.as_json(splits) if as_json else printed.as_text(splits, Console())


@app.command()
def schema() -> None:
    """Print the JSON Schema of the config, for editors."""
    from kdtrain.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@app.command()
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


def _not_available(name: str, help_text: str) -> None:
    @app.command(name, help=f"Not available yet: {help_text}", context_settings={"ignore_unknown_options": True})
    def command(arguments: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
        raise NotAvailableError(f"kdtrain {name} is not available yet.")


_not_available("init", "copy a recipe out of examples/.")
_not_available("cache", "write the teacher's targets for a data set to disk.")
_not_available("evaluate", "compare student and teacher on the evaluation set.")
_not_available("report", "one HTML page of a run.")
_not_available("export", "merge adapters and write a plain model folder.")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: run a command and end the process with the exit code that says what happened."""
    arguments = sys.argv[1:]
    # `accelerate launch -m kdtrain CONFIG`: people forget the command, and it can only be one.
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        sys.argv[1:] = arguments = ["fit", *arguments]
    try:
        code = app(args=arguments, standalone_mode=False)
    except KdtrainError as error:
        process.fail(error)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a usage error of the command line
            error.show()
            sys.exit(error.exit_code)
        process.fail_with_a_bug(error)
    sys.exit(code or 0)
