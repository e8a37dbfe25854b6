"""Tasks of lm-eval in `kdtrain evaluate`; all but what is said without it are skipped where it is not installed."""

import importlib.util
import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.test_cli import kdtrain  # noqa: F401 - a fixture
from tests.test_runs_evaluate import found_in, original, project, trained, write_rows  # noqa: F401 - fixtures

with_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra eval")
QUESTIONS = [
    {"question": "One and one is", "answer": 0},
    {"question": "The path of the", "answer": 1},
    {"question": "Zero is", "answer": 2},
    {"question": "The student is", "answer": 0},
]
CHOICES = [" two", " the file it returns", " nothing"]


@pytest.fixture
def tasks(trained):  # noqa: F811
    """A folder with a task of one's own over a local file."""
    folder = trained / "tasks"
    folder.mkdir()
    write_rows(folder / "questions.jsonl", QUESTIONS)
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": CHOICES,
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(task))
    return trained


def own_accuracy(folder):
    """Share of questions whose answer has the highest log-likelihood among the choices, in float64."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), tiny.make_tokenizer()
    right = 0
    for question in QUESTIONS:
        scores = []
        for choice in CHOICES:
            prompt, ids = (
                tokenizer(question["question"])["input_ids"],
                tokenizer(question["question"] + choice)["input_ids"],
            )
            with torch.no_grad():
                log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)
            scores.append(sum(float(log_p[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        right += scores.index(max(scores)) == question["answer"]
    return right / len(QUESTIONS)


@with_lm_eval
def test_every_model_is_put_to_a_task_of_ones_own(tasks, kdtrain):  # noqa: F811
    code, out, err = kdtrain("evaluate", "run", "--tasks", "mine", "--include-path", "tasks")
    assert code == 0, err
    found = found_in(tasks / "run")["tasks"]
    folders = {"before": "student", "after": "run", "teacher": "teacher"}
    assert found.keys() == folders.keys()
    for name, folder in folders.items():
        share = own_accuracy(tasks / folder)
        error = math.sqrt(share * (1 - share) / (len(QUESTIONS) - 1))
        assert found[name] == {"mine": {"acc": share, "acc_stderr": pytest.approx(error)}}
    cells = [line.split() for line in out.splitlines() if line.startswith("mine")]
    assert [line[:3] for line in cells] == [["mine", "acc", f"{found['before']['mine']['acc']:.4f}"]]
    assert "is not of type" not in err
    assert found_in(tasks / "run")["models"]["after"]["ce"] is not None


@with_lm_eval
def test_a_task_that_is_not_there_or_is_broken_is_said_before_a_model_is_loaded(tasks, kdtrain, monkeypatch):  # noqa: F811
    monkeypatch.setattr("kdtrain.runs.evaluate.Bench", lambda *_: pytest.fail("models were loaded"))
    code, out, err = kdtrain("evaluate", "run", "--tasks", "mine,nope", "--include-path", "tasks")
    assert (code, out) == (2, "")
    assert "--tasks nope: lm-eval knows no such task, and there is none in tasks" in err
    (tasks / "tasks" / "questions.jsonl").unlink()
    code, _, err = kdtrain("evaluate", "run", "--tasks", "mine", "--include-path", "tasks")
    assert code == 3
    assert "--tasks mine: lm-eval failed: " in err
    assert "questions.jsonl" in err


MISTAKES = {
    "no such folder": (
        ["--tasks", "mine", "--include-path", "nowhere"],
        "--include-path nowhere: there is no such folder",
    ),
    "a folder and no task": (["--include-path", "tasks"], "name some, --tasks NAME"),
    "no name": (["--tasks", ","], "--tasks names no task: for example"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found_at_once(tasks, kdtrain, monkeypatch, mistake):  # noqa: F811
    options, words = MISTAKES[mistake]
    find_spec = importlib.util.find_spec
    installed = lambda name: find_spec("json" if name == "lm_eval" else name)  # noqa: E731
    monkeypatch.setattr("kdtrain.runs.tasks.importlib.util.find_spec", installed)
    code, _, err = kdtrain("evaluate", "run", *options)
    assert code == 2
    assert words in err


def test_without_lm_eval_it_says_how_to_install_it(trained, kdtrain, monkeypatch):  # noqa: F811
    monkeypatch.setattr("kdtrain.runs.tasks.importlib.util.find_spec", lambda name: None)
    code, _, err = kdtrain("evaluate", "run", "--tasks", "arc_easy")
    assert code == 2
    assert "pip install 'kdtrain[eval]'" in err
    assert json.loads((trained / "run" / "status.json").read_text())["state"] == "finished"
