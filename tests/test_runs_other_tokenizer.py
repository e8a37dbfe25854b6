"""Whole runs with a teacher that has another tokenizer: in this process, on a server, and evaluated."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

import kdtrain
from tests import tiny, tiny_other
from tests.stub_server import StubServer
from tests.test_cli import kdtrain as command  # noqa: F401 - a fixture


@pytest.fixture
def two(project):
    """The project, whose teacher has another tokenizer."""
    of_teacher = tiny_other.byte_level()
    tiny.save_model(tiny_other.make_teacher(of_teacher), of_teacher, project / "teacher")
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["rlhf"] |= {"cross_tokenizer": "alm", "llm_kd_weight": 50.0}
    config["training"] |= {"learning_rate": 1e-3, "optim": "sgd", "eval_strategy": "no"}
    del config["data"]["eval"]
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    return project


def fitted(project, name, **rlhf):
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["rlhf"] |= rlhf
    config["training"]["output_dir"] = str(project / name)
    (project / f"{name}.yaml").write_text(yaml.safe_dump(config))
    kdtrain.fit(str(project / f"{name}.yaml"))
    found = load_file(project / name / "model.safetensors")
    return torch.cat([found[key].flatten() for key in sorted(found)])


@pytest.mark.parametrize("lmbda", [0.0, tiny.slow(1.0)])
def test_a_served_teacher_teaches_what_the_same_model_does_in_this_process(two, lmbda):
    expected = fitted(two, "here", lmbda=lmbda, max_new_tokens=6)
    of_teacher = tiny_other.byte_level()
    with StubServer(tiny_other.make_teacher(of_teacher), tokenizer=of_teacher) as server:
        served = {"backend": "vllm", "base_url": server.url, "model": "teacher", "max_retries": 0}
        found = fitted(two, "served", lmbda=lmbda, max_new_tokens=6, teacher=served)
        scored = [request for request in server.asked("/v1/completions") if "prompt_logprobs" in request.body]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert {request.body["prompt_logprobs"] for request in scored} == {1, 5}  # in a run, and by the probe
    records = [json.loads(line) for line in (two / "served" / "logging.jsonl").read_text().splitlines()]
    shares = [record["aligned_share"] for record in records if "loss" in record]
    assert shares == [1.0] * 4 if lmbda == 0 else all(0 <= share <= 1 for share in shares)


def test_without_it_another_tokenizer_is_an_error_that_names_it(two, command):  # noqa: F811
    code, _, err = command("fit", str(two / "config.yaml"), "rlhf.cross_tokenizer=null")
    assert code == 3
    assert "set rlhf.cross_tokenizer: alm" in err


def test_a_teacher_that_reads_other_answers_ends_the_run_before_it_begins(two, command):  # noqa: F811
    other = tiny_other.byte_level()
    other.chat_template = tiny_other.TEMPLATE.replace("m.content", "m.content[:1] + 'Nothing of it' + m.content[1:1]")
    other.save_pretrained(two / "teacher")
    code, _, err = command("fit", str(two / "config.yaml"))
    assert code in (2, 3)
    assert "row 0:" in err
    assert not (two / "run" / "model.safetensors").exists()


def test_both_are_measured_in_their_own_tokens(two, command):  # noqa: F811
    assert command("fit", str(two / "config.yaml"))[0] == 0
    assert command("evaluate", str(two / "run"), f"data.eval={two / 'eval.jsonl'}")[0] == 0
    models = json.loads((two / "run" / "evaluation.json").read_text())["models"]
    assert models["teacher"]["nats_per_byte"] > 0
    assert models["after"]["nats_per_byte"] > 0
    assert models["after"]["forward_kl"] is None
    assert models["after"]["agreement"] is None
