"""A run that is killed with -9 goes on, and ends with the weights and records of one that nobody killed."""

import pytest

from tests import kills

# What each leaves: a torn file in the middle, the last file before the manifest torn, an older checkpoint half removed.
QUICK = ("weights half written", "trainer state half written", "an older one half removed")


def check(project, expected, point, tolerance=0.0):
    said, left = kills.kill_and_resume(project, point)
    complete = point in ("manifest written", "an older one half removed")
    assert f"checkpoint-{4 if complete else 3}." in said  # Resuming from …
    assert ("checkpoint-4 is skipped: it is not complete: the run ended while it was written" in said) != complete
    assert kills.difference(left, expected) <= tolerance
    assert left[1] == expected[1] or tolerance
    names = {path.name for path in (project / "run").glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (kills.STEPS - 1, kills.STEPS)}  # nothing else is left behind


def test_killed_inside_a_save_it_goes_on_from_the_newest_complete_one_bit_for_bit(tmp_path):
    project = kills.make_project(tmp_path, "text")
    expected, _ = kills.uninterrupted(project)
    for point in QUICK:
        check(project, expected, point)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", kills.KINDS)
def test_killed_at_every_point_inside_a_save_it_goes_on_from_the_newest_complete_one(tmp_path, kind):
    project = kills.make_project(tmp_path, kind)
    expected, _ = kills.uninterrupted(project)
    for point in kills.POINTS:
        check(project, expected, point, kills.TOLERANCE.get(kind, 0.0))


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", kills.KINDS)
def test_killed_at_25_random_times_it_always_goes_on_and_ends_as_if_nobody_had(tmp_path, kind):
    tally = kills.kill_at_random(tmp_path, kind, 25, seed=0)
    print(f"\n{kills.HEADER}\n{tally.row()}")
    assert tally.failures == []
    assert tally.kills == 25
    assert tally.resumed >= 1
    assert tally.finished >= 1
    assert tally.largest <= kills.TOLERANCE.get(kind, 0.0)


@pytest.mark.slow
def test_killed_at_three_random_times_it_ends_as_if_nobody_had(tmp_path):
    tally = kills.kill_at_random(tmp_path, "text", 3, seed=1)
    assert (tally.kills, tally.failures, tally.largest) == (3, [], 0.0)
