"""Whole runs with several teachers: of every kind, resumed, and with the answers of each row's own teacher."""

import json
from unittest import mock

import pytest
import torch
import yaml

import kdtrain
from kdtrain.config import ConfigLoader
from kdtrain.errors import ConfigError, DataError
from kdtrain.models.processing import load_processing
from kdtrain.runs.build import Given
from kdtrain.runs.cache_options import require_cachable
from kdtrain.runs.read_data import read_data
from tests import tiny
from tests.stub_server import StubServer
from tests.test_runs_served import weights
from tests.test_trainer_several_teachers import SEEDS
from tests.tiny_cache import cache_of

NAMES = ["math", "code", "code", "math", "math", "code"]
CHATS = [{**row, "teacher": name} for row, name in zip(tiny.CHATS, NAMES, strict=True)]
FULL = {"math": {"teacher_model": "./teacher"}, "code": {"model": "./other"}}


@pytest.fixture
def config(project, tokenizer, monkeypatch):
    """A run of three steps with two teachers, by a column of the rows."""
    monkeypatch.chdir(project)
    tiny.save_model(tiny.make_qwen3(seed=SEEDS["code"], hidden=48), tokenizer, project / "other")
    for name in ("train.jsonl", "eval.jsonl"):
        (project / name).write_text("".join(json.dumps(row) + "\n" for row in CHATS * 2))
    content = yaml.safe_load((project / "config.yaml").read_text())
    del content["rlhf"]["teacher_model"]
    content["rlhf"]["teachers"] = FULL
    content["training"] |= {"max_steps": 3, "eval_steps": 3, "report": False}
    (project / "config.yaml").write_text(yaml.safe_dump(content))
    return project / "config.yaml"


def fit(config, *overrides, output="run", **options):
    """The records and the weights of a run."""
    folder = config.parent / output
    kdtrain.fit(config, [*overrides, f"training.output_dir={folder}"], quiet=True, **options)
    records = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    return records, weights(folder)


def losses(records):
    names = ("loss", "llm_kd_loss", "llm_kd_loss_teacher_math", "llm_kd_loss_teacher_code", "eval_llm_kd_loss")
    return [{name: record[name] for name in names if name in record} for record in records]


def alone(config, name, **changes):
    """A config of one of the teachers alone."""
    content = yaml.safe_load(config.read_text())
    named = content["rlhf"].pop("teachers")[name]
    content["rlhf"] |= {"teacher_model": named.get("teacher_model") or named["model"], **changes}
    path = config.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_a_cache_and_a_server_stand_in_for_teachers_and_hear_of_their_own_rows_alone(config):
    """All of the vocabulary is given, so that the numbers are those of the models."""
    expected, _ = fit(config, "training.learning_rate=2e-5")
    cache = cache_of(alone(config, "code"), config.parent / "targets", "topk", entries=320)
    with StubServer(tiny.make_qwen3(seed=2, hidden=48)) as server:
        server.top_k_limit = None
        mine = {"backend": "vllm", "base_url": server.url, "model": "teacher", "top_k": 320}
        teachers = {"math": mine, "code": {"backend": "cache", "path": str(cache)}}
        override = f"rlhf.teachers={json.dumps(teachers)}"
        found, _ = fit(config, "training.learning_rate=2e-5", override, output="mixed")
        asked = {tuple(ids) for request in server.requests for ids in request.body.get("prompt", ()) if len(ids) > 9}
    assert losses(found) == [pytest.approx(one, rel=1e-4) for one in losses(expected)]
    encoded = {name: [] for name in SEEDS}
    tokenizer = tiny.make_tokenizer()
    for row in CHATS:
        encoded[row["teacher"]].append(tokenizer.apply_chat_template(row["messages"], return_dict=False))
    others = {tuple(ids[:-1]) for ids in encoded["code"]}  # the template's last line break follows the answer
    assert asked
    assert not {ids for ids in asked if any(ids[: len(other)] == other for other in others)}


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(config):
    """With a moving average of the student among the teachers, whose state is in the checkpoint."""
    teachers = {**FULL, "code": {"backend": "self", "weights": "ema", "ema_decay": 0.5}}
    options = [f"rlhf.teachers={json.dumps(teachers)}", "training.save_strategy=steps", "training.save_steps=1"]
    options += ["training.learning_rate=1e-2", "training.lr_scheduler_type=constant"]
    expected, whole = fit(config, *options)
    assert (config.parent / "run" / "checkpoint-2" / "teacher-code" / "teacher_average.safetensors").is_file()
    fit(config, *options, "training.max_steps=2", output="again")
    found, resumed = fit(config, *options, output="again", resume="auto")
    assert losses(found)[-2:] == losses(expected)[-2:]
    assert torch.equal(whole, resumed)


@pytest.mark.slow
def test_each_rows_own_teacher_writes_its_answer(config):
    sources = [{"path": "train.jsonl", "answers": "teacher"}]
    content = yaml.safe_load(config.read_text())
    content["data"]["train"] = sources
    content["rlhf"] |= {"max_new_tokens": 6, "lmbda": 0.0}
    config.write_text(yaml.safe_dump(content))
    fit(config)
    written = {"both": answers_in(config.parent / "run")}
    for name in SEEDS:
        fit(alone(config, name), output=f"only {name}")
        written[name] = answers_in(config.parent / f"only {name}")
    own = {name: {key for key, one in written["both"].items() if written[name][key] == one} for name in SEEDS}
    assert len(written["both"]) == len(CHATS)
    assert [len(own[name]) for name in ("math", "code")] == [NAMES.count("math"), NAMES.count("code")]


def answers_in(folder):
    """What is kept of the answers that a run's teachers wrote, by prompt."""
    lines = [line for file in folder.glob("teacher_answers/*/rank0.jsonl") for line in file.read_text().splitlines()]
    return {one["prompt"]: one["answer"] for one in map(json.loads, lines)}


def test_a_row_without_a_teacher_is_a_bad_row(config):
    rows = [*CHATS[:3], tiny.CHATS[3], *CHATS[4:]]
    (config.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        DataError, match=r"train\.jsonl:4: the row names no teacher, and there are several \(code, math\)"
    ):
        fit(config)
    fit(config, "data.max_bad_rows=1", "training.max_steps=1")


def test_the_teacher_of_a_source_is_that_of_its_rows(config):
    (config.parent / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.CHATS))
    content = yaml.safe_load(config.read_text())
    content["data"]["train"] = [{"path": "a.jsonl", "teacher": "math", "divergence": "tvd"}, {"path": "train.jsonl"}]
    config.write_text(yaml.safe_dump(content))

    run = ConfigLoader.load(config)
    data = read_data(run, 0, load_processing(run.model.model), mock.Mock(), Given())
    assert data.train["teacher"][:] == ["math"] * 6 + NAMES * 2
    assert data.train["kd_divergence"][:] == ["tvd"] * 6 + [None] * 12


def test_a_cache_is_of_one_teacher(config):
    with pytest.raises(ConfigError, match="write one for each"):
        require_cachable(ConfigLoader.load(config), None)
