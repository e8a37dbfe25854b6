"""What SIGTERM and Ctrl-C do: real signals to this process."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from kdtrain.errors import Interrupted
from kdtrain.runs import signals


def send(signum):
    os.kill(os.getpid(), signum)


INSISTING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
ANNOUNCING = [signal.SIGUSR1, signal.SIGXCPU]


@pytest.mark.parametrize("signum", INSISTING)
def test_while_training_the_first_signal_is_noted_and_a_later_one_ends_at_once(signum, monkeypatch):
    before = signal.getsignal(signum)
    request = signals.StopRequest()

    def three_times():
        with request.listening():
            send(signum)
            send(signum)  # a launcher's copy of the same Ctrl-C
            assert request.noted == signum
            monkeypatch.setattr(signals, "_SAME_REQUEST_S", -1.0)
            send(signum)

    with pytest.raises(Interrupted, match="Second signal: stopped at once") as raised:
        three_times()
    assert raised.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize("signum", ANNOUNCING)
def test_what_announces_the_end_comes_again_while_the_state_is_saved(signum, monkeypatch):
    monkeypatch.setattr(signals, "_SAME_REQUEST_S", -1.0)
    request = signals.StopRequest()
    with request.listening():
        send(signum)
        send(signum)
        send(signal.SIGTERM)  # of a scheduler, when the time is up: the step may still be saved
        assert request.noted == signum
        with pytest.raises(signals._EndsAtOnce):
            send(signal.SIGTERM)


def test_a_signal_that_is_ignored_from_the_beginning_stays_ignored():
    """As `nohup` ignores SIGHUP, and a shell SIGINT of what runs in its background."""
    script = (
        "import os, signal\nfrom kdtrain.runs import signals\nrequest = signals.StopRequest()\n"
        "with request.listening(), signals.interrupting('at once'):\n"
        "    os.kill(os.getpid(), signal.SIGHUP), os.kill(os.getpid(), signal.SIGINT)\nprint(request.noted)"
    )
    ignoring = ["sh", "-c", 'trap \'\' HUP INT; exec "$0" -c "$1"', sys.executable, script]
    done = subprocess.run(ignoring, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


@pytest.mark.parametrize("signum", [*INSISTING, *ANNOUNCING])
def test_every_command_ends_with_the_code_of_the_signal_and_a_line(signum, tmp_path):
    script = (
        "import sys, time\nfrom kdtrain.cli import main\nimport kdtrain.runs.report as report\n"
        "def write_report(*args): print('begun', flush=True); time.sleep(60)\n"
        "report.write_report = write_report\nsys.argv = ['kdtrain', 'report', 'run']\nmain()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout.readline() == "begun\n"
        run.send_signal(signum)
        assert run.wait() == 128 + signum
        assert run.stderr.read().splitlines() == ["kdtrain: Interrupted outside of training: nothing more was saved."]


def test_where_waiting_would_take_long_a_signal_is_an_error_that_says_what_is_kept():
    with pytest.raises(Interrupted, match="kept in there") as raised, signals.interrupting("kept in there"):
        send(signal.SIGTERM)
    assert raised.value.exit_code == 143


def test_a_signal_is_no_error_of_the_line_it_interrupts():
    def opened():
        try:
            send(signal.SIGTERM)
        except Exception as error:  # as where an image is opened
            raise ValueError("the image cannot be read") from error

    with pytest.raises(Interrupted, match="kept in there"), signals.interrupting("kept in there"):
        opened()


def test_while_a_launcher_runs_signals_go_on_to_it():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], start_new_session=True)
    with signals.passed_on_to(process):
        send(signal.SIGXCPU)
        assert process.wait(timeout=20) == -signal.SIGXCPU


@pytest.mark.parametrize(("program", "imports"), [("kdtrain", "kdtrain.cli"), ("kdtrain.runs.agent", "kdtrain.config")])
@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_a_program_imports_ends_it_without_a_traceback(program, imports, ignored):
    script = (
        "import os, runpy, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {imports!r}: os.kill(os.getpid(), signal.SIGINT), os._exit(5)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        f"{'signal.signal(signal.SIGINT, signal.SIG_IGN)' * ignored}\n"
        f"runpy.run_module({program!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (5 if ignored else -signal.SIGINT, "")


def test_in_a_thread_signals_are_left_to_the_main_one():
    seen = []

    def listen():
        with signals.StopRequest().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert seen == [before]
