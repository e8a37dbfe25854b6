"""Variables of a launcher that no launcher has set: said, instead of waiting for processes that nobody starts."""

import os
import subprocess
import sys
import time

import pytest

from kdtrain.cli import meeting
from kdtrain.errors import PreflightError
from tests import tiny

ALONE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
WAITING = (
    "import time\nfrom kdtrain.cli import meeting\nmeeting._SAID_AFTER_S = 0.3\n"
    "with meeting.meeting():\n    time.sleep(float(meeting.os.environ['FOR']))\nprint('met')"
)


def waiting(seconds, **variables):
    known = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC", "SLURM_", "PMI_", "OMPI_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(known)}
    script = [sys.executable, "-c", WAITING]
    env |= {**ALONE, **variables, "FOR": str(seconds)}
    return subprocess.run(script, env=env, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ({**ALONE, "RANK": "2"}, "ranks count from 0"),
        ({**ALONE, "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({**ALONE, "RANK": ""}, "RANK is ''"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
    ],
)
def test_variables_that_cannot_be_right_are_refused(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PreflightError) as refused:
        meeting.check_variables()
    assert said in str(refused.value)
    assert f"unset {' '.join(name for name in meeting.VARIABLES if name in variables)}" in str(refused.value)


@pytest.mark.parametrize("command", ["fit", "cache", "evaluate"])
def test_a_command_refuses_them_at_once(tmp_path, command):
    run = [sys.executable, "-m", "kdtrain", command, "config.yaml"]
    env = {**os.environ, "WORLD_SIZE": "many"}
    done = subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("kdtrain: WORLD_SIZE is 'many', and has to be a number")


def test_left_over_variables_are_named_before_anything_is_waited_for(monkeypatch, caplog):
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    meeting.check_variables()
    assert "takes itself for rank 0 of 2" in caplog.text
    assert "unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT" in caplog.text


def test_a_process_that_nobody_comes_to_ends_and_says_so():
    began = time.monotonic()
    done = waiting(50)
    assert done.returncode == PreflightError.exit_code
    assert "rank 0 of 2 waits for the others at 127.0.0.1:29512" in done.stderr
    assert "unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT" in done.stderr
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "variables",
    tiny.one_in(
        2, [{"TORCHELASTIC_RUN_ID": "none"}, {"MASTER_ADDR": "10.0.0.1"}, {"SLURM_NTASKS": "2"}, {"PMI_SIZE": "2"}]
    ),
)
def test_where_others_may_still_come_it_is_said_and_one_waits(variables):
    done = waiting(1.0, **variables)
    assert (done.returncode, done.stdout) == (0, "met\n")
    assert "rank 0 of 2 waits for the others" in done.stderr


def test_those_who_meet_say_nothing():
    done = waiting(0.0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "met\n", "")
