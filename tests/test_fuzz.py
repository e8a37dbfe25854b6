"""Nonsense in configs and data ends with a documented exit code; see `fuzz.py`. `make faults` tries the most."""

import json
import subprocess
import sys

import pytest


def fuzzed(kind, seed, count, capsys):
    """The summary of a run of its own, whose memory is limited."""
    command = [sys.executable, "-m", "tests.fuzz", kind, str(seed), str(count)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\nfuzz {kind}, seed {seed}: {json.dumps(summary)}")
    assert summary["failed"] == []
    assert done.returncode == 0
    return summary


@pytest.mark.slow
def test_no_config_ends_in_a_traceback_or_takes_long(capsys):
    summary = fuzzed("config", 1, 60, capsys)
    assert summary["ended"].keys() <= {"0", "2"}
    assert summary["tried"] > 90  # with the monsters
    assert summary["memory_mib"] < 200
    assert not summary["ran"]


@pytest.mark.slow
def test_no_data_ends_in_a_traceback(capsys):
    summary = fuzzed("data", 1, 60, capsys)
    assert summary["ended"].keys() == {"0", "2", "3"}


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_ten_thousand_configs(capsys):
    summary = fuzzed("config", 2, 10_000, capsys)
    assert summary["tried"] > 10_000


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_five_thousand_files_of_data(capsys):
    assert fuzzed("data", 2, 5_000, capsys)["tried"] == 5_000
