"""The student's answers by a real vLLM, as far as that goes on a CPU. Run by `make test-server`; left out elsewhere.

A server is given weights by NCCL, which needs a GPU (the last test). Here it has the student's weights from the start.
vLLM in the trainer's process is given them by a plain copy, which works with one change of vLLM (`vllm_child.py`).
"""

import json
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from kdtrain.config.options import DistillationOptions
from kdtrain.errors import PreflightError
from kdtrain.generation.sampling import generation_config
from kdtrain.preflight import generation
from tests import tiny, vllm_server
from tests.vllm_child import NEW, PROMPTS

pytestmark = [pytest.mark.server, pytest.mark.slow]
DRAWS = 2000
WITH_WEIGHTS = ["--weight-transfer-config", '{"backend": "nccl"}', "--logprobs-mode", "processed_logprobs"]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    model = tiny.make_qwen3(seed=2, hidden=64, head_dim=32, tie_word_embeddings=False)
    return tiny.save_model(model, tokenizer, tmp_path_factory.mktemp("student") / "model")


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "server.log"
    with vllm_server.running(folder, log, more=WITH_WEIGHTS, VLLM_SERVER_DEV_MODE="1") as url:
        yield url


def child(*arguments):
    """What a case of `vllm_child.py` found, in the environment with vLLM."""
    packages = sysconfig.get_paths()["purelib"]
    script = Path(__file__).parent / "vllm_child.py"
    command = [vllm_server.python(), script, packages, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # pytest has a timeout
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def served(folder, url):
    return child("served", folder, url)


@pytest.mark.parametrize("what", ["greedy", "shorter", "forbidden"])
def test_a_server_writes_greedily_what_transformers_writes(served, what):
    found, expected = served[what]
    assert found == expected
    assert any(len(answer) == (3 if what == "shorter" else NEW) for answer in found)


@pytest.mark.parametrize(("what", "k"), [("drawn", 320), ("drawn of five", 5)])
def test_what_a_server_draws_has_the_students_probabilities(folder, served, what, k):
    model = load(folder)
    for number, prompt in enumerate(PROMPTS[:2]):
        drawn = served[what][number * DRAWS : (number + 1) * DRAWS]
        with torch.no_grad():
            logits_V = model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / 0.7
        logits_V[logits_V < logits_V.topk(k).values.min()] = -torch.inf
        assert chi_squared(drawn, logits_V.softmax(-1)) > 1e-6
        if k == 320:  # it can fail: those at temperature 1 are others
            assert chi_squared(drawn, (logits_V * 0.7).softmax(-1)) < 1e-6


def chi_squared(drawn, probabilities_V):
    """The probability of frequencies as far from these probabilities; rare tokens count as one."""
    expected_V = probabilities_V * len(drawn)
    found_V = torch.bincount(torch.tensor(drawn), minlength=len(expected_V)).double()
    often_V = expected_V >= 5
    assert not found_V[expected_V == 0].any()
    expected = torch.cat([expected_V[often_V], expected_V[~often_V].sum()[None]])
    found = torch.cat([found_V[often_V], found_V[~often_V].sum()[None]])
    kept = expected > 0
    distance = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    return float(torch.special.gammaincc((kept.sum() - 1) / 2.0, distance / 2))


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_other_weights_than_the_servers_are_found(served):
    assert "PreflightError: The vLLM server does not write as the student does" in served["other weights"]


def test_an_answer_that_the_servers_context_cuts_off_is_refused(served):
    """It says nothing of it: the answer is as long as the context lets it be."""
    assert served["beyond the context"].startswith("TeacherError: vLLM ended an answer after 252 of 256 tokens")


def test_without_a_gpu_trl_cannot_give_the_server_weights(served):
    assert "NCCL weight-transfer engine, which needs a CUDA device, got 'cpu'" in served["connecting"]


def test_a_server_is_asked_before_weights_are_loaded(folder, url, monkeypatch, caplog):
    monkeypatch.setattr(generation, "why_no_vllm", lambda: None)
    options = DistillationOptions(generation={"backend": "vllm_server", "base_url": url, "timeout_s": 5.0})
    config = tiny.make_qwen3().config
    config._name_or_path = folder
    generation.check_generation(options, config, torch.device("cuda"))
    assert not caplog.records
    for columns in (319, 321):
        config.vocab_size = columns
        with pytest.raises(PreflightError, match=f"whose logits have {columns} columns"):
            generation.check_generation(options, config, torch.device("cuda"))


def test_an_engine_in_this_process_writes_with_the_adapter_as_it_is_in_each_window(folder):
    found = child("colocated", folder)
    for answers, expected in found["steps"]:
        assert answers == expected
    assert len({json.dumps(expected) for _, expected in found["steps"]}) == 3
    assert found["same_base"]  # nothing was merged into the student, and taken out again
    assert found["same_environment"]
    stale, expected = found["stale"]
    assert stale != expected
    assert found["refused"].startswith("PreflightError: The vLLM engine does not write as the student does")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="weights go to a server by NCCL")
def test_a_server_is_given_the_students_weights_in_each_window(folder, tmp_path):
    """Needs two GPUs: NCCL takes no device twice."""
    if torch.cuda.device_count() < 2:
        pytest.skip("the server and the trainer need a GPU each")
    from accelerate import Accelerator

    from kdtrain.config.options import GenerationOptions
    from kdtrain.generation.vllm import VllmSampler

    last = str(torch.cuda.device_count() - 1)
    more = {"VLLM_SERVER_DEV_MODE": "1", "CUDA_VISIBLE_DEVICES": last}
    with vllm_server.running(folder, tmp_path / "server.log", more=WITH_WEIGHTS, **more) as url:
        model, accelerator = load(folder).cuda(), Accelerator()
        options = GenerationOptions(backend="vllm_server", base_url=url)
        sampler = VllmSampler(options, lambda: model, accelerator, None, rows=8)
        config = generation_config([2], 3, None, NEW)
        for step in range(3):
            torch.manual_seed(step)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            written = sampler.write(PROMPTS, config, [0] * len(PROMPTS), [()] * len(PROMPTS))
            for prompt, answer in zip(PROMPTS, written, strict=True):
                ids = torch.tensor([prompt], device="cuda")
                assert answer == model.generate(input_ids=ids, generation_config=config)[0, len(prompt) :].tolist()
