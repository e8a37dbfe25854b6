"""`kdtrain report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdtrain.cli import process
from kdtrain.cli.shared import Debug


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders of runs: training.output_dir, finished or not.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Where to write it: report.html, in the folder of one run or here of several."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """One HTML page of a run: verdict, curves, samples, options, data. Of several runs: overlaid and ranked.

    The page needs no network and can be sent around. Its figures are beside it as JSON. Works while a run still goes,
    and after it failed. A sweep is ranked by figures that do not depend on beta:

    kdtrain report runs/beta-* --out sweep.html
    """
    process.set_up_logging("text", debug)
    from kdtrain.runs.folder import REPORT
    from kdtrain.runs.report import write_report

    if out is None:
        out = runs[0] / REPORT if len(runs) == 1 else Path(REPORT)
    process.write_out(f"{write_report(runs, out)}\n")
