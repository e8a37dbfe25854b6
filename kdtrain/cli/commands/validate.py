"""`kdtrain validate`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdtrain.cli import process
from kdtrain.cli.shared import ConfigFile, Debug, Overrides
from kdtrain.errors import ConfigError, PreflightError

if TYPE_CHECKING:
    from kdtrain.config.diagnose import Diagnostic
    from kdtrain.config.load import CheckResult


def validate(
    config: ConfigFile,
    overrides: Overrides = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also rows, models, teacher, as fit does at start.")] = False,
    plan: Annotated[
        int | None, typer.Option("--plan", min=1, metavar="N", help="--deep: plan for N devices, wherever this is.")
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="--deep: memory of each device, such as 80GiB.")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(metavar="SIZE", help="--plan: sent by a device in a second: 50GB.")
    ] = None,
    step_time: Annotated[
        str | None, typer.Option(metavar="S", help="--plan: seconds of a step on one; here: measured.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON on stdout.")] = False,
    debug: Debug = False,
) -> None:
    """Every problem of a config file at once, with its place; without torch.

    --deep goes on to what only the world can tell. It reads the rows, loads both models or asks the teacher's server,
    and lists what it found, numbered, with what to do about it; the exit code is 3 where fit would stop.
    With --plan or --device-memory it loads nothing (but for --step-time here) and says what such devices need.
    """
    from kdtrain.config import check_config
    from kdtrain.preflight.files import all_files

    memory = None if device_memory is None else _bytes(device_memory, "--device-memory", "80GiB")
    sends = None if bandwidth is None else _bytes(bandwidth, "--bandwidth", "50GB")
    planned = plan is not None or memory is not None
    if planned and not deep:
        raise ConfigError("--plan and --device-memory belong to --deep: add it.")
    if (bandwidth or step_time) and plan is None:
        raise ConfigError("--bandwidth and --step-time belong to --plan: add it, with a number of devices.")

    if deep:
        process.set_up_logging("text", debug)
    result = check_config(config, overrides or [], files=all_files)
    findings = [*result.errors, *result.warnings]
    if deep and not result.errors:
        if planned:
            seconds = None if step_time is None else _seconds(step_time)
            findings += _planned_findings(result, plan, memory, sends, seconds)
        else:
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
        typer.echo(text + "\n")
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
        waiting.status("looking at rows and models …") if waiting.is_terminal else nullcontext()
    ):  # some seconds without a sign
        from kdtrain.runs.deep import deep_findings

        process.quiet_libraries(keep_bars=False)
        assert result.config is not None
        return result.placed(deep_findings(result.config))


_HERE = "here"


def _planned_findings(
    result: CheckResult, devices: int | None, memory: int | None, bandwidth: int | None, step_time: float | str | None
) -> list[Diagnostic]:
    """Memory, disk and time on devices that need not be here."""
    from kdtrain.config.arguments import build_train_arguments
    from kdtrain.preflight.strategies import BANDWIDTH
    from kdtrain.runs.deep import measured_step
    from kdtrain.runs.resources import Planned, planned_findings

    process.quiet_libraries(keep_bars=False)
    assert result.config is not None
    seconds = measured_step(result.config) if isinstance(step_time, str) else step_time
    arguments = build_train_arguments(result.config)
    planned = Planned(devices, memory, bandwidth or BANDWIDTH, seconds)
    return result.placed(planned_findings(result.config, arguments.training_args, planned))


def _seconds(text: str) -> float | str:
    """A number above 0, or the word that asks for a measurement."""
    if text == _HERE:
        return text
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--step-time: expected seconds above 0, or {_HERE}, got {text[:20]!r}.")
    return seconds


def _bytes(text: str, option: str, example: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"{option}: expected a size such as {example}, got {text[:20]!r}.")
    unit = 1024 if found[3] or not text.upper().endswith("B") else 1000
    return int(float(found[1]) * unit ** ("KMGT".index(found[2].upper()) + 1))
