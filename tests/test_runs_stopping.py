"""Where a signal finds a run: in an evaluation, on one of two ranks; and what a rank says that has lost another."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from kdtrain.cli import last_words
from kdtrain.errors import CheckpointError, Interrupted, LostRankError, PreflightError, TeacherError
from kdtrain.runs import status
from kdtrain.runs.callbacks import LeftEvaluationError, Records, StopOnSignal
from kdtrain.runs.lost_rank import lost_ranks_named
from kdtrain.runs.signals import StopRequest
from kdtrain.trainer import GKDTrainerWithMetrics
from kdtrain.trainer.guard import NonFiniteGuard
from tests import test_cli, tiny

kdtrain = test_cli.kdtrain

OPTIONS = ["training.max_steps=6", "training.eval_steps=2", "training.per_device_eval_batch_size=2", "rlhf.lmbda=0.5"]
OPTIONS += ["rlhf.max_new_tokens=4", "training.load_best_model_at_end=true", "training.save_strategy=steps"]
OPTIONS += ["training.save_steps=2", "model.init_kwargs.attention_dropout=0.1"]
TIMES = ("per_second", "_gib", "runtime", "_s")


def records(run):
    lines = (run / "logging.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(TIMES)} for line in lines]


@pytest.mark.slow
def test_an_evaluation_is_left_after_its_batch_and_made_by_the_resumed_run(project, kdtrain, monkeypatch):
    at = 4
    assert kdtrain("fit", "config.yaml", *OPTIONS, "training.output_dir=uninterrupted")[0] == 0
    seen, original = [], GKDTrainerWithMetrics.prediction_step

    def signalled(self, *args, **kwargs):
        seen.append(self.state.global_step)
        if seen.count(at) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(GKDTrainerWithMetrics, "prediction_step", signalled)
        code, _, err = kdtrain("fit", "config.yaml", *OPTIONS)
    assert code == 128 + signal.SIGUSR1
    assert f"Stopped at step {at} of 6; the state is saved" in err
    assert seen.count(at) == 3, "twelve batches, and it was to be left after the third"
    found = json.loads((project / "run" / "status.json").read_text())
    assert (found["state"], found["last_checkpoint"]) == ("stopped", f"checkpoint-{at}")
    code, _, err = kdtrain("fit", "config.yaml", *OPTIONS, "--resume", "auto")
    assert code == 0, err
    assert records(project / "run") == records(project / "uninterrupted")
    ours, other = (load_file(project / run / "model.safetensors") for run in ("run", "uninterrupted"))
    assert all(torch.equal(ours[name], other[name]) for name in other)
    best = [json.loads((project / run / "status.json").read_text())["best"] for run in ("run", "uninterrupted")]
    assert best[0] == best[1]


def _in_evaluation(own_signal):
    """Batches that a rank evaluates until the ranks stop, rank 1 having got a signal in the third."""
    torch.distributed.init_process_group("gloo")
    accelerator, request = Accelerator(cpu=True), StopRequest()
    guard = NonFiniteGuard(SimpleNamespace(accelerator=accelerator))
    trainer = SimpleNamespace(accelerator=accelerator, agreements=guard.flags)
    callback, batches = StopOnSignal(trainer, request, Records()), 0
    with request.listening():
        try:
            while batches < 10:
                batches += 1
                if batches == 3 and accelerator.process_index == 1:
                    os.kill(os.getpid(), own_signal)
                guard.check_evaluation()  # as the trainer does after each batch
                trainer.agreed = guard.agreed
                callback.on_prediction_step()
        except LeftEvaluationError as left:
            return batches, left.signum
    return batches, 0


def test_a_signal_to_one_of_two_ranks_in_an_evaluation_stops_both_after_the_same_batch():
    assert tiny.run_ranks(_in_evaluation, 2, signal.SIGTERM) == [(3, signal.SIGTERM)] * 2


LOST = [
    RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"),
    torch.distributed.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed."),
    torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
]


@pytest.mark.parametrize("error", LOST)
def test_a_rank_whose_connection_breaks_says_that_another_one_has_ended(monkeypatch, error):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(LostRankError, match="Rank 1 cannot go on: another process of this run"), lost_ranks_named():
        raise error
    with pytest.raises(LostRankError), lost_ranks_named():
        raise PreflightError("The trainer could not be built.") from error


@pytest.mark.parametrize(
    "error", [TeacherError("Connection refused"), RuntimeError("shapes"), OSError("Broken pipe"), CheckpointError("x")]
)
def test_other_errors_are_left_as_they_are(monkeypatch, error):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(type(error)) as raised, lost_ranks_named():
        raise error
    assert raised.value is error


def test_of_several_ranks_one_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(last_words.tempfile, "gettempdir", lambda: str(tmp_path))
    error = PreflightError("no such file")

    def said_by(rank, error):
        monkeypatch.setenv("RANK", rank)
        return last_words.to_say(error, str(error))

    assert said_by("1", error) == "no such file"
    assert said_by("0", error) is None
    assert said_by("2", PreflightError("another")) == "rank 2: another"
    assert said_by("2", Interrupted(signal.SIGTERM, "as its launcher ends it")) is None
    assert said_by("0", LostRankError("as another has ended")) is None
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    monkeypatch.setattr(last_words.os, "getppid", lambda: 1)  # another launcher, later
    assert said_by("1", error) == "no such file"
    assert not left.exists()
    monkeypatch.delenv("RANK")
    assert last_words.to_say(error, "alone") == "alone"


@pytest.mark.parametrize("said", ["running", "stopped"])
def test_of_a_run_that_was_killed_its_launcher_says_that_it_failed(tmp_path, said):
    status.write_status(tmp_path, said, None if said == "running" else 143, progress={"step": 3})
    status.note_death(tmp_path, 137)
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["state"], found["exit_code"], found["step"]) == ("failed", 137, 3)
    assert "was killed" in found["message"]


@pytest.mark.parametrize(("said", "code"), [("finished", 0), ("stopped", 143), ("failed", 137)])
def test_what_a_run_has_said_of_its_end_stays(tmp_path, said, code):
    status.write_status(tmp_path, said, code, "its own words")
    status.note_death(tmp_path, 1 if said == "finished" else code)
    assert json.loads((tmp_path / "status.json").read_text())["message"] == "its own words"


def test_a_launchers_sigterm_after_a_failure_is_not_how_the_run_ended(tmp_path):
    status.write_status(tmp_path, "failed", 5, "not finite")
    status.write_status(tmp_path, "stopped", 143, "SIGTERM")
    assert json.loads((tmp_path / "status.json").read_text())["message"] == "not finite"


@pytest.mark.slow
def test_a_locale_that_is_not_utf_8_and_odd_names_do_no_harm(project):
    """A locale in ASCII, which Python is kept from leaving, no HOME, no TMPDIR, few files, and names of all kinds."""
    (project / "config.yaml").rename(project / "-k \u00f6'.yaml")
    (project / "train.jsonl").rename(project / 'tr \u00e4"\nx.jsonl')
    env = {**os.environ, "HOME": "/proc/none", "TMPDIR": "/proc/none", "LC_ALL": "C"}
    env |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    env.pop("HF_HOME", None)
    options = ['data.train="tr \u00e4\\"\\nx.jsonl"', "training.output_dir=r \u00fc'n", "training.max_steps=1"]
    limited = ["sh", "-c", 'ulimit -n 40; umask 077; exec "$@"', "sh", sys.executable, "-m", "kdtrain", "fit", "--"]
    arguments = [os.fsencode(one) for one in (*limited, "-k \u00f6'.yaml", *options)]
    done = subprocess.run(arguments, env=env, cwd=project, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"atplotlib" not in done.stderr  # which has no folder for what it keeps
    assert (project / "r \u00fc'n" / "model.safetensors").stat().st_mode & 0o77 == 0


def test_an_argument_in_another_encoding_is_refused(tmp_path):
    command = [os.fsencode(sys.executable), b"-m", b"kdtrain", b"fit", b"k\xf6.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("kdtrain: An argument is not UTF-8: k\\xf6.yaml.")) == (2, True)
