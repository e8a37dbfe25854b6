"""`kdtrain preview`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from kdtrain.cli import process
from kdtrain.cli.shared import ConfigFile, Debug, Overrides


def preview(
    config: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows of each split are shown.")] = 5,
    all_rows: Annotated[
        bool, typer.Option("--all", help="Read all rows, as fit does, and not the first 1000 of each source.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON: rows, then bad rows, notes and counts.")] = False,
    debug: Debug = False,
) -> None:
    """Show rows as the student will read them, and what it is trained to write in them. Loads no model.

    Also what became of the others: bad and over-long rows with their place and reason, notes, counts, and what fit
    would refuse. The rows shown are of as many kinds as there are. For example:

    kdtrain preview config.yaml --rows 3 data.train_on=last
    """
    process.set_up_logging("text", debug)
    process.write_out(_preview(config, overrides or [], rows, all_rows, as_json))


def _preview(config: Path, overrides: list[str], rows: int, all_rows: bool, as_json: bool) -> str:
    """What is printed."""
    from rich.console import Console

    from kdtrain.config import ConfigLoader
    from kdtrain.preflight.files import preview_files

    run_config = ConfigLoader.load(config, overrides, files=preview_files)
    waiting = Console(stderr=True)
    with waiting.status("reading rows …") if waiting.is_terminal else nullcontext():  # some seconds without a sign else
        from kdtrain.cli import preview as printed
        from kdtrain.runs.preview import preview as read_rows

        process.quiet_libraries(keep_bars=False)
        splits = read_rows(run_config, rows=rows, all_rows=all_rows)
    return printed.as_json(splits) if as_json else printed.as_text(splits, Console())
