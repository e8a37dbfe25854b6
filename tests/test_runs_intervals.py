"""Intervals of a model's figures over rows, beside draws made one by one."""

import numpy as np
import pytest

from kdtrain.runs.intervals import DRAWS, intervals
from kdtrain.runs.reliance import visual_reliance
from kdtrain.trainer.figures import COLUMNS, RowSums


def sums_of(rng, rows):
    found = RowSums.empty(rows)
    tokens = rng.integers(5, 60, rows)
    for name in ("tokens", "labelled", "ce_known", "compared", "exact"):
        found.column(name)[:] = tokens
    for name, scale in (
        ("ce", 3.0),
        ("correct", 0.3),
        ("forward_kl", 0.2),
        ("reverse_kl", 0.2),
        ("agree", 0.6),
        ("overlap", 0.7),
    ):
        found.column(name)[:] = tokens * scale * rng.random(rows)
    return found


def drawn_one_by_one(numerator, denominator):
    rng = np.random.default_rng(123)  # its own draws: both agree as far as a few thousand draws say
    ratios = []
    for _ in range(DRAWS):
        rows = rng.integers(0, len(numerator), len(numerator))
        ratios.append(numerator[rows].sum() / denominator[rows].sum())
    return np.quantile(ratios, [0.025, 0.975])


def test_each_figure_has_the_percentile_interval_of_its_ratio_of_sums():
    sums = sums_of(np.random.default_rng(0), 80)
    found = intervals(sums, sums.figures(), None)
    for name, (column, tokens) in {"ce": ("ce", "labelled"), "forward_kl": ("forward_kl", "compared")}.items():
        expected = drawn_one_by_one(sums.column(column), sums.column(tokens))
        width = expected[1] - expected[0]
        assert found[name] == pytest.approx(expected, abs=0.1 * width)
    assert found["perplexity"] == pytest.approx(np.exp(found["ce"]))
    assert "accuracy" not in found


def test_they_do_not_depend_on_the_order_of_rows():
    sums = sums_of(np.random.default_rng(1), 30)
    turned = RowSums(sums.by_row[::-1].copy(), sums.bins)
    assert intervals(turned, turned.figures(), None) == intervals(sums, sums.figures(), None)


def test_right_answers_have_one_over_their_own_rows():
    sums, right = sums_of(np.random.default_rng(2), 40), np.array([1.0] * 30 + [0.0] * 10)
    low, high = intervals(sums, sums.figures(), right)["accuracy"]
    half = 1.96 * np.sqrt(0.75 * 0.25 / 40)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.03)


def test_of_one_row_and_of_what_is_not_known_there_is_none():
    sums = sums_of(np.random.default_rng(3), 1)
    assert intervals(sums, sums.figures(), np.array([1.0])) == {}
    unknown = sums_of(np.random.default_rng(3), 20)
    unknown.by_row[:, COLUMNS.index("ce_known")] = 0
    assert "ce" not in intervals(unknown, unknown.figures(), None)
    assert "forward_kl" in intervals(unknown, unknown.figures(), None)


def test_visual_reliance_is_over_the_tokens_of_rows_with_images():
    own, rows = sums_of(np.random.default_rng(4), 20), np.arange(5, 15)
    blanked = RowSums(own.by_row[rows].copy(), own.bins)
    blanked.column("ce")[:] += 0.25 * own.column("labelled")[rows]
    value, (low, high) = visual_reliance(own, blanked, rows)
    assert (value, low, high) == pytest.approx((0.25, 0.25, 0.25))
    own.column("labelled")[rows] = own.column("ce_known")[rows] = 0
    assert visual_reliance(own, blanked, rows) == (None, None)
