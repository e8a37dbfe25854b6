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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
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


def test_while_a_launcher_runs_sigterm_is_passed_on_and_ctrl_c_waits_for_it():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    with signals.passed_on_to(process):
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM


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
