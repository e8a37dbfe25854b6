"""What the README and the examples show must be true."""

import json
import re
import shlex
from pathlib import Path

import pytest

from kdtrain.config import check_config

ROOT = Path(__file__).parent.parent
# Those of examples/accelerate are files of accelerate: tests/test_config_launching.py.
EXAMPLES = [path for path in sorted(ROOT.glob("examples/*/*.yaml")) if path.parent.name != "accelerate"]


def readme_blocks(language, page="README.md"):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", readme_blocks("yaml") + readme_blocks("yaml", "examples/migrating/README.md"))
def test_every_config_of_the_readme_and_of_the_page_for_users_of_other_tools_is_valid(block, tmp_path, monkeypatch):
    monkeypatch.setattr("kdtrain.config.generation.why_no_vllm", lambda: None)  # it need not be installed here
    (tmp_path / "config.yaml").write_text(block)
    result = check_config(tmp_path / "config.yaml")
    assert result.errors == []
    assert result.warnings == []


def test_the_readme_has_a_config_and_examples_exist():
    assert readme_blocks("yaml")
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_example_is_valid(path):
    if path.name == "base.yaml":  # not a run by itself
        others = [other.read_text(encoding="utf-8") for other in path.parent.glob("*.yaml") if other != path]
        assert any("extends: base.yaml" in other for other in others)
        return
    result = check_config(path)
    # A model that the example builds first may not be there yet.
    assert [error.message for error in result.errors if "no such folder" not in error.message] == []
    assert result.warnings == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_an_example_builds_is_never_looked_for_on_the_hub(path):
    """`runs/teacher` could be a model there: before the folder exists, only `./runs/teacher` is surely local."""
    names = re.findall(r"^  (?:model|teacher_model): (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name in names if not name.startswith(("./", "../", "Qwen/"))] == []


def test_the_page_for_users_of_other_tools_names_options_that_exist():
    from kdtrain.config.options import LossAndSampling
    from kdtrain.config.schema import DataConfig, RlhfConfig, TunerConfig

    sections = {"rlhf": RlhfConfig, "data": DataConfig, "tuner": TunerConfig}
    page = (ROOT / "examples/migrating/README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(rlhf|data|tuner)\.(\w+)", page)
    assert len(named) > 10
    assert [name for section, name in named if name not in sections[section].model_fields] == []
    assert {"beta", "lmbda", "max_new_tokens", "sft_alpha"} <= LossAndSampling.model_fields.keys()


def test_the_table_of_other_tools_is_what_was_measured():
    from tests.benchmarks.rivals.table import RESULTS, table

    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert table(results) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_of_the_readme_exists():
    from typer.main import get_command

    from kdtrain.cli.app import app

    commands = set(get_command(app).commands)
    mentioned = set(re.findall(r"kdtrain (\w+)", "\n".join(readme_blocks("sh"))))
    assert {"fit", "validate", "schema", "env"} <= mentioned <= commands


def test_every_command_line_of_the_readme_can_be_typed():
    """Its arguments and options exist and have values that they take; nothing is run."""
    from typer.main import get_command

    from kdtrain.cli.app import app

    commands = get_command(app).commands
    text = "\n".join(readme_blocks("sh")).replace("\\\n", " ")
    lines = [line.partition(" > ")[0] for line in re.findall(r"(?m)kdtrain (?!--)(\w.*)$", text)]
    assert len(lines) > 20
    for line in lines:
        name, *words = shlex.split(line, comments=True)
        context = commands[name].make_context(name, words)
        assert not context.args, line


def test_every_metric_of_the_readme_is_one_that_is_logged():
    from kdtrain.trainer import metrics

    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is logged")[1].split("## ")[0]
    keys = "\n".join(line for line in table.splitlines() if line.startswith("|"))
    named = set(re.findall(r"`(\w+)`", keys))
    source = Path(metrics.__file__).read_text(encoding="utf-8")
    by_transformers = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert {name for name in named - by_transformers if f'"{name}"' not in source} == set()


def test_the_teacher_of_the_readme_answers_for_a_batch():
    import torch

    from kdtrain.data.batch import Batch, Rows

    (block,) = [block for block in readme_blocks("python") if "(Teacher)" in block]
    names = {}
    exec(block, names)
    answers = {f"0:{i}": (torch.tensor([[i, 9]] * 2), torch.tensor([[-1.0, -2.0]] * 2)) for i in range(3)}
    labels = torch.tensor([[-100, 5, 6], [-100, 7, 8]])
    batch = Batch(model_inputs={}, labels=labels, rows=Rows(ids=["0:2", "0:1"]))
    targets = names["Stored"](answers).targets(batch)
    assert targets.covered_S is None
    assert targets.scores.indices.tolist() == [[2, 9], [2, 9], [1, 9], [1, 9]]


def test_every_room_and_file_of_the_readme_exists():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| room |")[1].split("\n\n")[0]
    rows = [re.findall(r"`([\w/.]+)`", line) for line in table.splitlines()[2:]]
    assert len(rows) == 12
    for room, *files in rows:
        assert all((ROOT / "kdtrain" / room / file).exists() for file in files), room
