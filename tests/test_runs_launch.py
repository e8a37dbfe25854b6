"""Real launches: two processes really are two, and a signal to one of them stops both."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kdtrain.config import ConfigLoader
from kdtrain.runs import launch
from kdtrain.runs.checkpoints import missing_files
from tests import tiny

KDTRAIN = [sys.executable, "-m", "kdtrain"]


def run(project, *arguments, command=KDTRAIN, timeout=120):
    launcher = ("ACCELERATE_", "RANK", "WORLD_SIZE")
    env = {key: value for key, value in os.environ.items() if not key.startswith(launcher)}
    return subprocess.run(
        [*command, *arguments], cwd=project, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )


def records(project, name="run"):
    return [json.loads(line) for line in (project / name / "logging.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(tmp_path_factory, tokenizer):
    """The records of the run in one process, with the global batch of the two-process runs."""
    project = tiny.make_project(tmp_path_factory.mktemp("single"), tokenizer)
    done = run(project, "fit", "config.yaml", "training.output_dir=single", "training.per_device_train_batch_size=8")
    assert done.returncode == 0, done.stderr
    return records(project, "single")


def assert_same_run(ours, single, sharded=False):
    assert len(ours) == len(single) == 5
    for a, b in zip(ours, single, strict=True):
        # How hard a term pulls is not measured on weights in pieces.
        for key in b.keys() - ({key for key in b if "grad_norm_" in key} if sharded else set()):
            if key not in (*tiny.MEASURED, "padding_fraction", "eval_runtime") and "per_second" not in key:
                assert a[key] == pytest.approx(b[key], rel=1e-4), key


ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TWO = [
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["by itself", "accelerate launch", "accelerate launch without fit", "torchrun"])
def test_two_processes_on_a_cpu_are_two_and_equal_one(project, single, how):
    arguments = ["config.yaml"]
    if how == "by itself":
        done = run(project, "fit", *arguments, "launch.num_processes=2")
        assert "accelerate launch --num_processes 2" in done.stderr
        assert "-m kdtrain fit config.yaml launch.num_processes=2" in done.stderr
    elif how == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
        done = run(project, "-m", "kdtrain", "fit", *arguments, command=[*torchrun, str(tiny.free_port())])
    else:
        fit = [] if "without" in how else ["fit"]
        port = ["--main_process_port", str(tiny.free_port())]
        done = run(project, "-m", "kdtrain", *fit, *arguments, command=[*ACCELERATE, *TWO, *port])
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stderr
    assert done.stdout.count("4 steps; best eval_loss") == 1
    assert_same_run(records(project), single)
    assert json.loads((project / "run" / "status.json").read_text())["exit_code"] == 0


@pytest.mark.slow
def test_no_launch_stays_in_one_process(project):
    done = run(project, "fit", "config.yaml", "launch.num_processes=2", "--no-launch", "training.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "1 process," in done.stderr


@pytest.mark.slow
def test_a_worker_that_fails_gives_the_launcher_its_exit_code(project):
    (project / "train.jsonl").write_text(json.dumps(tiny.CHATS[0]) + "\n{}\n")  # the first row is looked at before
    done = run(project, "fit", "config.yaml", "launch.num_processes=2")
    assert done.returncode == 3, done.stderr
    assert "train.jsonl:2" in done.stderr


@pytest.mark.slow
def test_a_world_other_than_the_configs_is_refused(project):
    port = ["--main_process_port", str(tiny.free_port())]
    done = run(
        project, "-m", "kdtrain", "fit", "config.yaml", "launch.num_processes=3", command=[*ACCELERATE, *TWO, *port]
    )
    assert done.returncode != 0
    assert "launch.num_processes is 3, but the launcher started 2" in done.stderr


@pytest.fixture
def start(project):
    """Begin a run, and wait until it has taken a step. Whatever a test leaves of it is ended."""
    begun = []
    yield lambda *arguments, **more: begun.append(_start(project, *arguments, **more)) or begun[-1]
    for process in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _start(project, *arguments, command=KDTRAIN):
    process = subprocess.Popen(
        [*command, "fit", "config.yaml", *arguments],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = project / "run" / "logging.jsonl"
    deadline = time.monotonic() + 150
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no step in 150 s"
        time.sleep(0.02)
    return process


LONG = ["training.max_steps=100000", "training.eval_steps=100000"]


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on_from_there(project, start, signum, code):
    process = start(*LONG)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "the state is saved" in stderr
    assert "Traceback" not in stderr
    status = json.loads((project / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", code)
    (checkpoint,) = (project / "run").glob("checkpoint-*")
    assert not (project / "run" / "model.safetensors").exists(), "a half-trained model was exported as the final one"
    step = int(checkpoint.name.split("-")[1])
    again = run(project, "fit", "config.yaml", "--resume", "auto", f"training.max_steps={step + 3}")
    assert again.returncode == 0, again.stderr
    assert [record["step"] for record in records(project) if "loss" in record] == list(range(1, step + 4))


@pytest.mark.slow
def test_ctrl_c_stops_both_of_two_launched_ranks(project, start):
    process = start(*LONG, "launch.num_processes=2")
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 130, stderr
    assert len(list((project / "run").glob("checkpoint-*"))) == 1


def children(pid):
    """Worker processes below the launcher, by rank."""
    found, waiting = {}, [pid]
    while waiting:
        for path in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            for child in map(int, path.read_text().split()):
                waiting.append(child)
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                found |= {int(item[5:]): child for item in environment if item.startswith(b"RANK=")}
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers through /proc")
def test_sigterm_to_one_rank_stops_both_at_the_same_step(project, start):
    process = start(*LONG, "launch.num_processes=2")
    os.kill(children(process.pid)[1], signal.SIGTERM)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 143, stderr
    assert json.loads((project / "run" / "status.json").read_text())["state"] == "stopped"
    assert len(list((project / "run").glob("checkpoint-*"))) == 1


def gone(pids, within):
    deadline = time.monotonic() + within
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, "a process outlived its launcher"
        time.sleep(0.1)


@pytest.mark.slow
def test_ranks_end_with_their_launcher_and_leave_a_checkpoint(project, start):
    process = start(*LONG, "launch.num_processes=2")
    workers = children(process.pid).values()
    process.kill()
    gone(workers, within=30)
    process.communicate(timeout=30)
    assert not (project / "run" / "run.lock").exists()
    assert json.loads((project / "run" / "status.json").read_text())["state"] == "stopped"
    (checkpoint,) = (project / "run").glob("checkpoint-*")
    assert not missing_files(checkpoint)


def test_a_rank_that_is_killed_ends_the_run_and_that_is_said(project, start):
    process = start(*LONG, "launch.num_processes=2")
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=90)
    assert process.returncode == 137, stderr
    assert "rank 1" in stderr
    assert "was ended by SIGKILL" in stderr
    assert "this is a bug" not in stderr
    assert "Traceback" not in stderr
    status = json.loads((project / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 137)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["kdtrain", "accelerate launch", "torchrun"])
def test_sigterm_to_the_launcher_saves_and_says_so(project, start, launcher):
    """What a cluster's scheduler does. Only `kdtrain fit` tells the exit code: the others have one for any failure."""
    command, more = KDTRAIN, ["launch.num_processes=2"]
    if launcher == "accelerate launch":
        command, more = [*ACCELERATE, *TWO, "--main_process_port", str(tiny.free_port()), "-m", "kdtrain"], []
    elif launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
        command, more = [*torchrun, str(tiny.free_port()), "-m", "kdtrain"], []
    process = start(*LONG, *more, command=command)
    workers = children(process.pid)
    process.terminate()
    _, stderr = process.communicate(timeout=90)
    assert process.returncode in ([143] if launcher == "kdtrain" else [1, 143]), stderr
    assert "the state is saved" in stderr
    status = json.loads((project / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    (checkpoint,) = (project / "run").glob("checkpoint-*")
    assert not missing_files(checkpoint)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values()), "a worker outlived its launcher"


@pytest.mark.slow
def test_a_config_file_of_accelerate_says_how_many_processes_there_are(project):
    (project / "accelerate.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 1\n"
        f"num_processes: 2\nmixed_precision: 'no'\nmain_process_port: {tiny.free_port()}\n"
    )
    done = run(project, "fit", "config.yaml", "launch.config_file=accelerate.yaml", "training.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "x 2 processes" in done.stderr


BY_NAME = [
    "ddp",
    pytest.param("zero2", marks=pytest.mark.deepspeed),
    pytest.param("zero3", marks=pytest.mark.deepspeed),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_NAME)
def test_a_way_of_launching_by_name_equals_one_process(project, single, name):
    if name != "ddp":
        pytest.importorskip("deepspeed")
    done = run(project, "fit", "config.yaml", f"launch.config_file={name}", "--num-processes", "2", timeout=280)
    assert done.returncode == 0, done.stderr
    assert f"accelerate/{name}.yaml --num_processes 2" in done.stderr
    assert ("deepspeed" if name != "ddp" else "multi_cpu") in done.stderr
    assert_same_run(records(project), single, sharded=name != "ddp")
    assert (project / "run" / "model.safetensors").stat().st_size > 100_000, "pieces were saved and no model"


@pytest.mark.slow
def test_fsdp_by_name_is_refused_on_a_cpu_and_no_folder_is_made(project):
    done = run(project, "fit", "config.yaml", "launch.config_file=fsdp2", "--num-processes", "2")
    assert done.returncode == 3, done.stderr
    assert "FSDP needs GPUs" in done.stderr
    assert not (project / "run" / "logging.jsonl").exists()


@pytest.mark.slow
def test_two_machines_meet_and_equal_one_process(project, single):
    """Two launches on this host, each told another rank."""
    port = tiny.free_port()
    command = [*KDTRAIN, "fit", "config.yaml", f"launch.main_process_port={port}", "--num-processes", "2"]
    command += ["--num-machines", "2", "--main-process-ip", "127.0.0.1", "--machine-rank"]
    machines = [
        subprocess.Popen([*command, str(rank)], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in (1, 0)
    ]
    try:
        said = [machine.communicate(timeout=200) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert "x 2 processes" in said[1][1]
    assert "4 steps; best eval_loss" not in said[0][0], "the other machine says it"
    assert_same_run(records(project), single)


@pytest.mark.slow
def test_one_process_that_a_launcher_made_of_two_is_refused(project):
    cpu = [*ACCELERATE, "--cpu", "--num_processes", "2", "-m", "kdtrain"]
    done = run(project, "fit", "config.yaml", command=cpu)
    assert done.returncode != 0
    assert "has started this one alone" in done.stderr


def test_the_command_for_a_cpu_asks_for_what_works_there(project):
    config = ConfigLoader.load(project / "config.yaml")
    command = launch.launch_command(config, 2, ["fit", "config.yaml"], on_cpu=True)
    assert "--multi_gpu" in command
    assert "--cpu" not in command
    assert command[-4:] == ["-m", "kdtrain", "fit", "config.yaml"]
    assert launch.wanted_processes(config, 0) == 1
    assert launch.wanted_processes(config, 4) == 4


@pytest.mark.slow
def test_a_run_shorter_than_its_logging_interval_logs_its_last_step(project):
    options = ["training.logging_steps=50", "training.max_steps=3", "training.eval_strategy=no", "data.eval=null"]
    done = run(project, "fit", "config.yaml", *options)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in records(project)] == [3]
