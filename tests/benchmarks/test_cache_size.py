"""The benchmark of a cache's size: the table is of this code, and holds what is demanded."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import requirements
from tests.benchmarks.cache_size import CASES, SizeCase, measure_size

RESULTS = json.loads(Path(__file__).with_name("results.json").read_text())
WRITTEN = {row["title"]: row for row in RESULTS["cache-size"]}


@pytest.mark.parametrize(
    "case", [SizeCase("topk"), SizeCase("sample", power=3.0), SizeCase("hidden", hidden=256, rows=20)], ids=str
)
def test_the_table_is_of_this_code(case):
    found, written = measure_size(case), WRITTEN[str(case)]
    assert found["bytes"] == pytest.approx(written["bytes"], rel=1e-3)
    for name in ("error", "unique", "kl", "bound_max"):
        assert (name in found) == (name in written)
        if name in found:
            assert found[name] == pytest.approx(written[name], rel=0.02)


def test_the_table_has_every_case_and_all_demands_hold():
    assert list(WRITTEN) == [str(case) for case in CASES]
    rows = list(requirements.rows({"cache-size": RESULTS["cache-size"]}))
    assert len(rows) == 3 * 6 + 6 + 3
    assert all(row.holds for row in rows)
