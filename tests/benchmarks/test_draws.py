"""The benchmark of drawn tokens: nothing is left out in the mean, and the table is of this code."""

import dataclasses
import json
from pathlib import Path

import pytest

from kdtrain.losses import SampledTargets
from tests.benchmarks import draws
from tests.benchmarks.draws import CASES, gradient_of_draws, measure_draws
from tests.benchmarks.requirements import DRAWS

WRITTEN = {row["title"]: row for row in json.loads(Path(__file__).with_name("results.json").read_text())["draws"]}
SMALL = [
    dataclasses.replace(case, sets=100, distributions=dataclasses.replace(case.distributions, vocab=2048, tokens=8))
    for case in CASES
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_mean_of_fewer_sets_errs_as_little_as_one_that_leaves_nothing_out(case):
    found = measure_draws(case)
    assert found["divergence"] >= 0.5
    assert found["error"] == pytest.approx(found["expected"], rel=0.2)
    assert found["error"] < 0.02 * 30**0.5
    assert found["degrees"]["mean of the sets"] < found["degrees"]["truncate"] / 5
    assert found["degrees"]["one set"] > 5 * found["degrees"]["mean of the sets"]


def test_a_gradient_that_forgets_what_was_drawn_once_is_seen(monkeypatch):
    def without_singletons(student, targets):
        kept = targets.weights.masked_fill(targets.weights < 0.03, 0)
        kept = kept / kept.sum(-1, keepdim=True)
        return gradient_of_draws(student, SampledTargets(targets.indices.masked_fill(kept == 0, -1), kept))

    monkeypatch.setattr(draws, "gradient_of_draws", without_singletons)
    found = measure_draws(SMALL[0])
    assert found["error"] > 3 * found["expected"]


def test_the_table_holds_what_is_demanded_and_shows_where_it_takes_more_draws():
    most, share = DRAWS[1:]
    for case in CASES:
        row = WRITTEN[str(case)]
        assert row["divergence"] >= 0.5
        assert row["error"] == pytest.approx(row["expected"], rel=0.1)
        assert row["degrees"]["mean of the sets"] <= share * row["degrees"]["truncate"]
    assert [WRITTEN[str(case)]["error"] <= most == 0.02 for case in CASES] == [True, True, True, False]


def test_the_table_is_of_this_code():
    found, written = measure_draws(dataclasses.replace(CASES[0], sets=20)), WRITTEN[str(CASES[0])]
    assert found["divergence"] == pytest.approx(written["divergence"], rel=1e-4)
    for way in ("one set", "truncate", "bucket"):
        assert found["degrees"][way] == pytest.approx(written["degrees"][way], abs=0.2)
