"""The example of cached teachers: every form is written and trained from, and its page says what was measured."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest

from kdtrain.cli import app as cli

FOLDER = Path(__file__).parent.parent / "examples" / "cached_teacher"
CONFIG = FOLDER / "distill.yaml"


def script(name, folder):
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = script("demo", FOLDER)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Some rows and the quickstart's models, untrained."""
    folder = tmp_path_factory.mktemp("example")
    counts = script("prepare", FOLDER.parent / "quickstart").build(folder / "build", limit=10)
    models = [f"model.model={folder}/build/student_init", f"rlhf.teacher_model={folder}/build/teacher_init"]
    return counts, [*models, f"data.train={folder}/build/train_400.jsonl"]


@pytest.fixture
def kdtrain(monkeypatch, capsys):
    """The command, in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdtrain", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        said = capsys.readouterr()
        assert done.value.code == 0, said.out + said.err

    yield run
    logger = logging.getLogger("kdtrain")
    logger.handlers, logger.propagate = [], True


def losses(run):
    records = [json.loads(line) for line in (run / "logging.jsonl").open(encoding="utf-8")]
    return [record["llm_kd_loss"] for record in records if "loss" in record]


@pytest.mark.slow
def test_every_form_trains_two_steps(built, kdtrain, tmp_path):
    counts, overrides = built
    steps = ["training.max_steps=2", "training.logging_steps=1"]
    kdtrain("fit", CONFIG, *overrides, *steps, f"training.output_dir={tmp_path / 'online'}")
    online = losses(tmp_path / "online")
    sizes = {}
    for form, options in demo.FORMS.items():
        folder, run = tmp_path / "build" / form, tmp_path / form
        kdtrain("cache", CONFIG, *options, "--out", folder, *overrides)
        source = ["rlhf.teacher.backend=cache", f"rlhf.teacher.path={folder}"]
        kdtrain("fit", CONFIG, *overrides, *steps, *source, f"training.output_dir={run}")
        assert len(losses(run)) == 2
        assert losses(run)[0] != losses(run)[1]
        sizes[form] = demo.size(folder, counts["train_400_supervised"])
    assert losses(tmp_path / "hidden") == pytest.approx(online, rel=1e-5)
    assert losses(tmp_path / "hidden-int8") == pytest.approx(online, rel=1e-2)
    assert losses(tmp_path / "top-12") < losses(tmp_path / "top-50") < online  # tokens that are put together hide KL
    assert sizes["hidden"]["bytes_per_token"] > 4 * 224 > sizes["hidden-int8"]["bytes_per_token"]
    assert sizes["top-50"]["bytes_per_token"] > sizes["top-12"]["bytes_per_token"]
    assert sizes["hidden"]["head_bytes"] > 1e6
    assert sizes["top-50"]["head_bytes"] == 0


def test_the_head_of_hidden_states_counts_once(tmp_path):
    for name, size in (("manifest.json", 100), ("shard-00000.safetensors", 900), ("head.safetensors", 5000)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert demo.size(tmp_path, tokens=10) == {"bytes_per_token": 100.0, "head_bytes": 5000}


def test_the_table_has_a_line_for_every_student():
    assert [*demo.WHAT] == ["before", "ce", "online", *demo.FORMS, "teacher"]


@pytest.mark.parametrize("argument", ["--fast", "steps", "training.output_dir=x", "rlhf.teacher.path=x"])
def test_the_demo_refuses_other_words(monkeypatch, argument):
    monkeypatch.setattr(sys, "argv", ["demo.py", argument])
    monkeypatch.setattr(demo, "train", lambda overrides: pytest.fail("it began"))
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert str(stopped.value.code).startswith("usage")


def test_the_page_shows_what_was_measured():
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    blocks = demo.table(results).strip().split("\n\n")
    assert len(blocks) == 2
    assert [block for block in blocks if block not in page] == []
