"""What ends a run that samples, as a user sees it: the exit code, and words that say what to do."""

import json
import logging
import sys

import pytest
import torch
import yaml

from kdtrain.cli import app as cli
from tests import tiny

LONG = "word " * 40
ANSWER = {"role": "assistant", "content": "x"}
ANSWERED_BY_TEACHER = "data.train=[{path: train.jsonl, answers: teacher}]"


@pytest.fixture
def kdtrain(monkeypatch, capsys, project):
    """Run a command on a project of two steps: (exit code, stderr)."""
    monkeypatch.chdir(project)
    config = yaml.safe_load((project / "config.yaml").read_text())
    del config["data"]["eval"]
    config["rlhf"] |= {"max_new_tokens": 4, "sft_alpha": 0.0}
    config["training"] |= {"eval_strategy": "no", "max_steps": 2}
    del config["training"]["eval_steps"]
    (project / "config.yaml").write_text(yaml.safe_dump(config))

    def run(*arguments):
        command, *overrides = arguments
        monkeypatch.setattr(sys, "argv", ["kdtrain", command, "config.yaml", *overrides])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code, capsys.readouterr().err

    yield run
    logger = logging.getLogger("kdtrain")
    logger.handlers, logger.propagate = [], True


def write(project, *rows):
    (project / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))


# ---- prompts ---------------------------------------------------------------------------------------------------------


def asked(content):
    return {"messages": [{"role": "user", "content": content}]}


BAD_PROMPTS = {
    "an empty prompt": ({"prompt": ""}, [], "train.jsonl:1: prompt is empty"),
    "white space": ({"prompt": " \n"}, [], "train.jsonl:1: prompt is empty"),
    "no messages": ({"prompt": []}, [], "train.jsonl:1: prompt is empty"),
    "an empty question": (asked(""), [], "train.jsonl:1: messages[0] is an empty user message"),
    "nobody asks": (
        {"messages": [{"role": "system", "content": "Be kind."}]}, [],
        "train.jsonl:1: the conversation ends with a system message: there is nothing to answer",
    ),
    "a prompt that is too long": (
        {"prompt": LONG}, [], "4 of 4 rows are longer than max_length (64 tokens); the longest has 200",
    ),
    "a prompt that is too long, cut": (
        {"messages": [*asked(LONG)["messages"], ANSWER]}, ["data.on_overlength=truncate", "data.train_on=all"],
        "4 rows have no prompt to generate from (rlhf.lmbda is 1.0, rlhf.seq_kd False): it is longer than "
        "data.max_length (64 tokens) and was cut",
    ),
    "nothing left of it": (
        {"prompt": LONG}, ["data.on_overlength=truncate"], "no row is left of 4: 0 are bad and 4 too long",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_prompt_that_cannot_be_continued_is_named_before_the_first_step(project, kdtrain, name):
    row, overrides, message = BAD_PROMPTS[name]
    write(project, row)
    code, err = kdtrain("fit", "rlhf.lmbda=1", *overrides)
    assert code in (2, 3), err  # 2: what the first row of a file shows is found before torch is imported
    assert message in err
    assert "Traceback" not in err
    assert not list((project / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("generates", [["rlhf.lmbda=0.5"], ["rlhf.lmbda=0", "rlhf.seq_kd=true"]])
def test_answers_beyond_a_models_positions_are_refused_before_the_first_step(kdtrain, generates):
    code, err = kdtrain("fit", "rlhf.max_new_tokens=400", *generates)
    assert code == 3, err
    assert "The student was made for 256 positions (its config.json), and 24 of 24 prompts with an answer of" in err
    assert "lower rlhf.max_new_tokens" in err


def test_answers_beyond_a_models_positions_behind_the_longest_prompts_alone_are_a_warning(project, kdtrain):
    write(project, {"prompt": "What?"}, {"prompt": "word " * 11})
    code, err = kdtrain("fit", "rlhf.lmbda=1", "rlhf.max_new_tokens=220", "training.max_steps=1")
    assert code == 0, err
    assert "4 of 8 prompts with an answer of rlhf.max_new_tokens (220) have more tokens" in " ".join(err.split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rlhf.lmbda=0.5"], "rlhf.lmbda: must be 0 (it is 0.5): a cache has no targets for text that does not exist"),
        (["rlhf.seq_kd=true"], "rlhf.seq_kd: must be false (it is true): a cache has no targets for text that"),
    ],
)
def test_a_cache_answers_for_nothing_that_is_generated(project, kdtrain, overrides, message):
    (project / "targets").mkdir()
    code, err = kdtrain("fit", "rlhf.teacher.backend=cache", "rlhf.teacher.path=targets", *overrides)
    assert code == 2, err
    assert message in err


# ---- models that say nothing -----------------------------------------------------------------------------------------


def overflowing(project, name):
    """Its weights are finite, and its logits are not."""
    model = tiny.make_qwen3(seed=1) if name == "student" else tiny.make_qwen3(seed=2, hidden=48)
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
        model.model.embed_tokens.weight.mul_(1e3)
    tiny.save_model(model, tiny.make_tokenizer(), project / name)


SILENT = {
    "student": ("student", ["rlhf.lmbda=1"]),
    "student, half of the steps": ("student", ["rlhf.lmbda=0.5", "rlhf.seq_kd=true", "training.seed=3"]),
    "teacher, seq_kd": ("teacher", ["rlhf.lmbda=0", "rlhf.seq_kd=true"]),
    "student, lora": ("student", ["rlhf.lmbda=1", "tuner.train_type=lora"]),
    "teacher, answers": ("teacher", ["rlhf.lmbda=0", ANSWERED_BY_TEACHER]),
    "teacher, answers alone": ("teacher", ["rlhf.lmbda=0", ANSWERED_BY_TEACHER, "rlhf.llm_kd_weight=0"]),
}


@pytest.mark.parametrize("name", tiny.one_in(2, SILENT))
def test_a_model_whose_logits_are_not_finite_while_it_writes_ends_the_run_and_is_named(project, kdtrain, name):
    side, overrides = SILENT[name]
    overflowing(project, side)
    code, err = kdtrain("fit", *overrides)
    assert code == 5, err
    assert "Traceback" not in err
    assert "this is a bug" not in err
    (message,) = [line for line in err.splitlines() if line.startswith("kdtrain: ")]
    assert side in message
    assert "not finite" in message.lower()
    status = json.loads((project / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    for answers in (project / "run").glob("teacher_answers/*/rank0.jsonl"):
        assert answers.read_text() == ""  # nothing that a next run would train on


def test_a_teacher_whose_logits_are_not_finite_on_samples_ends_the_run(project, kdtrain):
    overflowing(project, "teacher")
    code, err = kdtrain("fit", "rlhf.lmbda=1")
    assert code == 5, err
    assert "the loss term llm_kd_loss is not finite" in err
