"""Ways of launching: accelerate's own parsers read every file that comes along, and what cannot work is refused."""

import importlib.util
import os
import shlex
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from kdtrain.cli import meeting
from kdtrain.cli.shared import launch_options
from kdtrain.config import ConfigLoader, check_config
from kdtrain.config.launching import BUILT_IN, accelerate_file, launch_problems, launching
from kdtrain.errors import PreflightError
from kdtrain.preflight.sharding import sharding_of
from kdtrain.runs import launch

EXAMPLES = Path(__file__).parent.parent / "examples" / "accelerate"
FILES = [*map(accelerate_file, BUILT_IN), *sorted(EXAMPLES.glob("*.yaml"))]
BASE = {"model": {"model": "org/s"}, "data": {"train": "org/d"}, "rlhf": {"teacher_model": "org/t"}}


def config(training=None, **options):
    return ConfigLoader.load(BASE | {"training": {"output_dir": "runs/x", **(training or {})}, "launch": options})


def as_accelerate_reads(file, *arguments):
    """The arguments that its launcher goes on with."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    parser = launch_command_parser()
    parsed = parser.parse_args(["--config_file", str(file), *arguments, "-m", "kdtrain", "fit", "config.yaml"])
    return _validate_launch_command(parsed)[0], parser


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.parent.name}/{file.name}")
def test_accelerate_knows_every_key_of_every_file(file):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(file))  # refuses an unknown key, but none of the maps below
    parsed, parser = as_accelerate_reads(file)
    names = {action.dest for action in parser._actions}
    below = {**loaded.fsdp_config, **loaded.deepspeed_config}
    assert below.keys() <= names
    assert {name: getattr(parsed, name) for name in below} == below
    assert parsed.num_processes % parsed.num_machines == 0
    assert (parsed.multi_gpu, parsed.use_fsdp, parsed.use_deepspeed) == {
        "MULTI_GPU": (True, False, False), "FSDP": (False, True, False), "DEEPSPEED": (False, False, True),
    }[loaded.distributed_type.value]  # fmt: skip
    assert parsed.mixed_precision == "no", "training.bf16 and training.fp16 decide"


@pytest.fixture
def environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_fsdp2_saves_a_model_and_wraps_layers(environment):
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env
    from torch.distributed.fsdp import StateDictType
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    os.environ |= prepare_multi_gpu_env(
        as_accelerate_reads(accelerate_file("fsdp2"), "--main_process_port", "0", "--num_processes", "2")[0]
    )
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None, "then the model's own _no_split_modules"
    assert not plugin.cpu_ram_efficient_loading
    assert not plugin.activation_checkpointing


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_deepspeed_gets_its_stage_and_saves_a_model(name, stage, environment):
    pytest.importorskip("deepspeed")
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    parsed = as_accelerate_reads(accelerate_file(name), "--main_process_port", "0", "--num_processes", "2")[0]
    parsed.deepspeed_fields_from_accelerate_config = ""
    os.environ |= prepare_deepspeed_cmd_env(parsed)[1]
    found = DeepSpeedPlugin().deepspeed_config
    assert found["zero_optimization"]["stage"] == stage
    assert found["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    assert found["gradient_clipping"] == found["train_batch_size"] == "auto", "training decides"


def test_the_examples_are_the_files_that_come_with_the_package():
    for name in BUILT_IN:
        assert (EXAMPLES / f"{name}.yaml").read_bytes() == accelerate_file(name).read_bytes()
    packaged = (EXAMPLES.parent.parent / "pyproject.toml").read_text()
    assert '"kdtrain.config" = ["accelerate/*.yaml"]' in packaged


def test_a_name_is_built_in_and_a_path_is_a_file(tmp_path):
    assert launching(config(config_file="fsdp2")).kind == "FSDP"
    (tmp_path / "fsdp2").write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump(BASE | {"training": {"output_dir": "x"}, "launch": {"config_file": "./fsdp2"}})
    )
    found = launching(ConfigLoader.load(tmp_path / "run.yaml"))
    assert (found.kind, found.processes, found.is_built_in) == ("MULTI_GPU", 3, False)
    kinds = [sharding_of(config(config_file=name)).kind for name in BUILT_IN]
    assert kinds == ["ddp", "fsdp", "zero2", "zero3"]


MACHINES = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1"}
COMMANDS = {
    "two processes": ({"num_processes": 2}, 0, "--num_processes 2 --num_machines 1 --dynamo_backend no "
                      "--mixed_precision no --multi_gpu --main_process_port 0 --num_cpu_threads_per_process 1"),
    "by name": ({"config_file": "zero3"}, 4, "--config_file FILE --num_processes 4 --num_machines 1 "
                "--main_process_port 0"),
    "two machines": (MACHINES, 8, "--num_processes 16 --num_machines 2 --dynamo_backend no --mixed_precision no "
                     "--multi_gpu --machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29500"),
    "two machines by name": (MACHINES | {"config_file": "fsdp2", "num_processes": 4, "main_process_port": 7}, 8,
                             "--config_file FILE --num_processes 4 --num_machines 2 --machine_rank 1 "
                             "--main_process_ip 10.0.0.1 --main_process_port 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_that_is_printed_and_run(name, monkeypatch):
    options, devices, expected = COMMANDS[name]
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    asked = config(**options)
    command = launch.launch_command(asked, launch.wanted_processes(asked, devices), ["fit"], on_cpu=devices == 0)
    if asked.launch.config_file:
        expected = expected.replace("FILE", shlex.quote(str(accelerate_file(asked.launch.config_file))))
    assert launch.shown(command) == f"accelerate launch {expected} -m kdtrain fit"
    from accelerate.commands.launch import launch_command_parser

    launch_command_parser().parse_args(command[4:])  # accelerate takes it


PROBLEMS = [
    ({"num_processes": 3, **MACHINES}, None, "3 processes cannot be spread evenly over 2 machines"),
    ({"num_machines": 2, "machine_rank": 0}, None, "2 machines need an address"),
    ({"num_machines": 2, "main_process_ip": "h"}, None, "nothing says which of the machines this one is"),
    (MACHINES | {"machine_rank": 2}, None, "there are 2 machines, and their ranks count from 0"),
    ({"machine_rank": 0}, None, "has no effect: the run is on one machine"),
    ({}, "distributed_type: MULTI_CPU\nnum_processes: 2\n", "accelerate makes one process on each machine"),
    ({}, "distributed_type: MULTI_GPU\n", "says no num_processes"),
    ({"num_processes": 2}, "distributed_type: FSDP\nfsdp_config: {fsdp_state_dict_type: SHARDED_STATE_DICT}\n",
     "saves pieces and no model"),
    ({"num_processes": 2, "training": {"fsdp": "full_shard"}}, "distributed_type: DEEPSPEED\n",
     "training.fsdp says already how the models are cut"),
]  # fmt: skip


def deepspeed_is(monkeypatch, spec):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name == "deepspeed" else found(name))


@pytest.mark.parametrize(("options", "file", "message"), PROBLEMS, ids=[case[2] for case in PROBLEMS])
def test_what_cannot_work_is_refused_before_anything_is_loaded(options, file, message, tmp_path, monkeypatch):
    deepspeed_is(monkeypatch, object())
    options = dict(options)
    training = options.pop("training", None)
    if file is not None:
        (tmp_path / "own.yaml").write_text(file)
        options["config_file"] = str(tmp_path / "own.yaml")
    found = [problem.message for problem in launch_problems(config(training, **options))]
    assert len(found) == 1
    assert message in found[0]
    assert not list(launch_problems(config(**MACHINES, num_processes=4)))


def test_deepspeed_by_name_wants_the_package(monkeypatch):
    deepspeed_is(monkeypatch, None)
    assert "needs the package deepspeed" in next(iter(launch_problems(config(config_file="zero2")))).message


def test_the_command_line_wins_over_the_file_and_that_is_said(tmp_path, caplog):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(BASE | {"training": {"output_dir": "x"}, "launch": {"num_processes": 2}}))
    options = launch_options(file, [], {"num_processes": 4, "num_machines": None, "main_process_ip": "fd00::1"})
    assert check_config(file, options).config.launch.num_processes == 4
    assert check_config(file, options).config.launch.main_process_ip == "fd00::1"
    assert [record.getMessage() for record in caplog.records] == [
        "--num-processes 4 wins over launch.num_processes: 2."
    ]


def world(monkeypatch, got, asked=1, fsdp=None, **options):
    monkeypatch.setenv(launch.PROCESSES, str(asked))
    args = SimpleNamespace(world_size=got, device=torch.device("cpu"), fsdp=fsdp)
    launch.check_world(args, config(**options))


def test_a_world_that_is_not_the_one_asked_for_is_refused(monkeypatch):
    world(monkeypatch, 1)
    world(monkeypatch, 2, asked=2)
    with pytest.raises(PreflightError, match="asked for 2 processes, but each of them is alone"):
        world(monkeypatch, 1, asked=2)
    with pytest.raises(PreflightError, match=r"num_processes is 4, but the launcher started 2"):
        world(monkeypatch, 2, asked=4)


def test_fsdp_on_a_cpu_is_refused(monkeypatch):
    with pytest.raises(PreflightError, match="FSDP needs GPUs"):
        world(monkeypatch, 2, asked=2, fsdp=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(PreflightError, match="FSDP needs GPUs"):
        world(monkeypatch, 2, asked=2)


def test_one_process_that_accelerate_made_of_several_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    meeting.check_variables()  # left in a shell
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(PreflightError, match="has started this one alone"):
        meeting.check_variables()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    meeting.check_variables()


def test_the_slurm_script_gives_each_machine_its_rank(tmp_path):
    stubs = {
        "scontrol": 'echo node-7; echo node-8',
        "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
        "kdtrain": 'echo "$@"',
    }  # fmt: skip
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12345", "SLURM_NNODES": "2"}
    env["SLURM_JOB_NODELIST"] = "node-[7-8]"
    command = [EXAMPLES / "slurm.sh", "run.yaml", "launch.config_file=fsdp2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "fit run.yaml launch.config_file=fsdp2 --resume auto launch.main_process_port=32345 --num-machines 2 "
        f"--machine-rank {rank} --main-process-ip node-7"
        for rank in (0, 1)
    ]
