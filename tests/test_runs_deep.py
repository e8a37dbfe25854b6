"""`kdtrain validate --deep`: what the teacher really does, with the places in the config."""

import json
import logging

import pytest
import yaml
from typer.testing import CliRunner

from kdtrain.cli.app import app
from kdtrain.errors import PreflightError
from tests import tiny
from tests.stub_server import StubServer


@pytest.fixture(autouse=True)
def own_logging():
    yield
    logger = logging.getLogger("kdtrain")
    logger.handlers, logger.propagate = [], True


@pytest.fixture
def config(project):
    return yaml.safe_load((project / "config.yaml").read_text())


def validate(folder, config, *arguments):
    """Exit code, what is printed, and the error that would end the process."""
    path = folder / "deep.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    result = CliRunner().invoke(app, ["validate", str(path), "--deep", *arguments])
    return result.exit_code, result.stdout, path


def served(config, server, **options):
    teacher = {"backend": "vllm", "base_url": server.url, "model": "teacher", "top_k": 8, **options}
    rlhf = {key: value for key, value in config["rlhf"].items() if key != "teacher_model"}
    return {**config, "rlhf": {**rlhf, "teacher": teacher}}


def test_a_servers_answers_are_listed_and_numbered(project, config, tokenizer):
    with StubServer(tiny.make_qwen3(seed=2, hidden=48), tokenizer) as server:
        code, out, _ = validate(project, served(config, server))
    assert code == 0, out
    numbered = [line for line in out.splitlines() if line.partition(". ")[0].isdigit()]
    assert [int(line.partition(".")[0]) for line in numbered] == [*range(1, len(numbered) + 1)]
    for text in (
        "What the run writes takes about",
        "The run takes about",
        "Tokens are scored by prompt_logprobs",
        "Answers for the same tokens, alone, together, in another order and again",
        "depend on the tokens before them",
        "The temperature of a request does not change",
        "becomes the same token ids",
        "fits its log-probabilities",
        "Answers come with their targets",
        "A chat is rendered there as here",
        "tokens/s one request at a time",
        "rows of data.train word for word",
        "nats per token, against",
        "steps of",
    ):
        assert any(text in line for line in numbered), text
    assert "tokens of this run" in out


def test_an_error_has_its_place_its_fix_and_exit_code_3(project, config, tokenizer):
    with StubServer(tiny.make_qwen3(seed=2, hidden=48), tokenizer, max_logprobs=5) as server:
        code, out, path = validate(project, served(config, server))
    assert code == PreflightError.exit_code == 3
    line = next(number for number, text in enumerate(path.read_text().splitlines(), start=1) if "top_k" in text)
    assert f"{path}:{line}:" in out
    assert "top_k: 8" in out  # the line itself
    assert "start it with --max-logprobs 8, or set rlhf.teacher.top_k: 5" in out
    assert "1 error" in out


def test_json_has_every_finding_with_its_place(project, config, tokenizer):
    with StubServer(tiny.make_qwen3(seed=2, hidden=48), tokenizer, name="other") as server:
        code, out, path = validate(project, served(config, server), "--json")
    assert code == 3
    (first,) = (finding for finding in json.loads(out) if finding["level"] == "error")
    assert (first["level"], first["path"], first["file"]) == ("error", "rlhf.teacher.model", str(path))
    assert "no model named teacher" in first["message"]


def test_a_server_that_is_not_there_is_one_error(project, config, tokenizer):
    with StubServer(tiny.make_qwen3(seed=2), tokenizer) as server:
        pass
    code, out, _ = validate(project, served(config, server, max_retries=0))
    assert code == 3
    assert out.count("error: rlhf.teacher.base_url") == 1
    assert server.url in out


def test_a_teacher_in_this_process_is_loaded_and_asked(project, config):
    code, out, _ = validate(project, config)
    assert code == 0
    assert "warning: rlhf.teacher_model: The teacher's targets fit" in out  # it has learnt nothing
    assert "nats per token, against" in out


def test_a_teacher_with_another_vocabulary_is_an_error_at_its_name(project, config):
    other = tiny.make_tokenizer(300)
    tiny.save_model(tiny.make_qwen3(300), other, project / "other")
    config["rlhf"]["teacher_model"] = "./other"
    code, out, _ = validate(project, config)
    assert code == 3
    assert "error: rlhf.teacher_model: Student and teacher have different vocabularies" in out
    with StubServer(tiny.make_qwen3(seed=2, hidden=48), other) as server:
        named = served(config, server)
        named["rlhf"]["teacher_model"] = "./other"
        code, out, _ = validate(project, named)
    assert code == 3
    assert "error: rlhf.teacher_model: Student and teacher have different vocabularies" in out


def test_rows_that_cannot_be_read_are_an_error_at_the_data(project, config):
    with (project / "train.jsonl").open("a") as file:  # the first row is read by the static check
        file.write("no row\n")
    code, out, _ = validate(project, config)
    assert code == 3
    assert "error: data.train" in out


def test_a_run_without_a_teacher_has_nothing_to_ask(project, config):
    config["rlhf"]["llm_kd_weight"] = 0
    code, out, _ = validate(project, config)
    assert code == 0
    assert "No teacher is asked in this run" in out


def test_what_the_static_check_finds_comes_first_and_alone(project, config):
    config["rlhf"]["beta"] = 3
    code, out, _ = validate(project, config)
    assert code == 2
    assert "rlhf.beta" in out
    assert "2. " not in out


def test_a_student_that_teaches_itself_is_loaded_and_asked_under_its_own_option(project, config):
    rlhf = {key: value for key, value in config["rlhf"].items() if key != "teacher_model"}
    teacher = {"backend": "self", "prefix": [{"role": "system", "content": "The path?"}]}
    config |= {"tuner": {"train_type": "lora"}, "rlhf": {**rlhf, "teacher": teacher}}
    code, out, _ = validate(project, config)
    assert code == 0, out
    assert "model.model: The teacher's targets fit the tokens" in out
    assert "What the teacher alone reads changes its distributions by" in out
    (project / "student" / "model.safetensors").write_bytes(b"torn")
    code, out, _ = validate(project, config)
    assert code != 0
