"""Against a real vLLM server: what it writes is what the model in process writes, whatever the server's own settings.

Run by `make test-server`; left out elsewhere.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml

import kdtrain
from kdtrain.teachers import ServedTeacher
from kdtrain.teachers.base import Prompt, Sampling
from kdtrain.teachers.served.http import Servers
from kdtrain.teachers.served.replies import Scored
from tests import tiny, vllm_server
from tests.test_teachers_served_writing import local

pytestmark = pytest.mark.server
V = 320
# What vLLM would apply to every request that does not say otherwise.
OF_THE_MODEL = {"do_sample": True, "temperature": 0.3, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.7}
PROMPTS = [[1, 20 + i, *range(40, 40 + i % 7)] for i in range(16)]


@pytest.fixture(scope="module")
def model():
    return tiny.make_qwen3(seed=2, hidden=64, head_dim=32).eval()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = Path(tiny.save_model(model, tokenizer, tmp_path_factory.mktemp("teacher") / "model"))
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | OF_THE_MODEL))
    return folder


@pytest.fixture(scope="module")
def url(folder):
    with vllm_server.running(str(folder), folder.parent / "server.log") as url:
        yield url


@pytest.fixture
def teacher(url):
    teacher = ServedTeacher(
        Servers([url], timeout_s=120, max_retries=0), model="teacher", vocab_size=V, top_k=64, route="prompt_logprobs"
    )
    yield teacher
    teacher.close()


def prompts(seed=0):
    return [Prompt(ids, seed + i) for i, ids in enumerate(PROMPTS)]


def sampling(**changes):
    return Sampling(**{"temperature": None, "max_new_tokens": 24, "stop_ids": [2, 0], **changes})


def test_greedy_answers_are_those_of_the_model_in_process(teacher, model):
    written = teacher.write(prompts(), sampling())
    assert [one.ids for one in written] == [local(model, ids, 24) for ids in PROMPTS]
    assert {one.cut for one in written} == {one.ids[-1] not in (2, 0) for one in written}


def test_an_answer_ends_with_its_stop_token(teacher, model):
    plain = [local(model, ids, 24, stops=()) for ids in PROMPTS]
    stops = [ids[9] for ids in plain]
    for one, ids in zip(teacher.write(prompts(), sampling(stop_ids=stops)), plain, strict=True):
        first = next(place for place, token in enumerate(ids) if token in [*stops, 2])
        assert (one.ids, one.cut) == (ids[: first + 1], False)


def test_sampled_answers_depend_on_their_seeds_alone(teacher):
    first = teacher.write(prompts(), sampling(temperature=1.0))
    assert first == [teacher.write([one], sampling(temperature=1.0))[0] for one in prompts()]
    assert first != teacher.write(prompts(seed=50), sampling(temperature=1.0))


def test_a_forbidden_token_is_not_written(teacher, model):
    first = local(model, PROMPTS[0])[0]
    written = teacher.write(prompts(), sampling(forbidden_ids=[first]))
    assert written[0].ids[0] != first
    assert all(first not in one.ids for one in written)


def test_targets_that_come_with_an_answer_are_its_scores_at_temperature_1(teacher, model):
    teacher.writes_targets = True
    written = teacher.write(prompts(), sampling(temperature=0.4, targets=True))
    worst = 0.0
    for prompt, one in zip(PROMPTS, written, strict=True):
        ids = (*prompt, *one.ids)
        positions = tuple(range(len(prompt), len(ids)))
        found = teacher._sent(Scored(ids, positions)).reply.result()[0]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        worst = max(worst, float((found.logprobs - expected.gather(1, found.indices)).abs().max()))
        assert torch.allclose(found.logprobs, expected.topk(64).values, atol=1e-4)
    assert worst < 1e-4


def config(folder, url, **rlhf):
    project = yaml.safe_load((folder / "config.yaml").read_text())
    del project["data"]["eval"], project["training"]["eval_strategy"], project["training"]["eval_steps"]
    options = {"backend": "vllm", "base_url": url, "model": "teacher", **rlhf.pop("teacher", {})}
    project["rlhf"] = {"max_new_tokens": 8, "lmbda": 0.0, **rlhf, "teacher": options}
    return project


def write(folder, project):
    (folder / "config.yaml").write_text(yaml.safe_dump(project))
    return str(folder / "config.yaml")


@pytest.mark.parametrize("api", ["auto", "chat"])
def test_a_run_on_answers_of_the_server(project, url, api):
    options = config(project, url, llm_kd_weight=0, teacher={"api": api})
    options["data"]["train"] = {"path": "train.jsonl", "answers": "teacher"}
    # Random weights write half of a character, and control tokens.
    options["data"] |= {"max_bad_rows": 20, "control_tokens": "text"}
    result = kdtrain.fit(write(project, options))
    assert result.steps == 4
    assert result.teacher["requests"] == 6
    assert 6 <= result.teacher["completion_tokens"] <= 48


def test_seq_kd_by_a_run_asks_once_for_an_answer_and_its_targets(project, url, monkeypatch):
    asked = []
    original = Servers.post

    async def post(self, path, payload, *args, **kwargs):
        asked.append(payload)
        return await original(self, path, payload, *args, **kwargs)

    monkeypatch.setattr(Servers, "post", post)
    result = kdtrain.fit(write(project, config(project, url, seq_kd=True, teacher={"top_k": 32})))
    answers = [payload for payload in asked if "stop_token_ids" in payload]
    assert len(answers) == 4 * 4
    assert {payload["logprobs"] for payload in answers} == {32}
    scored = [payload for payload in asked[asked.index(answers[0]) :] if "prompt_logprobs" in payload]
    # Where a connection is opened anew, the server is asked for the same row again: is it still the same model?
    assert len({tuple(ids) for payload in scored for ids in payload["prompt"]}) <= 1
    assert result.metrics["llm_kd_loss"] > 0
