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
from kdtrain.runs import lock
from kdtrain.runs.lock import refuse_if_locked, run_lock
from kdtrain.runs.status import read_status, write_status
from tests import test_cli, tiny

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


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "_TOUCH_S", 0.05)
    monkeypatch.setattr(lock, "_GONE_S", 1.0)


ELSEWHERE = [{"host": "elsewhere"}, {"kernel": "another container"}]


@pytest.mark.parametrize("where", ELSEWHERE)
def test_of_a_run_that_cannot_be_seen_from_here_one_waits_for_a_sign_of_life(tmp_path, quick, caplog, where):
    with run_lock(tmp_path):
        pretend = {**json.loads((tmp_path / "run.lock").read_text()), "pid": 7, **where}
        (tmp_path / "run.lock").write_text(json.dumps(pretend))
        lock._held[tmp_path]._text = json.dumps(pretend)  # this process goes on to touch it
        with pytest.raises(PreflightError, match="pid 7 on "):
            refuse_if_locked(tmp_path)
        assert "waiting up to 1 s for a sign of life" in caplog.text


@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("hours", tiny.first_quick([-3, 0, 3]))
def test_one_that_gives_none_is_taken_over_whatever_its_clock_says(tmp_path, quick, caplog, where, hours):
    hold(tmp_path, pid=os.getpid(), **where)
    os.utime(tmp_path / "run.lock", (time.time() + hours * 3600,) * 2)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
        assert "left from a run that was killed" in caplog.text
    assert not list(tmp_path.iterdir())


def test_who_was_suspended_and_lost_the_folder_writes_nothing_more(project, kdtrain, monkeypatch):
    """Its clock jumps, as of a machine that wakes up, and another run has the lock."""
    written = lock.Lock.require_held

    def woken(self):
        hold(project / "run", pid=4711, host="elsewhere")
        (project / "run" / "status.json").write_text("{}")
        self._touched_at -= 600
        written(self)

    monkeypatch.setattr(lock.Lock, "require_held", woken)
    code, _, err = kdtrain("fit", "config.yaml", "training.save_strategy=steps", "training.save_steps=1")
    assert code == 6
    assert "was taken by another run, pid 4711 on elsewhere" in err
    assert (project / "run" / "status.json").read_text() == "{}"
    assert json.loads((project / "run" / "run.lock").read_text())["pid"] == 4711
    assert not list((project / "run").glob("checkpoint-*"))
    assert not (project / "run" / "report.html").exists()


def test_of_two_that_find_a_lock_left_one_alone_gets_it(tmp_path, quick, monkeypatch):
    """Both have seen that it is left; the second one removes what it has seen, and not the first one's."""
    hold(tmp_path, host="elsewhere")
    left = (tmp_path / "run.lock").read_text()
    with run_lock(tmp_path):
        lock._remove(tmp_path / "run.lock", left)
        with pytest.raises(PreflightError, match="is going on"), run_lock(tmp_path):
            pass


def test_where_there_are_no_hard_links_a_lock_is_exclusive_too(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(PermissionError()))
    with run_lock(tmp_path):
        with pytest.raises(FileExistsError):
            lock._make(tmp_path / "run.lock", tmp_path / "own", "mine")
        with pytest.raises(PreflightError), run_lock(tmp_path):
            pass


def test_a_status_that_says_running_is_believed_while_the_lock_is_held(tmp_path, quick):
    with run_lock(tmp_path):
        write_status(tmp_path, "running")
        assert read_status(tmp_path)["state"] == "running"
    assert read_status(tmp_path)["state"] == "died"
    hold(tmp_path, host="elsewhere")
    assert read_status(tmp_path)["state"] == "running"
    os.utime(tmp_path / "run.lock", (time.time() - 5,) * 2)
    assert read_status(tmp_path)["state"] == "died"


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


@pytest.mark.slow
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
