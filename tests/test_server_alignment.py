"""Against a real vLLM server whose model has another tokenizer: chunks are compared as with the model in process.

Run by `make test-server`; left out elsewhere.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdtrain.data import Collator
from kdtrain.data.other_tokenizer import OtherTokenizer
from tests import tiny, tiny_other, vllm_server
from tests.test_trainer_other_tokenizer import expected_alm

pytestmark = pytest.mark.server
WEIGHT = 50.0
ANSWERS = ["the path é", "a token and the student", "zero, 日本 🤝", "the file it returns", "two", "1 and 30", "x y z"]
ROWS = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": answer}]}
    for i, answer in enumerate(ANSWERS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The teacher; vLLM has kernels for its heads of 32."""
    of_teacher = tiny_other.byte_level()
    model = tiny_other.make_teacher(of_teacher, hidden=64, head_dim=32)
    return tiny.save_model(model, of_teacher, tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    with vllm_server.running(folder, tmp_path_factory.mktemp("server") / "server.log") as url:
        yield url


@pytest.fixture
def fitted(project, folder):
    """Runs `python -m kdtrain fit` on a file of its own; what was logged, and the student's weights after it."""
    (project / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def fitted(name, **rlhf):
        config = {
            "model": {"model": "./student"},
            "data": {"train": "train.jsonl", "max_length": 64},
            "rlhf": {
                "cross_tokenizer": "alm", "teacher_model": folder, "llm_kd_weight": WEIGHT, "sft_alpha": 0.3,
                "lmbda": 0.0, "max_new_tokens": 6, **rlhf,
            },
            "training": {
                "output_dir": name, "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": len(ROWS),
                "learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd", "save_strategy": "no",
                "train_sampling_strategy": "sequential", "gradient_checkpointing": False, "report": False,
            },
        }  # fmt: skip
        path = project / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "kdtrain", "fit", str(path), "--log-format", "json"]
        done = subprocess.run(command, cwd=project, env=dict(os.environ), capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = (project / name / "logging.jsonl").read_text().splitlines()
        records = [record for record in map(json.loads, lines) if "loss" in record]
        weights = load_file(project / name / "model.safetensors")
        return records, torch.cat([weights[key].flatten() for key in sorted(weights)])

    return fitted


def loss_of_both(student, teacher):
    """ALM of all rows in float64, by a loop over the chunks of two models that are read from the disk."""
    models = [AutoModelForCausalLM.from_pretrained(one, dtype=torch.float64) for one in (student, teacher)]
    own = tiny.make_tokenizer()
    return (
        WEIGHT
        * expected_alm(*models, Collator(own, other_tokenizer=OtherTokenizer(own, tiny_other.byte_level()))(ROWS))[0]
    )


@pytest.mark.parametrize("backend", ["vllm", "openai"])
def test_kdtrain_fit_learns_from_a_server_with_another_tokenizer_what_it_does_from_the_model(
    fitted, project, folder, url, capsys, backend
):
    expected, wanted = fitted("here")
    served = {"backend": backend, "base_url": url, "model": "teacher", "timeout_s": 120, "max_retries": 0}
    found, weights = fitted("served", teacher=served)
    apart = max(abs(a["llm_kd_loss"] - b["llm_kd_loss"]) for a, b in zip(found, expected, strict=True))
    start = load_file(project / "student" / "model.safetensors")
    moved = (wanted - torch.cat([start[key].flatten() for key in sorted(start)])).abs().max().item()
    difference = (weights - wanted).abs().max().item()
    with capsys.disabled():
        print(f"\n    {backend}: losses apart by {apart:.1e}, weights by {difference:.1e} after steps of {moved:.1e}")
    assert found[0]["llm_kd_loss"] == pytest.approx(loss_of_both(project / "student", folder), rel=1e-3)
    for one, other in zip(found, expected, strict=True):
        assert one["llm_kd_loss"] == pytest.approx(other["llm_kd_loss"], rel=1e-3)
        assert one["aligned_share"] == other["aligned_share"] == 1.0
    assert difference <= 1e-3 * moved


def test_the_server_reads_the_text_of_what_the_student_writes(fitted, url):
    expected, wanted = fitted("here", lmbda=1.0)
    served = {"backend": "vllm", "base_url": url, "model": "teacher", "timeout_s": 120, "max_retries": 0}
    found, weights = fitted("served", lmbda=1.0, teacher=served)
    assert all(record["on_policy_fraction"] == 1 for record in found)
    assert [r["llm_kd_loss"] for r in found] == pytest.approx([r["llm_kd_loss"] for r in expected], rel=1e-3)
    torch.testing.assert_close(weights, wanted, rtol=0, atol=1e-5)
