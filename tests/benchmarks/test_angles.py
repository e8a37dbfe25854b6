"""The benchmark of angles: the bucket stays near the full gradient, and messages quote what is measured."""

import functools
import json
import re
from pathlib import Path

import pytest

from kdtrain.config.options import RENORMALIZED
from tests import tiny
from tests.benchmarks import angles
from tests.benchmarks.angles import CASES, AngleCase
from tests.benchmarks.requirements import ANGLES

WRITTEN = {row["title"]: row for row in json.loads(Path(__file__).with_name("results.json").read_text())["angles"]}
measure_angles = functools.cache(angles.measure_angles)
FORWARD = [case for case, _ in ANGLES]


@pytest.mark.parametrize(("case", "limit"), ANGLES, ids=str)
def test_the_bucket_turns_the_gradient_of_forward_kl_by_less_than_20_degrees(case, limit):
    degrees = measure_angles(case)["degrees"]
    assert degrees["bucket"] < limit == 20
    assert degrees["bucket"] < 0.6 * degrees["renormalize"] < degrees["truncate"]


@pytest.mark.parametrize("case", [case if case in FORWARD else tiny.slow(case) for case in CASES], ids=str)
def test_the_bucket_is_nearer_than_renormalizing_at_every_beta(case):
    degrees = measure_angles(case)["degrees"]
    assert degrees["bucket"] < degrees["renormalize"] - 5
    assert degrees == pytest.approx(WRITTEN[str(case)]["degrees"], abs=0.2)  # the table is of this code


def test_the_warning_quotes_the_table():
    by_hand = [
        WRITTEN[str(AngleCase(0.5, gap))]["degrees"][tail] for gap in (1.0, 0.1) for tail in ("renormalize", "bucket")
    ]
    quoted = [int(number) for number in re.findall(r"\b(1\d|2\d)\b(?!,)", RENORMALIZED.split("(make")[0])]
    assert quoted == [round(degrees) for degrees in by_hand]
    assert f"top {AngleCase.k} of {AngleCase.vocab:,} random tokens" in RENORMALIZED
