"""A secret that is put anywhere is in no output and in no file: not of the run, of its failure, nor of what follows it.

The canary has no form by which it could be told for a key, but where only a form can tell.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests import tiny
from tests.test_cli import kdtrain  # noqa: F401 - a fixture

CANARY = "canary4c1d8be07a5fae93"
FORMED = "hf_Canary4c1d8be07a5fae93"
VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "COMET_API_KEY", "TEACHER_KEY")


def leaks(folder, *outputs):
    """Where a canary is found, the config that it was written into aside."""
    needles = [CANARY.encode(), FORMED.encode()]
    found = [f"output {i}" for i, text in enumerate(outputs) if any(needle.decode() in text for needle in needles)]
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.name != "config.yaml":
            content = path.read_bytes()
            found += [str(path.relative_to(folder))] * any(needle in content for needle in needles)
    return found


# ---- written where it does not belong --------------------------------------------------------------------------------

OPTIONS = {
    "hub_token": ("training.hub_token", CANARY),
    "push_to_hub_token": ("training.push_to_hub_token", CANARY),
    "a tracker's key": ("training.wandb_api_key", CANARY),
    "a tracker's name": ("training.report_to", FORMED),
    "init_kwargs": ("model.init_kwargs", {"token": CANARY}),
    "old init_kwargs": ("model.init_kwargs", {"use_auth_token": CANARY}),
    "the teacher's init_kwargs": ("rlhf.teacher_model_init_kwargs", {"token": CANARY}),
    "a key for its name": ("rlhf.teacher.api_key_env", CANARY),
    "a key": ("rlhf.teacher.api_key", CANARY),
    "a mistyped key": ("rlhf.teacher.api_kye", CANARY),
    "a mistyped key of the name's": ("rlhf.teacher.api_key_evn", CANARY),
    "a mistyped token": ("training.hub_tokn", CANARY),
    "an unknown section": ("secrets", {"openai": CANARY}),
    "headers": ("rlhf.teacher.headers", {"Authorization": f"Bearer {CANARY}"}),
    "a list of keys": ("rlhf.teacher.api_keys", [CANARY]),
    "a user in the server's URL": ("rlhf.teacher.base_url", f"http://me:{CANARY}@127.0.0.1:9/v1"),
    "a query in the server's URL": ("rlhf.teacher.base_url", f"http://127.0.0.1:9/v1?key={CANARY}"),
    "a fragment in the server's URL": (
        "rlhf.teacher",
        {"backend": "vllm", "model": "t", "base_url": f"http://127.0.0.1:9/v1#{CANARY}"},
    ),
    "a user in a model's URL": ("model.model", f"https://me:{CANARY}@huggingface.co/org/model"),
    "a query in a model's URL": ("model.model", f"https://huggingface.co/org/model?token={CANARY}"),
    "a user in the data's URL": ("data.train", f"https://me:{CANARY}@host/rows.jsonl"),
    "a query in the data's URL": ("data.train", f"https://host/rows.jsonl?token={CANARY}"),
    "a run's name": ("training.run_name", FORMED),
    "where a number belongs": ("rlhf.beta", FORMED),
    "a prefix": ("rlhf.teacher.prefix", f"Use {FORMED} as the key."),
}


def put(tree, path, value):
    *parents, last = path.split(".")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[last] = value


@pytest.mark.parametrize("where", ["file", "command line"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_holds_a_secret_is_refused_and_not_repeated(project, kdtrain, name, where):  # noqa: F811
    option, value = OPTIONS[name]
    overrides = []
    if where == "file":
        config = yaml.safe_load((project / "config.yaml").read_text())
        put(config, option, value)
        (project / "config.yaml").write_text(yaml.safe_dump(config))
    else:
        overrides = [f"{option}={json.dumps(value)}"]
    for command in (
        ["validate", "config.yaml"],
        ["validate", "config.yaml", "--json"],
        ["fit", "config.yaml", "--debug"],
    ):
        code, out, err = kdtrain(*command, *overrides)
        assert code == 2, err
        assert leaks(project, out, err) == []
    assert not (project / "run").exists()


TEXTS = {
    "a comment": f"model: {{model: x}}\nrlhf: {{beta: wrong}}  # my key: {CANARY}\n",
    "a comment of another form": f"rlhf: {{beta: wrong}}  # {FORMED}\n",
    "a comment without a form": f"rlhf: {{beta: wrong}}  # it is {CANARY}\n",
    "a file that is not YAML": f"api_key: {CANARY}\n  model: [\n",
    "a tab": f"rlhf:\n\tapi_key: {CANARY}\n",
    "twice": f"rlhf: {{api_key: a, api_key: {CANARY}}}\n",
    "a tag": f"api_key: !env {CANARY}\n",
    "an anchor": f"key: &x {CANARY}\nrlhf: {{beta: *x}}\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_line_that_is_shown_hides_the_secret_in_it(project, kdtrain, name):  # noqa: F811
    (project / "config.yaml").write_text(TEXTS[name])
    for command in ("validate", "fit"):
        code, out, err = kdtrain(command, "config.yaml")
        assert code == 2, err
        assert leaks(project, out, err) == []


@pytest.mark.parametrize("argument", [f"--api-key={CANARY}", f"api_key={CANARY}", f"rlhf.teacher.key={CANARY}"])
def test_a_key_on_the_command_line_is_not_repeated(project, kdtrain, argument):  # noqa: F811
    code, out, err = kdtrain("fit", "config.yaml", argument)
    assert code == 2
    assert leaks(project, out, err) == []


# ---- where it belongs: the environment -------------------------------------------------------------------------------


@pytest.fixture
def keys(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, CANARY)


FULL = [
    "--debug", "training.report_to=[tensorboard]", "training.save_strategy=steps", "training.save_steps=2",
    "training.log_completions_steps=1", "rlhf.lmbda=1.0", "rlhf.max_new_tokens=4",
]  # fmt: skip


AFTER = [
    ["fit", "config.yaml", *FULL, "training.output_dir=sweep", "rlhf.beta=0,1", "training.max_steps=1", "--sweep"],
    ["evaluate", "run", "--debug"],
    ["report", "run"],
    ["export", "run", "out"],
    ["env"],
    ["validate", "config.yaml", "--deep", "training.output_dir=other"],
]


@pytest.mark.parametrize("after", [[], pytest.param(AFTER, marks=pytest.mark.faults)], ids=["a run", "what follows"])
def test_the_environment_is_in_no_file_of_a_run_and_what_follows_it(project, kdtrain, keys, after):  # noqa: F811
    outputs = []
    for command in [["fit", "config.yaml", *FULL, "tuner.train_type=lora"], *after]:
        code, out, err = kdtrain(*command)
        assert code == 0, (command, err)
        outputs += [out, err]
    names = {path.name for path in project.rglob("*") if path.is_file()}
    assert {"report.html", "report.json", "status.json", "completions.parquet", "trainer_state.json"} <= names
    assert {"run_config.json", *(["evaluation.json", "sweep.json"] if after else [])} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert leaks(project, *outputs) == []


def test_the_environment_is_not_told_when_a_run_fails(project, kdtrain, keys):  # noqa: F811
    model = tiny.make_qwen3(seed=2, hidden=48)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    tiny.save_model(model, tiny.make_tokenizer(), project / "teacher")
    code, out, err = kdtrain("fit", "config.yaml", *FULL)
    assert code == 5, err
    assert {"error.log", "nonfinite.json", "status.json"} <= {path.name for path in (project / "run").iterdir()}
    assert leaks(project, out, err) == []
