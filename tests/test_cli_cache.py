"""`kdtrain cache` from the outside: what is printed, on which stream, and with which exit code it ends."""

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from kdtrain.cli import app as cli
from kdtrain.teachers.cached.manifest import Manifest

OF_A_PROCESS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture
def kdtrain(monkeypatch, capsys, project):
    """Run a command in this process, in the project's folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(project)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdtrain", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        captured = capsys.readouterr()
        return done.value.code, captured.out, captured.err

    yield run
    logger = logging.getLogger("kdtrain")
    logger.handlers, logger.propagate = [], True


def started(project, *arguments):
    command = [sys.executable, "-m", "kdtrain", "cache", "config.yaml", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=project, env={**os.environ, **OF_A_PROCESS}, **pipes)


def test_it_says_what_it_wrote_and_how_to_train_from_it(kdtrain):
    code, out, err = kdtrain("cache", "config.yaml", "--out", "c", "--verify", "3")
    assert code == 0, err
    first, second, third = out.splitlines()
    assert first.startswith("6 rows, 51 supervised tokens, ")
    assert "bytes a token in c (" in first
    assert second.startswith("verified 3 rows: the largest difference is ")
    assert third == "train from it: kdtrain fit CONFIG rlhf.teacher.backend=cache rlhf.teacher.path=c"
    table = " ".join(err.split())
    assert "targets the 50 most likely tokens, of 320 tokens" in table
    assert "rows 6 different ones, 51 supervised tokens" in table
    assert "size about " in table
    assert "cache: 6 of 6 rows" in err


def test_what_it_prints_trains_from_it(kdtrain, project):
    _, out, _ = kdtrain("cache", "config.yaml", "--out", "c", "rlhf.lmbda=0.5")
    words = out.splitlines()[-1].removeprefix("train from it: kdtrain fit CONFIG ").split()
    assert words[-1] == "rlhf.lmbda=0"
    (project / "teacher").rename(project / "gone")
    code, out, err = kdtrain("fit", "config.yaml", *words, f"rlhf.teacher_model={project}/teacher")
    assert code == 0, err
    assert out.startswith("4 steps")


def test_a_finished_cache_says_so(kdtrain):
    kdtrain("cache", "config.yaml", "--out", "c")
    code, out, err = kdtrain("cache", "config.yaml", "--out", "c")
    assert code == 0, err
    assert "in c: complete, nothing was left to write" in out


def test_quiet_and_json(kdtrain):
    _, _, err = kdtrain("cache", "config.yaml", "--out", "c", "--quiet")
    assert "cache:" not in err
    assert "targets" not in err.replace("The teacher's targets", "")
    _, _, err = kdtrain("cache", "config.yaml", "--out", "d", "--log-format", "json")
    events = [json.loads(line) for line in err.splitlines()]
    assert [event["event"] for event in events if event["event"] != "message"] == ["data", "data", "plan", "cache"]
    assert events[-1].pop("time")
    assert events[-1] == {"event": "cache", "done": 6, "total": 6, "remaining_s": 0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out DIR is missing"),
        (["--out", "c", "--mode", "dense"], "--mode is one of topk, sample, hidden, chunks, got 'dense'"),
        (["--out", "c", "--mode", "hidden", "--hidden-dtype", "int4"], "--hidden-dtype is one of auto, int8"),
        (["--out", "c", "--draws", "3"], "--draws is an option of --mode sample"),
        (["--out", "c", "--mode", "sample", "--top-k", "3"], "--top-k is an option of --mode topk"),
        (["--out", "c", "--hidden-dtype", "int8"], "--hidden-dtype is an option of --mode hidden"),
        (["--out", "c", "--top-k", "0"], "Input should be greater than or equal to 1"),
        (["--out", "c", "rlhf.lmbda=1"], "answers are generated while training"),
    ],
)
def test_what_cannot_be_is_one_message_and_exit_code_2(kdtrain, project, arguments, message):
    code, out, err = kdtrain("cache", "config.yaml", *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert not out
    assert not (project / "c").exists()


def test_a_place_where_nothing_can_be_written_is_refused_before_the_teacher_is_asked(kdtrain):
    code, _, err = kdtrain("cache", "config.yaml", "--out", "train.jsonl/c/d")
    assert code == 3
    assert "--out train.jsonl/c/d lies in " in err
    assert "train.jsonl, which is a file" in err
    assert "make room" not in err
    assert "6 of 6 rows" not in err


def test_a_cache_is_not_imported_but_trained_from(kdtrain):
    kdtrain("cache", "config.yaml", "--out", "c")
    code, _, err = kdtrain("cache", "config.yaml", "--from", "c", "--out", "d")
    assert code == 3
    assert "--from c is a cache that kdtrain wrote. Train from it as it is" in err


@pytest.mark.slow
def test_several_processes_write_one_cache(project):
    process = started(project, "--out", "c", "launch.num_processes=2", "training.use_cpu=true")
    out, err = process.communicate(timeout=170)
    assert process.returncode == 0, err
    assert "accelerate launch" in err
    assert out.count("train from it") == 1
    assert err.count("cache: 6 of 6 rows") <= 1
    assert Manifest.read(project / "c").complete


@pytest.mark.slow
def test_sigterm_ends_it_with_143_and_one_line(project):
    rows = [{"prompt": f"What is {i}?", "completion": "the path " * (1 + i % 5)} for i in range(4000)]
    (project / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = started(project, "--out", "c", "data.max_length=256", "training.per_device_eval_batch_size=1")
    until = time.monotonic() + 120
    while not list(project.glob("c/shard-*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.splitlines()[-1] == "kdtrain: Stopped. Whole shards stay in c: the same command goes on from there."
    assert not Manifest.read(project / "c").complete
