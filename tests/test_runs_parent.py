"""A process below a launcher ends with it, also where it hangs and hears no signal."""

import os
import subprocess
import sys
import time

import psutil
import pytest

CHILD = (
    "import signal, subprocess, sys, time\nfrom kdtrain.runs import parent\n"
    "parent.GRACE_S, parent._LOOK_S = 0.5, 0.1\nparent.end_with_parent()\n"
    "signal.signal(signal.SIGTERM, lambda *_: print('heard', flush=True))\n"
    "own = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\nprint(own.pid, flush=True)\n"
    "until = time.monotonic() + 60\nwhile time.monotonic() < until: time.sleep(1)\n"
)
LAUNCHER = (
    "import os, subprocess, sys, time\nfrom kdtrain.runs.parent import started_by_me\n"
    "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], env=started_by_me())\n"
    "print(child.pid, flush=True)\ntime.sleep(60)\n"
)


def lives(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_process_that_hangs_is_killed_with_what_it_has_started():
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, CHILD], stdout=subprocess.PIPE, text=True)
    child, grandchild = (int(launcher.stdout.readline()) for _ in range(2))
    assert lives(child)
    assert lives(grandchild)
    launcher.kill()
    assert launcher.stdout.readline() == "heard\n"
    deadline = time.monotonic() + 20
    while lives(child) or lives(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.communicate()


@pytest.mark.parametrize(
    ("launcher", "variable", "watches"),
    [("accelerate launch", True, True), ("accelerate launch", False, False), ("a shell", True, False)],
)
def test_a_process_that_no_launcher_has_started_goes_on(tmp_path, launcher, variable, watches):
    """One that `accelerate launch` alone has started has none of torch's variables."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "KDTRAIN"))}
    env |= {"ACCELERATE_MIXED_PRECISION": "no"} if variable else {}
    script = "import threading\nfrom kdtrain.runs import parent\nparent.end_with_parent()\n"
    script += "print(len(threading.enumerate()))"
    (tmp_path / "accelerate").write_text("import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[-1]])")
    own = ["launch"] if launcher == "accelerate launch" else []
    command = [sys.executable, str(tmp_path / "accelerate"), *own, script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout == f"{1 + watches}\n", done.stderr
