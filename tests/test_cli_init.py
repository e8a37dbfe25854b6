"""`kdtrain init`, and the recipes: each says what it needs, is valid, and its commands are."""

import json
import re
import shlex
import sys

import pytest

import kdtrain
from kdtrain.cli import app as cli
from kdtrain.cli.commands.init import copied, recipes
from kdtrain.config import check_config, json_schema
from kdtrain.errors import ConfigError
from kdtrain.preflight.files import all_files
from kdtrain.runs.sweep_plan import plan_sweep
from tests import tiny
from tests.stub_server import StubServer

NAMES = {
    "lora-chats", "forward-kl", "on-policy", "qwen3-vl", "visual-only",
    "context", "served-teacher", "cached-teacher", "sweep", "draft",
}  # fmt: skip


@pytest.fixture
def init(tmp_path, monkeypatch, capsys):
    def run(*arguments, code=0):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["kdtrain", "init", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        printed = capsys.readouterr()
        assert done.value.code == code, printed.err
        return printed.out if code == 0 else printed.err

    return run


def test_init_alone_lists_every_recipe_on_a_line_that_a_terminal_holds(init):
    lines = init().splitlines()
    listed = lines[: lines.index("")]
    assert {line.split()[0] for line in listed} == NAMES
    assert all(len(line) <= 80 for line in listed)
    assert recipes().keys() == NAMES


def test_init_copies_a_recipe_with_its_schema_and_says_what_comes_next(init, tmp_path):
    out = init("lora-chats", "new/folder")
    assert "Next: kdtrain validate new/folder/lora-chats.yaml" in out
    assert json.loads((tmp_path / "new/folder/kdtrain.schema.json").read_text()) == json_schema()
    first = (tmp_path / "new/folder/lora-chats.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=kdtrain.schema.json"


def test_nothing_is_overwritten(init, tmp_path):
    (tmp_path / "context.yaml").write_text("mine")
    assert "context.yaml is there already, and is left as it is" in init("context", code=2)
    assert (tmp_path / "context.yaml").read_text() == "mine"
    (tmp_path / "kdtrain.schema.json").write_text('{"title": "mine"}')
    init("sweep")
    assert (tmp_path / "kdtrain.schema.json").read_text() == '{"title": "mine"}'
    (tmp_path / "kdtrain.schema.json").write_text(json.dumps({**json_schema(), "properties": {}}))
    init("on-policy")  # the schema of an older version makes way
    assert json.loads((tmp_path / "kdtrain.schema.json").read_text()) == json_schema()


def test_a_file_named_in_place_of_the_folder_is_refused(init, tmp_path):
    assert "config.yaml looks like a file" in init("lora-chats", "config.yaml", code=2)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_nearly_right_is_suggested(init, tmp_path):
    assert "there is no recipe onpolicy. Did you mean on-policy?" in init("onpolicy", code=2)
    assert "kdtrain init alone lists them" in init("zzz\x1b[31m", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Copies a recipe beside data such as it wants."""
    monkeypatch.chdir(tmp_path)

    def copy(name):
        path = copied(name, tmp_path)
        images = {"images": ["a.png"]} if "images" in path.read_text() else {}
        for file in ("train.jsonl", "eval.jsonl", "prompts.jsonl"):
            rows = [{**row, **images} for row in tiny.CHATS * 4]
            (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return copy


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_recipe_is_valid_and_its_head_says_what_it_needs(recipe, name):
    path = recipe(name)
    head = path.read_text().split("\n\n")[0]
    for fact in ("Hardware", "Time", "Data", f"kdtrain fit {name}.yaml"):
        assert f"# {fact}" in head, fact
    assert re.search("not measured|estimate", head, re.IGNORECASE)
    assert "two knobs" in path.read_text()
    assert all(len(line) <= 120 for line in path.read_text().splitlines())
    result = check_config(path, files=all_files)
    assert [*result.errors, *result.warnings] == []
    assert result.config.training["output_dir"].endswith(f"runs/{name}")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_commands_of_a_recipe_can_be_typed(recipe, name, tmp_path):
    from typer.main import get_command

    path, commands = recipe(name), get_command(cli.app).commands
    named = re.findall(r"^# (kdtrain .*?)(?:  .*)?$", path.read_text(), re.MULTILINE)
    assert named
    for line in named:
        _, command, *words = shlex.split(line)
        context = commands[command].make_context(command, words, resilient_parsing=False)
        if command != "fit":
            continue
        overrides = context.params["overrides"] or []
        if context.params["sweep"]:
            assert len(plan_sweep(path, overrides).runs) == 12
        elif "rlhf.teacher.backend=cache" not in overrides:  # which is not written yet
            assert check_config(path, overrides).errors == []


def stand_ins(folder):
    """Tiny models in the place of those that a recipe names, and two steps on a CPU."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{% if enable_thinking %}{% endif %}" + tiny.CHATML  # Qwen3's reads it
    tiny.save_model(tiny.make_qwen3(seed=1), tokenizer, folder / "student")
    tiny.save_model(tiny.make_qwen3(seed=2, hidden=48), tokenizer, folder / "teacher")
    return [
        f"model.model={folder / 'student'}",
        "model.dtype=float32",
        "training.max_steps=2",
        "training.logging_steps=1",
        "training.use_cpu=true",
        "training.per_device_train_batch_size=2",
        "training.gradient_accumulation_steps=1",
        "launch.num_processes=1",
    ]


@pytest.mark.parametrize("name", tiny.one_in(2, sorted(NAMES - {"qwen3-vl", "visual-only", "served-teacher"})))
def test_a_recipe_trains_two_steps_with_tiny_models(recipe, name, tmp_path):
    path, overrides = recipe(name), stand_ins(tmp_path)
    if name != "context":
        overrides.append(f"rlhf.teacher_model={tmp_path / 'teacher'}")
    if "max_new_tokens" in path.read_text():
        overrides.append("rlhf.max_new_tokens=4")
    result = kdtrain.fit(path, overrides, quiet=True)
    assert result.steps == 2
    assert result.metrics["llm_kd_loss"] > 0
    assert result.metrics["on_policy_fraction"] == (1.0 if name in ("on-policy", "draft") else 0.0)


def test_the_served_teachers_recipe_trains_two_steps_with_a_stub(recipe, tmp_path, tokenizer, teacher):
    path, overrides = recipe("served-teacher"), stand_ins(tmp_path)
    with StubServer(teacher, tokenizer=tokenizer) as server:
        result = kdtrain.fit(path, [*overrides, f"rlhf.teacher.base_url={server.url}"], quiet=True)
    assert result.steps == 2
    assert result.metrics["llm_kd_loss"] > 0


def test_a_recipe_that_does_not_exist_is_an_error_from_python_too(tmp_path):
    with pytest.raises(ConfigError, match="there is no recipe"):
        copied("nothing-like-it", tmp_path)
