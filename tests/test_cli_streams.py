"""stdout and stderr that close, fill up or go away: a run goes on, and its model is saved."""

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from kdtrain.cli import app, streams
from tests import test_cli, tiny

kdtrain = test_cli.kdtrain
ROOT = Path(__file__).parent.parent
# What a run does with its streams: lines, a library's warning, a bar, a thread, and the interpreter's last flush.
WRITES = """
import sys, warnings
from kdtrain.cli import streams
streams.survive()
for number in range(2000):
    print("a line of a result", number)
    print("a line of a log", number, file=sys.stderr)
warnings.warn("of a library")
sys.stdout.flush()
open(sys.argv[1], "w").write("came to its end")
print("the last line")
"""


def shell(command, folder, **variables):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HERE": sys.executable, **variables}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.parametrize("buffered", [True, tiny.slow(False)], ids=["", "unbuffered"])
@pytest.mark.parametrize(
    "redirected", ["2>&1 | head -1", "> /dev/full 2>&1", *map(tiny.slow, (">&- 2>&-", "2>&-", ">&-")), "<&- >&- 2>&-"]
)
def test_a_process_outlives_its_streams(tmp_path, redirected, buffered):
    (tmp_path / "writes.py").write_text(WRITES)
    done = shell(
        f"set -o pipefail; $HERE writes.py ended {redirected}", tmp_path, PYTHONUNBUFFERED="" if buffered else "1"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ended").read_text() == "came to its end"
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_opened_later_does_not_get_the_number_of_a_closed_stream(tmp_path):
    text = (
        "from kdtrain.cli import streams; streams.survive()\n"
        "import os; file = open('data', 'wb'); os.write(2, b'of C code'); file.write(b'data')"
    )
    assert shell(f'$HERE -c "{text}" >&- 2>&-', tmp_path).returncode == 0
    assert (tmp_path / "data").read_bytes() == b"data"


def test_streams_work_as_before_where_nothing_is_wrong(tmp_path):
    text = "from kdtrain.cli import streams; streams.survive(); import sys; print('né\\udce9'); sys.stderr.write('log')"
    done = shell(f'$HERE -c "{text}"', tmp_path, PYTHONIOENCODING="utf-8")
    assert (done.stdout, done.stderr) == ("né\\udce9\n", "log")


def test_a_slow_reader_of_a_pipe_that_does_not_wait_loses_nothing():
    read, write = os.pipe()
    os.set_blocking(write, False)
    size = 0
    while True:
        try:
            size += os.write(write, bytes(4096))
        except BlockingIOError:
            break
    reader = subprocess.Popen([sys.executable, "-c", f"import os\nwhile os.read({read}, 65536): pass"], pass_fds=[read])
    raw = streams._Surviving(write, "w", closefd=False)
    assert raw.write(bytes(300_000)) == 300_000
    assert raw.error is None
    os.close(write)
    os.close(read)
    reader.wait()


@pytest.mark.parametrize(("redirected", "codes"), [("> /dev/full", "6"), ("| head -1", "0 0"), (">&-", "0")])
def test_a_command_that_only_prints_ends_silently_without_a_reader_and_not_on_a_full_disk(tmp_path, redirected, codes):
    done = shell(f"$HERE -m kdtrain schema {redirected}; echo ${{PIPESTATUS[@]}} >&2", tmp_path)
    lines = done.stderr.splitlines()
    assert lines[-1] == codes
    assert lines[:-1] == (
        ["kdtrain: Writing to stdout failed: No space left on device. What it has got is not complete."]
        if codes == "6"
        else []
    )


@contextlib.contextmanager
def broken(kind):
    """The number of a file that nothing can be written to."""
    if kind == "full":
        number = os.open("/dev/full", os.O_WRONLY)
    elif kind == "a terminal that is gone":
        master, number = pty.openpty()
        os.close(master)
    else:
        read, number = os.pipe()
        os.close(read)
    try:
        yield number
    finally:
        os.close(number)


@pytest.mark.parametrize(
    ("kind", "log_format"),
    [
        ("a pipe without a reader", "text"),
        ("full", "json"),
        *(tiny.slow(kind, "text") for kind in ("full", "a terminal that is gone")),
    ],
)
def test_training_goes_on_and_the_model_is_saved(project, monkeypatch, kind, log_format):
    """In this process; `test_a_run_of_its_own...` is the same from a shell."""
    monkeypatch.chdir(project)
    options = ["--log-format", log_format, "training.max_steps=2", "training.report=false"]
    monkeypatch.setattr(sys, "argv", ["kdtrain", "fit", "config.yaml", *options])
    with broken(kind) as number, monkeypatch.context() as patched:
        for name in ("stdout", "stderr"):
            raw = streams._Surviving(number, "w", closefd=False)
            patched.setattr(sys, name, streams.io.TextIOWrapper(streams.io.BufferedWriter(raw), "utf-8"))
        with pytest.raises(SystemExit) as done:
            app.main()
        sys.stdout.flush()
        assert sys.stdout.buffer.raw.error is not None  # it was tried
    assert done.value.code == 0
    assert (project / "run" / "model.safetensors").exists()
    assert len((project / "run" / "logging.jsonl").read_text().splitlines()) == 3


@pytest.mark.faults
@pytest.mark.parametrize(
    "redirected", ["2>&1 | head -1", "> /dev/full 2> /dev/full", ">&- 2>&-", "--log-format json 2>&1 | head -1"]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_of_its_own_outlives_its_streams(project, redirected, ranks):
    options = f"training.output_dir=run training.use_cpu=true launch.num_processes={ranks}"
    done = shell(f"set -o pipefail; $HERE -m kdtrain fit config.yaml {options} {redirected}", project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "run" / "model.safetensors").exists()
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.faults
def test_a_run_outlives_its_terminal(project):
    """As by nohup: without a signal, but the terminal is gone after the first line."""
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "kdtrain", "fit", "config.yaml", "training.max_steps=20"],
        cwd=project, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    os.read(master, 100)
    os.close(master)
    assert process.wait(timeout=280) == 0
    assert (project / "run" / "model.safetensors").exists()


def test_control_characters_of_a_server_or_the_hub_are_shown_escaped(project, kdtrain, monkeypatch):
    """Whatever an error, a name or a warning holds: the terminal sees none of it."""
    from kdtrain.errors import PreflightError

    def fail(*_, **__):
        raise PreflightError("the hub says \x1b[31mred\x07 ‮txt")

    monkeypatch.setattr("kdtrain.runs.fit.build_trainer", fail)
    code, _, err = kdtrain("fit", "config.yaml")
    assert code == 3
    assert r"\x1b[31mred\x07 \u202etxt" in err
    assert not [character for character in err if not character.isprintable() and character != "\n"]
    (project / "n\x1b[2Jame").mkdir()
    tiny.make_qwen3(seed=1).save_pretrained(project / "n\x1b[2Jame")
    code, out, err = kdtrain("fit", "config.yaml", "rlhf.teacher_model=./n\x1b[2Jame")
    assert code != 0
    assert "\x1b" not in out + err
