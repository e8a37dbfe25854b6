"""The example of a student cut out of its teacher: its config is a run, and its page says what was measured."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from kdtrain.config import check_config

FOLDER = Path(__file__).parent.parent / "examples" / "student_from_teacher"


def load_demo():
    spec = importlib.util.spec_from_file_location("student_from_teacher_demo", FOLDER / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = load_demo()


@pytest.mark.parametrize("argument", ["--fast", "steps", "training.output_dir=x", "model.model=x"])
def test_the_demo_refuses_other_words(monkeypatch, argument):
    monkeypatch.setattr(sys, "argv", ["demo.py", argument])
    monkeypatch.setattr(demo.quickstart, "run", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit) as stopped:
        demo.main()
    assert str(stopped.value.code).startswith("usage")


def test_healing_is_forward_kl_alone():
    built = [
        "model.model=a/student",
        "rlhf.teacher_model=a/teacher",
        "data.train=some/rows",
    ]  # what the demo makes first
    rlhf = check_config(FOLDER / "heal.yaml", built).config.rlhf
    assert (rlhf.beta, rlhf.sft_alpha, rlhf.llm_kd_weight, rlhf.lmbda) == (0, 0, 1, 0)


def test_the_pages_show_what_was_measured():
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    rows, heldout = demo.table(results).strip().split("\n\n")
    own = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert rows in own
    assert heldout in own
    assert rows in (FOLDER.parent.parent / "README.md").read_text(encoding="utf-8")
    healed, scratch = (results["models"][name]["perplexity"] for name in ("healed", "scratch"))
    assert healed < scratch
