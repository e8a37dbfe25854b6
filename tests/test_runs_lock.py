"""`run.lock`: two runs in one folder, one that was killed, one on another machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from kdtrain.errors import PreflightError
from kdtrain.runs.lock import refuse_if_locked, run_lock
from tests import test_cli

kdtrain = test_cli.kdtrain


def hold(run, **changes):
    run.mkdir(exist_ok=True)
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time(), **changes}
    (run / "run.lock").write_text(json.dumps(holder))


def test_a_second_run_in_a_folder_is_refused_at_once_with_who_holds_it_and_leaves_it_alone(
    project, kdtrain, monkeypatch
):
    hold(project / "run")
    monkeypatch.setattr("kdtrain.config.arguments.build_train_arguments", None)  # what imports torch is not come to
    for arguments in ([], ["--resume", "auto"]):
        code, _, err = kdtrain("fit", "config.yaml", *arguments)
        assert code == 3
        assert f"pid {os.getpid()} on {socket.gethostname()}, since 20" in err
        assert f"kill {os.getpid()}" in err
    assert [path.name for path in (project / "run").iterdir()] == ["run.lock"]


def test_the_lock_of_a_killed_process_is_taken_over_and_gone_at_the_end(project, kdtrain):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    hold(project / "run", pid=gone.pid)
    code, _, err = kdtrain("fit", "config.yaml", "training.max_steps=1")
    assert code == 0, err
    assert "is left from a run that was killed" in err
    assert not (project / "run" / "run.lock").exists()


def test_a_process_that_has_ended_and_that_nobody_waits_for_is_no_run(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    while psutil.Process(ended.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    hold(tmp_path, pid=ended.pid)
    refuse_if_locked(tmp_path)
    ended.wait()


def test_a_later_process_with_the_number_of_a_killed_one_is_no_run(tmp_path):
    hold(tmp_path, since=time.time() - 10 * 365 * 86400)  # this process is younger
    refuse_if_locked(tmp_path)
    hold(tmp_path)
    with pytest.raises(PreflightError):
        refuse_if_locked(tmp_path)


def test_of_another_machine_it_says_how_to_tell(tmp_path):
    hold(tmp_path, host="elsewhere", pid=7)
    (tmp_path / "logging.jsonl").touch()
    with pytest.raises(PreflightError) as refused:
        refuse_if_locked(tmp_path)
    for part in ("pid 7 on elsewhere", "ps -p 7", "record is 0 minutes old", f"delete {tmp_path / 'run.lock'}"):
        assert part in str(refused.value)


def test_ranks_share_the_lock_of_rank_0(tmp_path, monkeypatch):
    with run_lock(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        with run_lock(tmp_path / "run"):
            pass
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(PreflightError), run_lock(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / "run.lock").exists()
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_while_it_is_built_leaves_no_lock_and_no_folder(project, kdtrain, monkeypatch):
    def fails(*args):
        assert (project / "run" / "run.lock").exists()
        raise PreflightError("no")

    monkeypatch.setattr("kdtrain.runs.fit.build_trainer", fails)
    assert kdtrain("fit", "config.yaml")[0] == 3
    assert not (project / "run").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_the_run_is_built_leaves_no_lock(project, signum, code):
    script = (
        "import sys, os, time\nfrom kdtrain.cli import main\nimport kdtrain.runs.fit as fit\n"
        "def build(*args): print('building', flush=True); time.sleep(60)\n"
        "fit.build_trainer = build\nsys.argv = ['kdtrain', 'fit', 'config.yaml']\nmain()\n"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "building\n"
        assert (project / "run" / "run.lock").exists()
        run.send_signal(signum)
        assert run.wait() == code
        assert "nothing more was saved" in run.stderr.read()
    assert not (project / "run").exists()
