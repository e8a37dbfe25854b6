"""`kdtrain fit --sweep`: runs in one process have the numbers that they have alone, and one does not end the others."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from kdtrain.cli import app as cli
from kdtrain.cli.shared import refuse_several_processes
from kdtrain.config import ConfigLoader
from kdtrain.errors import ConfigError
from kdtrain.runs import read_data, sweep
from kdtrain.runs.isolation import isolated
from kdtrain.runs.lock import run_lock
from tests.tiny import make_project

OF_TIME = ("per_second", "runtime", "peak_memory_gib", "elapsed_s", "remaining_s", "step_time_s")
ONE_STEP = ["training.max_steps=1", "training.eval_strategy=no"]


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_project(tmp_path, tokenizer)


@pytest.fixture
def fit(folder, monkeypatch, capsys):
    def run(*arguments, code=0):
        monkeypatch.setattr(sys, "argv", ["kdtrain", "fit", "config.yaml", *arguments, "--sweep"])
        with pytest.raises(SystemExit) as done:
            cli.main()
        printed = capsys.readouterr()
        assert done.value.code == code, printed.err
        return printed

    yield run
    logger = logging.getLogger("kdtrain")
    logger.handlers, logger.propagate = [], True


def found(folder, name="run"):
    return json.loads((folder / name / "sweep.json").read_text())


def records(run_dir):
    lines = (run_dir / "logging.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(OF_TIME)} for line in lines]


ALONE = """
import sys
from pathlib import Path
import kdtrain
from kdtrain.runs.evaluate import evaluate
from kdtrain.runs.trained import open_run
from kdtrain.cli.evaluation import Progress
from rich.console import Console
kdtrain.fit("config.yaml", sys.argv[1:], quiet=True)
evaluate([open_run(Path("alone"))], [], Progress(Console(stderr=True), True))
"""


@pytest.mark.slow
def test_a_run_of_a_sweep_has_bit_for_bit_the_numbers_that_it_has_alone(fit, folder):
    """The second run: behind one with another accumulation, a drawn adapter, dropout and generated answers."""
    options = [
        "training.gradient_accumulation_steps=1",
        "tuner={train_type: lora, lora_dropout: 0.1, modules_to_save: null}",
        "rlhf.disable_dropout=false",
        "rlhf.lmbda=0.5",
        "rlhf.max_new_tokens=6",
        "training.seed=5",
        "training.train_sampling_strategy=random",
        "training.learning_rate=1e-2",
        "training.max_steps=4",
    ]
    fit("training.gradient_accumulation_steps=2,1", *options[1:])
    command = [sys.executable, "-c", ALONE, *options, "training.output_dir=alone"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    of_sweep, alone = folder / "run" / "gradient_accumulation_steps-1", folder / "alone"
    assert {record["on_policy_fraction"] for record in records(alone) if "loss" in record} == {0.0, 1.0}
    assert records(of_sweep) == records(alone)
    first, second = (load_file(path / "adapter_model.safetensors") for path in (of_sweep, alone))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    figures = [json.loads((path / "evaluation.json").read_text())["models"] for path in (of_sweep, alone)]
    assert figures[0] == figures[1]


@pytest.mark.slow
def test_a_sweep_reads_its_data_once_and_keeps_no_model(fit, folder, monkeypatch):
    reads = []
    real = read_data.build_dataset
    monkeypatch.setattr(read_data, "build_dataset", lambda *a, **k: reads.append(a) or real(*a, **k))
    before = sum(isinstance(one, torch.nn.Embedding) for one in gc.get_objects())
    environment = dict(os.environ)
    printed = fit("training.seed=1,2", *ONE_STEP)
    assert len(reads) == 2  # train and eval, for both runs and both evaluations
    assert printed.err.count("supervised") <= 4
    assert sum(isinstance(one, torch.nn.Embedding) for one in gc.get_objects()) <= before
    assert {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} == {
        **{k: v for k, v in environment.items() if k != "PYTEST_CURRENT_TEST"},
        **{k: os.environ[k] for k in ("TRL_EXPERIMENTAL_SILENCE", "TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY")},
    }
    assert "rank" not in printed.out
    ranked = found(folder)
    assert [run["state"] for run in ranked["runs"]] == ["finished", "finished"]
    assert ranked["runs"][0]["figures"]["ce"] <= ranked["runs"][1]["figures"]["ce"]


def test_what_a_run_sets_for_the_process_is_put_back(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    tracker = SimpleNamespace(run="open", finish=lambda: setattr(tracker, "run", None))
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    AcceleratorState._reset_state(reset_partial_state=True)  # of the tests before
    for precision in ("bf16", "no"):  # accelerate refuses a second one of another precision in a process
        with isolated():
            assert Accelerator(cpu=True, mixed_precision=precision).mixed_precision == precision
            torch.use_deterministic_algorithms(True)
            os.environ |= {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_OF_THIS_RUN": "1"}
        assert not torch.are_deterministic_algorithms_enabled()
        assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
        assert "ACCELERATE_OF_THIS_RUN" not in os.environ
        assert tracker.run is None


@pytest.mark.slow
def test_a_run_that_fails_does_not_end_the_others_and_resume_makes_what_is_missing(fit, folder, monkeypatch):
    values = "training.learning_rate=1e38,1e-3"
    printed = fit(values, *ONE_STEP, code=5)
    assert "1 of 2 runs failed. The first, learning_rate-1e38:" in printed.err
    assert {run["name"]: run["state"] for run in found(folder)["runs"]} == {
        "learning_rate-1e38": "failed",
        "learning_rate-1e-3": "finished",
    }
    assert "best run:" in printed.out
    made = []
    real = sweep.fit
    monkeypatch.setattr(sweep, "fit", lambda a, *r, **k: made.append(a.training_args.learning_rate) or real(a, *r, **k))
    of_checkpoint = folder / "run" / "learning_rate-1e-3" / "evaluation.json"
    of_checkpoint.write_text(json.dumps({**json.loads(of_checkpoint.read_text()), "checkpoint": "checkpoint-1"}))
    fit(values, *ONE_STEP, "--resume", "auto", code=5)
    assert made == [1e38]
    assert json.loads(of_checkpoint.read_text())["checkpoint"] is None  # the sweep ranks the student at the end
    err = fit(values, *ONE_STEP, "rlhf.beta=0.3", "--resume", "auto", code=6).err
    assert "has finished with other options (rlhf.beta: 0.5 -> 0.3)" in err
    err = fit(values, *ONE_STEP, code=3).err
    assert "holds a" in err
    assert "--resume auto" in err


@pytest.mark.slow
def test_runs_that_have_begun_go_on_as_they_began_or_as_it_is_allowed(fit, folder, monkeypatch):
    saving = ["training.eval_strategy=no", "training.save_strategy=steps", "training.report=false"]
    monkeypatch.setattr(sweep, "evaluate", lambda *_: 1 / 0)
    fit("training.seed=1,2", *saving, "training.max_steps=1", code=1)
    for name in ("seed-1", "seed-2"):
        status = folder / "run" / name / "status.json"
        status.write_text(json.dumps({**json.loads(status.read_text()), "state": "stopped"}))
    again = ["training.seed=1,2", *saving, "training.max_steps=2", "rlhf.beta=0.3", "--resume", "auto"]
    before = (folder / "run" / "sweep.json").read_text()
    printed = fit(*again, code=6)
    assert "rlhf.beta: 0.5 -> 0.3" in printed.err
    assert (folder / "run" / "sweep.json").read_text() == before
    assert "2 of 2 runs passed" in fit(*again, "--allow-changes", "rlhf.beta", "--dry-run").out


@pytest.mark.slow
def test_a_signal_ends_the_sweep_with_what_it_has(fit, folder, monkeypatch):
    real, calls = sweep.evaluate, []

    def interrupted_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(sweep, "evaluate", interrupted_at_the_second)
    values = "rlhf.beta=0,0.5"
    printed = fit(values, *ONE_STEP, code=130)
    assert "go on with the same command and --resume auto" in printed.err
    assert {run["name"]: run["state"] for run in found(folder)["runs"]} == {
        "beta-0": "finished",
        "beta-0.5": "not evaluated",
    }
    assert "--resume auto, which keeps those that have finished" in fit(values, *ONE_STEP, code=3).err
    printed = fit(values, *ONE_STEP, "--resume", "auto", "--log-format", "json")
    assert len(calls) == 3  # the second run was trained, and is evaluated now
    last = json.loads(printed.out.splitlines()[-1])
    assert last["event"] == "sweep"
    assert last["ranked_by"] == "ce"
    assert [run["state"] for run in last["runs"]] == ["finished"] * 2
    assert [effect["axis"] for effect in last["effects"]] == ["rlhf.beta"]


def test_a_dry_run_of_a_sweep_takes_no_step_and_writes_nothing(fit, folder):
    printed = fit("rlhf.beta=0,1", "--dry-run")
    assert "2 of 2 runs passed" in printed.out
    assert not (folder / "run").exists()


def test_a_folder_that_is_no_sweeps_is_left_alone(fit, folder):
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("mine")
    err = fit("rlhf.beta=0,1", code=3).err
    assert "is not empty, and holds no sweep of kdtrain. Name another folder" in err
    assert os.listdir(folder / "run") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rlhf.beta=0,1", "launch.num_processes=2"], "one after the other in one process, and here there would be 2"),
        (["rlhf.beta=0,1", "launch.config_file=ddp.yaml"], "launch.config_file starts others"),
        (["rlhf.beta=0,1", "--resume", "run/checkpoint-4"], "With --sweep it is --resume auto"),
        (["rlhf.beta=0.1"], "--sweep needs an option with several values"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused_before_torch_is_imported(fit, folder, monkeypatch, arguments, message):
    (folder / "ddp.yaml").write_text("num_processes: 2\n")
    monkeypatch.setattr("kdtrain.cli.commands.fit.console_for", lambda *_: pytest.fail("it began"))
    assert message in " ".join(fit(*arguments, code=2).err.split())


def test_runs_that_have_no_room_together_are_refused_before_the_first(fit, folder, monkeypatch):
    model = sum(tensor.numel() for tensor in load_file(folder / "student" / "model.safetensors").values()) * 4
    monkeypatch.setattr(sweep, "free_disk", lambda folder: 3 * model)
    seeds = ("training.seed=1,2,3,4", "training.save_strategy=no", *ONE_STEP)
    assert "The 4 runs of this sweep write about 0.4 MiB together" in fit(*seeds, code=3).err
    assert not (folder / "run" / "seed-1").exists()


def test_two_sweeps_do_not_share_a_folder(fit, folder):
    with run_lock(folder / "run"):
        assert "A run is going on in" in fit("rlhf.beta=0,1", code=3).err


def test_several_values_without_sweep_name_it(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kdtrain", "fit", "config.yaml", "rlhf.beta=0,1", "training.seed=x"])
    with pytest.raises(SystemExit):
        cli.main()
    err = capsys.readouterr().err
    assert "are for --sweep: a run for each" in err.split("training.seed")[0]
    assert err.count("--sweep") == 1


def test_several_ranks_of_a_launcher_are_refused(folder, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="here there would be 2"):
        refuse_several_processes(ConfigLoader.load("config.yaml"), no_launch=True)


@pytest.mark.slow
def test_answers_that_the_teacher_writes_are_written_once_for_all_runs(fit, folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["train"] = [{"path": "train.jsonl", "answers": "teacher"}]
    config["rlhf"]["max_new_tokens"] = 4
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    fit("rlhf.beta=0,1", *ONE_STEP)
    (answers,) = (folder / "run").glob("**/teacher_answers/*/rank0.jsonl")
    assert answers.parent.parent.parent == folder / "run"
    assert [run["state"] for run in found(folder)["runs"]] == ["finished"] * 2
