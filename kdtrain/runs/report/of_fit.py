"""The report that `fit` writes of its own run."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdtrain.ranks import is_main
from kdtrain.runs.folder import CONFIG, REPORT
from kdtrain.runs.lock import is_mine
from kdtrain.runs.report.facts import FactsReporter, Warnings, write_facts
from kdtrain.runs.report.record import shown_path
from kdtrain.runs.report.write import write_report

logger = logging.getLogger(__name__)


@contextmanager
def reported(run_dir: Path, reporter: Any) -> Iterator[FactsReporter]:
    """Write the report of a run as it ends, however it ends; inside, a reporter that notes what the page will say."""
    noting, warnings = FactsReporter(reporter), Warnings()
    ours = logging.getLogger("kdtrain")
    ours.addHandler(warnings)
    ended = False
    try:
        yield noting
        ended = True
    finally:
        ours.removeHandler(warnings)
        # A run that never began has noted nothing: what is in the folder then is of an earlier one.
        if noting.began and is_main() and is_mine(run_dir) and (run_dir / CONFIG).is_file():
            # Whoever stops a run does not wait for a picture: its state is saved, and a SIGKILL may follow.
            renew_report(run_dir, {**noting.facts, "warnings": list(warnings.messages)}, picture=ended)


def renew_report(run_dir: Path, facts: Mapping[str, Any] | None = None, *, picture: bool = True) -> None:
    """Write it; a failure is a warning, for the run itself is not harmed by it.

    Args:
        facts: of a run that ends; None keeps those that the folder has.
    """
    try:
        if facts is not None:
            write_facts(run_dir, facts)
        write_report([run_dir], run_dir / REPORT, picture=picture)
    except Exception as error:
        again = f"kdtrain report {shlex.quote(shown_path(run_dir))}"
        logger.warning("The report could not be written (%s); try again with %s", error, again)
