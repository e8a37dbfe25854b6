"""Tables that say what kdtrain does about each of many cases, and which tests show it; `faults.py` and `cases.py`."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

TESTS = Path(__file__).parent
Key = TypeVar("Key", int, str)


@dataclass(frozen=True)
class Row:
    """What may come, what is right then, and the tests that show it."""

    what: str
    expected: str
    tests: tuple[str, ...] = ()
    """As `file.py::test_name`, all its parameters; in this folder."""


def run(table: Mapping[Key, Row], rows: Sequence[Key], heading: str) -> int:
    """Run the tests of some rows, and print them with their time and result.

    Returns:
        pytest's exit status.
    """
    wanted = sorted({str(TESTS / test) for row in rows for test in table[row].tests})
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", "-m", "", *wanted]
        results = [f"--junit-xml={found}", "-o", "junit_family=xunit1"]
        status = subprocess.run([*command, *results], check=False).returncode
        cases = list(ElementTree.parse(found).iter("testcase"))
    print(f"\n{'':>3} {heading:<58} {'tests':>5} {'s':>7}  result")
    held = 0
    for row in rows:
        names = {tuple(test.split("::")) for test in table[row].tests}
        mine = [case for case in cases if (Path(case.get("file", "")).name, _function(case)) in names]
        failed = [case for case in mine if case.find("failure") is not None or case.find("error") is not None]
        skipped = [case for case in mine if case.find("skipped") is not None]
        result = f"{len(failed)} FAILED" if failed else f"{len(skipped)} skipped" if skipped else "holds"
        held += result == "holds" and bool(mine)
        seconds = sum(float(case.get("time", 0)) for case in mine)
        print(f"{row:>3} {table[row].what:<58} {len(mine):>5} {seconds:>7.1f}  {result if mine else 'no test'}")
        print(f"{'':>3}   {table[row].expected}")
        for file, function in sorted(names):
            print(f"{'':>3}   {file}::{function}")
    print(f"\n{held} of {len(rows)} rows hold; {sum(float(case.get('time', 0)) for case in cases):.0f} s of tests")
    return status


def _function(case: ElementTree.Element) -> str:
    return case.get("name", "").partition("[")[0]
