"""Whole runs with a teacher on a server that fails: the exit code, the state that is kept, and what nobody may read."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

import kdtrain
from kdtrain.errors import TeacherError
from tests import tiny
from tests.stub_server import HANG, RESET, StubServer

KEY = "canary-0f9d3b7716"


@pytest.fixture
def server(teacher, tokenizer):
    with StubServer(teacher, tokenizer=tokenizer) as server:
        yield server


def served(project, server, **options):
    """The path of a config whose teacher is on the server."""
    config = yaml.safe_load((project / "config.yaml").read_text())
    del config["rlhf"]["teacher_model"]
    defaults = {"backend": "vllm", "base_url": server.url, "model": "teacher", "top_k": 8, "max_retries": 0}
    config["rlhf"]["teacher"] = {**defaults, **options}
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    return str(project / "config.yaml")


def weights(run):
    found = load_file(run / "model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


def status(project):
    return json.loads((project / "run" / "status.json").read_text())


class AfterStep(TrainerCallback):
    """Does something when a step is done."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            self.action()


def answer_by(server, reply):
    """From now on every request for log-probabilities gets this reply."""

    def change():
        server.on_request = lambda request: reply if request.path == "/v1/completions" else None

    return change


def with_status(code):
    return (code, {"Content-Type": "application/json"}, b'{"error": {"message": "no"}}')


HTML = (200, {"Content-Type": "text/html"}, b"<html>log in\x1b[31m</html>")
CUT = (200, {"Content-Type": "application/json"}, b'{"choices": [{"index": 0, "prompt_logpro')
FAULTS = {
    "silence": (HANG, "no complete reply within 0.5 s"),
    "a broken connection": (RESET, "the connection broke"),
    "400": (with_status(400), "status 400"),
    "401": (with_status(401), "rlhf.teacher.api_key_env"),
    "503": (with_status(503), "status 503"),
    "HTML": (HTML, "no JSON: '<html>log in\\x1b[31m</html>'"),
    "JSON that is cut off": (CUT, "no JSON"),
    "another shape": ({"choices": None}, "no list of choices"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_teacher_that_fails_while_training_ends_the_run_with_its_state_saved(project, server, fault):
    reply, words = FAULTS[fault]
    config = served(project, server, lookahead=0, timeout_s=0.5)
    with pytest.raises(TeacherError) as caught:
        kdtrain.fit(config, callbacks=[AfterStep(2, answer_by(server, reply))])
    assert caught.value.exit_code == 4
    assert words in str(caught.value)
    assert "The state of step 2 is saved: go on with kdtrain.fit(…, resume=" in str(caught.value)
    assert (status(project)["state"], status(project)["exit_code"]) == ("failed", 4)
    assert not (project / "run" / "model.safetensors").exists()
    assert (project / "run" / "checkpoint-2" / "trainer_state.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [0, 2])
def test_it_goes_on_as_if_the_server_had_never_been_away(project, server, lookahead):
    config = served(project, server, lookahead=lookahead)
    rows = [{"prompt": f"What is {i}?", "completion": " the path of the file"} for i in range(24)]
    (project / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kdtrain.fit(config, [f"training.output_dir={project / 'whole'}"])
    with pytest.raises(TeacherError):
        kdtrain.fit(config, callbacks=[AfterStep(1, answer_by(server, RESET))])
    server.on_request = None
    kdtrain.fit(config, resume="auto")
    assert torch.equal(weights(project / "run"), weights(project / "whole"))
    log = (project / "run" / "logging.jsonl").read_text()
    steps = [json.loads(line).get("step") for line in log.splitlines()]
    assert steps == [1, 2, 3, 4, 4], log


@pytest.mark.slow
def test_another_model_behind_the_same_address_ends_the_run(project, server):
    config = served(project, server, lookahead=0)
    with pytest.raises(TeacherError, match="another model"):
        kdtrain.fit(config, callbacks=[AfterStep(2, lambda: server.restart(tiny.make_qwen3(seed=7, hidden=48)))])
    assert (project / "run" / "checkpoint-2").is_dir()


@pytest.mark.slow
def test_a_server_that_is_slow_busy_and_down_for_a_while_changes_no_number(project, server):
    config = served(project, server, max_retries=5)
    kdtrain.fit(config)
    busy = (429, {"Retry-After": "0.2"}, b"{}")
    troubles = iter([busy, with_status(503), with_status(503), RESET])

    def trouble():
        server.on_request = lambda request: next(troubles, None) if request.path == "/v1/completions" else None

    kdtrain.fit(config, [f"training.output_dir={project / 'troubled'}"], callbacks=[AfterStep(1, trouble)])
    assert next(troubles, None) is None
    assert torch.equal(weights(project / "run"), weights(project / "troubled"))


def fit_on_a_rank(config, folder):
    """What a rank raises; the second one's server is gone after two steps."""

    def fail():
        if os.environ["RANK"] == "1":
            (folder / "gone").touch()

    try:
        kdtrain.fit(config, callbacks=[AfterStep(2, fail)])
    except TeacherError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_where_one_rank_gets_no_answer_all_stop_and_the_state_is_saved(project, server):
    """One request is refused, of whichever rank it is."""
    config = served(project, server, lookahead=0)
    failed = []

    def on_request(request):
        if (project / "gone").exists() and request.path == "/v1/completions" and not failed:
            failed.append(request.body["prompt"])
            return with_status(400)
        return None

    server.on_request = on_request
    errors = tiny.run_ranks(fit_on_a_rank, 2, config, project)
    assert len(failed) == 1
    assert sorted("status 400" in error for error in errors) == [False, True]
    assert all("The state of step 2 is saved" in error for error in errors), errors
    assert (project / "run" / "checkpoint-2" / "trainer_state.json").exists()


# ---- secrets ---------------------------------------------------------------------------------------------------------

ENDS = {
    "finished": (None, 0),
    "refused": (with_status(403), 3),
    "an echo of the key": ((400, {"Content-Type": "application/json"}, json.dumps({"error": KEY}).encode()), 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_the_key_is_in_no_file_and_on_neither_stream(project, teacher, tokenizer, end):
    reply, code = ENDS[end]
    with StubServer(teacher, tokenizer=tokenizer, api_key=KEY) as server:
        server.on_request = lambda request: reply if request.path == "/v1/completions" else None
        config = served(project, server, api_key_env="TEACHER_KEY")
        run = subprocess.run(
            [sys.executable, "-m", "kdtrain", "fit", config, "--debug", "training.save_strategy=steps",
             "training.save_steps=2"],
            env={**os.environ, "TEACHER_KEY": KEY}, capture_output=True, timeout=200, check=False,
        )  # fmt: skip
        assert all(request.headers["authorization"] == f"Bearer {KEY}" for request in server.requests)
    assert run.returncode == code, run.stderr.decode()[-2000:]
    assert KEY.encode() not in run.stdout + run.stderr
    files = [path for path in project.rglob("*") if path.is_file()]
    assert len(files) > (30 if code == 0 else 10)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
