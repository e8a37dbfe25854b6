"""The verdict from plain numbers: its rules one by one, and by simulation what its intervals promise."""

import time

import numpy as np
import pytest

from kdtrain.runs import verdict as module
from kdtrain.runs.verdict import (
    bootstrap,
    gap_closed,
    gap_interval,
    student_t,
    verdict_of_pairs,
    verdict_of_rows,
)

# Two-sided 95 % points of Student's t, as printed in tables.
T_TABLE = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 9: 2.2622, 10: 2.2281, 30: 2.0423,
           100: 1.9840, 1000: 1.9623}  # fmt: skip


def rows_of(rng, rows, effect, noise=0.5):
    """(CE sums of the run, of the other, tokens); per token they differ by `effect` and by a noise of the row."""
    tokens = rng.integers(5, 60, rows).astype(float)
    other = tokens * rng.gamma(6, 0.5, rows)
    return other + tokens * (effect + noise * rng.standard_normal(rows)), other, tokens


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_a_run_beats_another_where_the_whole_interval_is_below_zero():
    run, other, tokens = rows_of(np.random.default_rng(0), 400, effect=-0.3)
    found = verdict_of_rows(run, other, tokens)
    assert found.word == "BEATS"
    assert found.interval[0] < found.difference < found.interval[1] < 0
    assert found.difference == pytest.approx((run.sum() - other.sum()) / tokens.sum())


def test_it_is_no_better_where_at_most_a_hundredth_can_have_been_gained():
    run, other, tokens = rows_of(np.random.default_rng(0), 4000, effect=0.0, noise=0.05)
    found = verdict_of_rows(run, other, tokens)
    assert found.word == "NO BETTER"
    assert found.interval[0] > -0.01 * other.sum() / tokens.sum()


def test_a_run_that_is_worse_is_no_better():
    assert verdict_of_rows(*rows_of(np.random.default_rng(0), 200, effect=0.5)).word == "NO BETTER"


def test_it_is_inconclusive_where_much_may_have_been_gained_or_nothing():
    found = verdict_of_rows(*rows_of(np.random.default_rng(1), 30, effect=0.0))
    assert found.word == "INCONCLUSIVE"
    assert found.interval[0] < -0.03
    assert found.interval[1] > 0


def test_a_small_gain_that_is_certain_beats_although_it_is_below_a_hundredth():
    run, other, tokens = rows_of(np.random.default_rng(0), 4000, effect=-0.01, noise=0.05)
    found = verdict_of_rows(run, other, tokens)
    assert found.interval[0] > -0.01 * other.sum() / tokens.sum()
    assert found.word == "BEATS"


@pytest.mark.parametrize(("rows", "word"), [(2, "INCONCLUSIVE"), (9, "INCONCLUSIVE"), (10, "BEATS")])
def test_of_a_few_rows_nothing_is_said_however_they_agree(rows, word):
    found = verdict_of_rows(np.linspace(1, 2, rows), np.full(rows, 9.0), np.full(rows, 4))
    assert found.word == word
    assert (found.interval is None) == (rows < 10)
    assert ("fewer than 10 rows" in found.method) == (rows < 10)


def test_one_row_tells_nothing():
    found = verdict_of_rows([1.0], [9.0], [4])
    assert found.word == "INCONCLUSIVE"
    assert found.interval is None
    assert found.difference == -2


def test_two_pairs_are_inconclusive_however_far_apart_they_are():
    found = verdict_of_pairs([1.0, 1.1], [3.0, 3.2])
    assert found.word == "INCONCLUSIVE"
    assert found.interval is None
    assert found.difference == pytest.approx(-2.05)


def test_three_pairs_have_the_interval_of_students_t():
    run, other = [3.0, 3.1, 2.9], [3.4, 3.3, 3.5]
    d = np.subtract(run, other)  # −0.4, −0.2, −0.6
    half = 4.3027 * 0.2 / 3**0.5
    found = verdict_of_pairs(run, other)
    assert found.interval == pytest.approx((d.mean() - half, d.mean() + half), abs=1e-4)
    assert found.word == "INCONCLUSIVE"
    assert verdict_of_pairs([3.0, 3.1, 2.9], [3.4, 3.5, 3.3]).word == "BEATS"  # 0.4 each time: pairs count
    assert verdict_of_pairs([3.4, 3.5, 3.3], [3.4, 3.5, 3.3]).word == "NO BETTER"


@pytest.mark.parametrize("degrees", T_TABLE)
def test_the_quantiles_of_students_t_are_those_of_the_tables(degrees):
    assert student_t(0.975, degrees) == pytest.approx(T_TABLE[degrees], abs=6e-5)


def test_quantiles_at_other_levels_are_those_of_the_tables():
    assert student_t(0.95, 4) == pytest.approx(2.1318, abs=6e-5)
    assert student_t(0.995, 7) == pytest.approx(3.4995, abs=6e-5)
    assert student_t(0.5, 3) == pytest.approx(0, abs=1e-12)


def test_the_gap_is_closed_by_the_share_of_the_teachers_lead():
    assert gap_closed(4.0, 3.5, 3.0) == 0.5
    assert gap_closed(4.0, 4.5, 3.0) == -0.5
    assert gap_closed(3.0, 2.9, 3.0) is None  # the teacher is not better
    assert gap_closed(3.0, 2.9, None) is None
    assert gap_closed(None, 2.9, 2.0) is None


# ---- intervals -------------------------------------------------------------------------------------------------------


def test_the_order_of_rows_changes_no_digit():
    rng = np.random.default_rng(4)
    run, other, tokens = rows_of(rng, 100, effect=-0.05)
    shuffled = rng.permutation(100)
    assert verdict_of_rows(run, other, tokens) == verdict_of_rows(run[shuffled], other[shuffled], tokens[shuffled])


def test_rows_count_by_their_tokens():
    """A row of 90 tokens outweighs nine of one: as a mean of row means the difference would have the other sign."""
    run, other, tokens = [90.0, *[3.0] * 9], [180.0, *[2.0] * 9], [90, *[1] * 9]
    assert verdict_of_rows(run, other, tokens).difference == pytest.approx((117 - 198) / 99)


def test_how_many_are_drawn_at_a_time_changes_nothing(monkeypatch):
    columns = np.column_stack(rows_of(np.random.default_rng(5), 50, effect=0.1))
    monkeypatch.setattr(module, "DRAWS", 1000)
    statistic = lambda sums: (sums[..., 0] - sums[..., 1]) / sums[..., 2]  # noqa: E731
    whole = bootstrap(columns, statistic, draws=1000)
    monkeypatch.setattr(module, "_AT_ONCE", 50 * 7)
    assert bootstrap(columns, statistic, draws=1000) == pytest.approx(whole, rel=1e-12)


def test_the_interval_is_that_of_a_loop_that_draws_rows():
    """Not the same draws, so not the same digits."""
    run, other, tokens = rows_of(np.random.default_rng(6), 60, effect=0.0)
    rng, values = np.random.default_rng(99), []
    for _ in range(4000):
        drawn = rng.integers(0, 60, 60)
        values.append((run[drawn].sum() - other[drawn].sum()) / tokens[drawn].sum())
    expected = np.quantile(values, [0.025, 0.975])
    width = expected[1] - expected[0]
    assert verdict_of_rows(run, other, tokens).interval == pytest.approx(expected, abs=0.06 * width)


def simulated(rows, effect, sets, seed):
    """The intervals of many sets of rows, from 800 draws each."""
    rng = np.random.default_rng(seed)
    for _ in range(sets):
        columns = np.column_stack(rows_of(rng, rows, effect))
        yield bootstrap(columns, lambda sums: (sums[..., 0] - sums[..., 1]) / sums[..., 2], draws=800)


def test_intervals_hold_the_true_difference_as_often_as_they_say():
    inside = [low < 0.1 < high for low, high in simulated(80, 0.1, sets=500, seed=1)]
    assert 0.92 <= np.mean(inside) <= 0.975  # 95 % less what 80 rows cost, ± 3 standard errors of 500 sets


def test_equal_models_are_said_to_beat_each_other_no_more_often_than_the_level_allows():
    beats = [high < 0 for _, high in simulated(80, 0.0, sets=500, seed=2)]
    assert np.mean(beats) <= 0.025 + 3 * (0.025 * 0.975 / 500) ** 0.5


def test_equal_seeds_are_said_to_beat_each_other_no_more_often_than_the_level_allows():
    rng = np.random.default_rng(3)
    words = [verdict_of_pairs(*(3 + 0.1 * rng.standard_normal((2, 3)))).word for _ in range(3000)]
    assert np.mean([word == "BEATS" for word in words]) <= 0.025 + 3 * (0.025 * 0.975 / 3000) ** 0.5


def test_ten_thousand_draws_of_ten_thousand_rows_take_seconds():
    started = time.process_time()
    verdict_of_rows(*rows_of(np.random.default_rng(7), 10_000, effect=0.0))
    assert time.process_time() - started < 30


def test_a_gap_to_a_teacher_that_may_not_be_better_has_no_interval():
    rng = np.random.default_rng(8)
    before = rng.gamma(6, 5, 100)
    clear = gap_interval(before, before - 4 + rng.standard_normal(100), before - 8 + rng.standard_normal(100))
    assert clear[0] < 0.5 < clear[1]
    assert gap_interval(before, before - 0.1, before + 5 * rng.standard_normal(100)) is None
