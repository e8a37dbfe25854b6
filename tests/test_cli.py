"""The command line from the outside: exit codes, messages, what is on which stream, and what is left on the disk."""

import json
import logging
import math
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdtrain.cli import app as cli
from kdtrain.errors import KdtrainError
from tests import tiny


@pytest.fixture
def kdtrain(monkeypatch, capsys, project):
    """Run a command in this process, in the project's folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(project)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdtrain", *arguments])
        with pytest.raises(SystemExit) as done:
            cli.main()
        captured = capsys.readouterr()
        return done.value.code, captured.out, captured.err

    yield run
    logger = logging.getLogger("kdtrain")
    logger.handlers, logger.propagate = [], True


def edit(project, **sections):
    """Change keys of the project's config."""
    path = project / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for section, values in sections.items():
        config.setdefault(section, {}).update(values)
    path.write_text(yaml.safe_dump(config))


def files(project):
    return {path.relative_to(project) for path in project.rglob("*")}


# ---- fit -------------------------------------------------------------------------------------------------------------


def test_fit_trains_and_leaves_a_model_that_loads_with_its_tokenizer(project, kdtrain):
    code, out, err = kdtrain("fit", "config.yaml")
    assert code == 0, err
    assert out.startswith("4 steps; best eval_loss ")
    assert "\nsteps    4" in err
    assert not [line for line in err.splitlines() if line != line.rstrip()]
    run = project / "run"
    model = AutoModelForCausalLM.from_pretrained(run)
    before = AutoModelForCausalLM.from_pretrained(project / "student")
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(run).chat_template == tiny.CHATML
    records = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 4]
    assert {"loss", "llm_kd_loss", "sft_loss", "token_accuracy", "teacher_agreement", "epoch"} <= set(records[0])
    assert {"eval_loss", "eval_llm_kd_loss", "eval_sft_loss"} <= set(records[-1])
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert json.loads((run / "run_config.json").read_text())["rlhf"]["sft_alpha"] == 0.3
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pkl")]
    assert "The run has finished 4 steps" in (run / "report.html").read_text(encoding="utf-8")
    (facts,) = (one["facts"] for one in json.loads((run / "report.json").read_text())["runs"])
    assert facts["steps"] == 4
    assert facts["data"]["train"]["rows_kept"] == 24
    assert {"student", "teacher", "loss"} <= facts["plan"].keys()
    assert facts["environment"]["torch"] == torch.__version__


def test_the_weighted_term_is_what_logging_jsonl_holds(project, kdtrain):
    """Scenario: weighted value surfaces in logging.jsonl."""
    kdtrain("fit", "config.yaml", "training.output_dir=whole", "training.max_steps=1", "rlhf.sft_alpha=0")
    kdtrain("fit", "config.yaml", "training.output_dir=half", "training.max_steps=1", "rlhf.sft_alpha=0",
            "rlhf.llm_kd_weight=0.5")  # fmt: skip
    whole, half = (
        json.loads((project / name / "logging.jsonl").read_text().splitlines()[0]) for name in ("whole", "half")
    )
    assert half["llm_kd_loss"] == pytest.approx(0.5 * whole["llm_kd_loss"], rel=1e-6)
    assert half["loss"] == pytest.approx(half["llm_kd_loss"], rel=1e-6)
    assert not [key for key, value in half.items() if value == pytest.approx(whole["llm_kd_loss"], rel=1e-6)]


def test_the_table_at_the_start_says_what_was_derived(project, kdtrain):
    _, _, err = kdtrain("fit", "config.yaml", "--dry-run")
    table = " ".join(err.split())
    assert "28,896 parameters, 28,896 trained, torch.float32" in table
    assert "52,528 parameters" in table
    assert "1 x jsd (beta 0.5, temperature 1) + 0.3 x cross-entropy" in table
    assert "4 rows = 4 x 1 accumulated x 1 process, about 134 tokens" in table


def test_a_dry_run_builds_everything_and_writes_nothing(project, kdtrain):
    before = files(project)
    code, out, err = kdtrain("fit", "config.yaml", "--dry-run")
    assert code == 0, err
    assert out.startswith("dry run passed")
    assert re.search(r"^loss \d.*llm_kd_loss \d.*sft_loss \d.*peak_memory_gib \d", out, re.MULTILINE)
    assert files(project) == before


def test_without_kd_it_is_plain_supervised_training_and_no_teacher_is_loaded(project, kdtrain, monkeypatch):
    monkeypatch.setattr("kdtrain.runs.build.build_teacher", lambda *args, **kwargs: pytest.fail("a teacher was loaded"))
    code, _, err = kdtrain("fit", "config.yaml", "rlhf.llm_kd_weight=0")
    assert code == 0, err
    assert "teacher_model: has no effect" in err or "rlhf.teacher_model" in err
    record = json.loads((project / "run" / "logging.jsonl").read_text().splitlines()[0])
    assert "llm_kd_loss" not in record
    assert record["loss"] == pytest.approx(record["sft_loss"], rel=1e-6)


def test_lora_writes_an_adapter_that_peft_loads(project, kdtrain):
    from peft import AutoPeftModelForCausalLM

    code, _, err = kdtrain("fit", "config.yaml", "tuner.train_type=lora", "tuner.lora_rank=4")
    assert code == 0, err
    assert (project / "run" / "adapter_model.safetensors").exists()
    assert not (project / "run" / "model.safetensors").exists()
    AutoPeftModelForCausalLM.from_pretrained(project / "run")


def test_on_policy_training_runs_from_the_config(project, kdtrain):
    code, _, err = kdtrain("fit", "config.yaml", "rlhf.lmbda=1", "rlhf.max_new_tokens=6")
    assert code == 0, err
    record = json.loads((project / "run" / "logging.jsonl").read_text().splitlines()[0])
    assert record["on_policy_fraction"] == 1


def test_quiet_says_nothing_and_json_says_objects(project, kdtrain):
    code, _, err = kdtrain("fit", "config.yaml", "--quiet", "training.output_dir=a")
    assert code == 0
    repeated, warning = err.splitlines()  # the teacher of these tests has learnt nothing
    assert "24 of 24 rows of data.eval (100.0%) are rows of data.train word for word" in repeated
    assert "The teacher's targets fit the tokens that they are for hardly better" in warning
    code, _, err = kdtrain("fit", "config.yaml", "--log-format", "json", "training.output_dir=b")
    assert code == 0
    events = [json.loads(line) for line in err.splitlines()]
    assert {event["event"] for event in events} == {"data", "plan", "log", "message"}
    _, message = [event for event in events if event["event"] == "message"]
    assert "hardly better" in message["message"], message


def test_several_sources_are_mixed_and_ce_false_leaves_the_teacher_alone(project, kdtrain):
    edit(project, data={"train": [{"path": "train.jsonl", "limit": 8, "ce": False}]})
    code, _, err = kdtrain("fit", "config.yaml")
    assert code == 0, err
    assert "8 of 8 rows" in err
    record = json.loads((project / "run" / "logging.jsonl").read_text().splitlines()[0])
    assert record["sft_loss"] == 0
    assert record["llm_kd_loss"] > 0


# ---- what goes wrong -------------------------------------------------------------------------------------------------

WRONG_CONFIGS = {
    "a negative weight": (["rlhf.llm_kd_weight=-0.1"], "must be non-negative"),
    "a missing teacher": (["rlhf.teacher_model=null"], "rlhf.teacher_model"),
    "a teacher that is no model folder": (["rlhf.teacher_model=./nowhere"], "nowhere"),
    "an unknown key": (["rlhf.lambda=0.5"], "did you mean rlhf.lmbda?"),
    "a key in the wrong section": (["training.beta=0.1"], "move it to rlhf.beta"),
    "not a number": (["rlhf.beta=.nan"], "not a finite number"),
    "a boolean for a number": (["rlhf.beta=true"], "expected a number, got the boolean true"),
    "an unknown log format": (["--log-format", "xml"], "--log-format must be text or json"),
}


@pytest.mark.parametrize("name", WRONG_CONFIGS)
def test_a_wrong_config_is_exit_code_2_with_one_message_and_nothing_written(project, kdtrain, name):
    arguments, message = WRONG_CONFIGS[name]
    before = files(project)
    code, out, err = kdtrain("fit", "config.yaml", *arguments)
    assert code == 2, err
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert files(project) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty"), ("extends: config.yaml\n", "config.yaml -> "), ("- a\n- b\n", "map"), (None, "")],
)
def test_a_file_that_is_no_config_is_exit_code_2(project, kdtrain, text, message):
    if text is None:
        (project / "config.yaml").unlink()
    else:
        (project / "config.yaml").write_text(text)
    for command in ("fit", "validate"):
        code, out, err = kdtrain(command, "config.yaml")
        assert code == 2
        assert message in out + err
        assert "Traceback" not in err


def broken_data(project, text):
    (project / "train.jsonl").write_text(text)


def somebody_elses(project, name="model.safetensors", text="precious"):
    """A file in the output folder that no run of ours has written."""
    path = project / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)


def drop_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50_000])


def begun(project):
    """The output folder of a run that has begun and was killed before its first checkpoint."""
    somebody_elses(project, "status.json", '{"state": "running", "exit_code": null, "rank": 0}')


WRONG_WORLDS = {
    "no rows": (lambda p: broken_data(p, ""), [], "no rows"),
    "a bad row": (lambda p: broken_data(p, '{"messages": 5}\n'), [], "train.jsonl:1"),
    "a missing data file": (lambda p: (p / "train.jsonl").unlink(), [], "train.jsonl"),
    "over-long rows": (lambda p: None, ["data.max_length=8"], "longest"),
    "plain text and generation": (
        lambda p: broken_data(p, '{"text": "The teacher predicts."}\n' * 8),
        ["rlhf.lmbda=0.5"],
        "Set rlhf.lmbda: 0",
    ),
    "prompts without answers": (
        lambda p: broken_data(p, '{"prompt": "What is it?"}\n' * 8),
        [],
        "train.jsonl:1: there is no answer: give one, or let the teacher write it (",
    ),
    "evaluation on prompts without answers": (
        lambda p: (p / "eval.jsonl").write_text('{"prompt": "What is it?"}\n'),
        ["data.eval=eval.jsonl", "rlhf.lmbda=1"],
        "eval.jsonl:1: there is no answer",
    ),
    "nothing that supervises": (
        lambda p: edit(p, data={"train": [{"path": "train.jsonl", "ce": False}]}),
        ["rlhf.llm_kd_weight=0"],
        "Nothing supervises this run",
    ),
    "an optimizer that is not installed": (lambda p: None, ["training.optim=galore_adamw"], "galore"),
    "modules that are not there": (
        lambda p: None,
        ["tuner.train_type=lora", "tuner.target_modules=[foo]"],
        "foo",
    ),
    "a best metric that no evaluation has": (
        lambda p: None,
        [
            "training.load_best_model_at_end=true",
            "training.metric_for_best_model=foo",
            "training.save_strategy=steps",
            "training.save_steps=4",
        ],
        "training.metric_for_best_model: cannot choose the best step: expected one of eval_loss",
    ),
    "a run in the output folder": (
        lambda p: begun(p),
        [],
        "holds a run already. Go on with it by kdtrain fit config.yaml --resume auto, or name another folder "
        "(training.output_dir=",
    ),
    "a run that has finished without a checkpoint": (
        lambda p: somebody_elses(p, "status.json", '{"state": "finished", "exit_code": 0, "rank": 0}'),
        [],
        "no checkpoint to go on from: --resume auto would begin anew and write over it. Name another folder",
    ),
    "a run in the output folder, in a dry run too": (lambda p: begun(p), ["--dry-run"], "holds a run already"),
    "a student without one of its weights": (
        lambda p: drop_weight(p / "student"),
        [],
        "student cannot be used: 1 weight does not fit its architecture, and would be random numbers or left",
    ),
    "a teacher without one of its weights": (
        lambda p: drop_weight(p / "teacher"),
        [],
        "teacher cannot be used: 1 weight",
    ),
    "student's weights cut short": (lambda p: cut(p / "student"), [], "model.model: cannot be loaded: "),
    "teacher's weights cut short": (lambda p: cut(p / "teacher"), [], "rlhf.teacher_model: cannot be loaded: "),
    "an adapter beside the student's weights": (
        lambda p: (p / "student" / "adapter_config.json").write_text("{}"),
        [],
        "for the weights alone, as after a merge, move adapter_config.json and adapter_model.safetensors out of the",
    ),
    "an adapter beside the teacher's weights": (
        lambda p: (p / "teacher" / "adapter_config.json").write_text("{}"),
        [],
        "rlhf.teacher_model: cannot be loaded: an adapter",
    ),
    "an attention that is not installed": (
        lambda p: None,
        ["model.attn_implementation=flash_attention_2"],
        "model.attn_implementation: flash_attention_2 needs the package flash-attn, which is not installed",
    ),
    "an attention without a backward pass": (
        lambda p: None,
        ["model.attn_implementation=flex_attention"],
        "flex_attention has no backward pass on a CPU",
    ),
    "an adapter on a tied head": (
        lambda p: None,
        ["tuner.train_type=lora", "tuner.target_modules=[q_proj, lm_head]"],
        "the weight of lm_head is tied to that of model.embed_tokens",
    ),
    "a full output folder": (
        lambda p: somebody_elses(p),
        [],
        "is not empty, and holds no run of kdtrain. Name another",
    ),
    "a full output folder to resume": (lambda p: somebody_elses(p), ["--resume", "auto"], "holds no run of kdtrain"),
    "a full output folder, a checkpoint elsewhere": (
        lambda p: somebody_elses(p),
        ["--resume", "student"],
        "holds no run of kdtrain",
    ),
    "another program's status": (
        lambda p: somebody_elses(p, "status.json", '{"state": "running"}'),
        ["--resume", "auto"],
        "holds no run of kdtrain",
    ),
    "a model trained elsewhere with checkpoints": (
        lambda p: (somebody_elses(p), (p / "run" / "checkpoint-5").mkdir()),
        ["--resume", "auto"],
        "holds no run of kdtrain",
    ),
    "a best metric that is neither good nor bad": (
        lambda p: None,
        ["training.metric_for_best_model=student_entropy"],
        "training.metric_for_best_model: cannot choose the best step",
    ),
    "a best metric the wrong way round": (
        lambda p: None,
        ["training.metric_for_best_model=llm_kd_loss", "training.greater_is_better=true"],
        "of llm_kd_loss less is better",
    ),
    "fewer rows than a batch": (
        lambda p: None,
        ["training.per_device_train_batch_size=64", "training.dataloader_drop_last=true"],
        "An epoch has 24 rows, and a batch takes 64 (64 x 1 processes)",
    ),
    "a scheduler without what it needs": (
        lambda p: None,
        ["training.lr_scheduler_type=cosine_with_min_lr"],
        "training.lr_scheduler_type: cosine_with_min_lr with lr_scheduler_kwargs {}: ",
    ),
    "an unknown option of the scheduler": (
        lambda p: None,
        ["training.lr_scheduler_kwargs={foo: 1}"],
        "training.lr_scheduler_type: linear with lr_scheduler_kwargs {'foo': 1}: ",
    ),
    "an option of the scheduler that is no number": (
        lambda p: None,
        ["training.lr_scheduler_type=cosine", "training.lr_scheduler_kwargs={num_cycles: many}"],
        "training.lr_scheduler_type: cosine",
    ),
    "an unknown option of the optimizer": (
        lambda p: None,
        ["training.optim=adamw_torch", "training.adam_beta1=7"],
        "training.optim: adamw_torch: ",
    ),
    "offloading on a CPU": (lambda p: None, ["training.activation_offloading=true"], "this run is on a CPU: remove it"),
    "token ids beyond the embedding, without a teacher": (
        lambda p: tiny.save_model(tiny.make_qwen3(seed=1, vocab_size=300), tiny.make_tokenizer(320), p / "student"),
        ["rlhf.llm_kd_weight=0", "rlhf.sft_alpha=1", "rlhf.teacher_model=null"],
        "and the student's embedding has 300 rows",
    ),
    "an output folder that is a file": (lambda p: (p / "run").write_text(""), [], "is a file"),
    "a frozen language model": (lambda p: None, ["tuner.freeze_llm=true"], "nothing is left to train"),
    "a hub model without a network": (lambda p: None, ["model.model=nobody/nothing"], "nobody/nothing"),
}


# What files show before torch is imported.
FOUND_AT_ONCE = {
    *("no rows", "a bad row", "a missing data file", "prompts without answers"),
    *("evaluation on prompts without answers", "student's weights cut short", "teacher's weights cut short"),
    *("an adapter beside the student's weights", "an adapter beside the teacher's weights"),
    *("a best metric that no evaluation has", "a best metric that is neither good nor bad"),
    *("a best metric the wrong way round", "an attention that is not installed", "an optimizer that is not installed"),
}


@pytest.mark.parametrize("name", WRONG_WORLDS)
def test_a_world_that_does_not_fit_is_exit_code_2_or_3_and_nothing_is_written(project, kdtrain, name):
    change, arguments, message = WRONG_WORLDS[name]
    change(project)
    before = files(project)
    code, out, err = kdtrain("fit", "config.yaml", *arguments)
    assert code == (2 if name in FOUND_AT_ONCE else 3), err
    assert message in err
    assert out == ""
    assert "Traceback" not in err
    assert "\\n" not in err  # line breaks of what a library says
    assert files(project) == before


@pytest.mark.parametrize("teacher", ["another size", "another tokenizer of the same size"])
def test_a_vocabulary_mismatch_is_exit_code_3_and_names_both(project, kdtrain, teacher, tokenizer):
    if teacher == "another size":
        other = tiny.make_tokenizer(300)
        tiny.save_model(tiny.make_qwen3(seed=2, vocab_size=300), other, project / "teacher")
        expected = "student has 320 logits and the teacher 300"
    else:
        other = tiny.make_tokenizer()
        other.add_tokens(["<extra>"])
        tiny.save_model(tiny.make_qwen3(seed=2), other, project / "teacher")
        expected = "1 token ids differ"
    code, _, err = kdtrain("fit", "config.yaml")
    assert code == 3, err
    assert expected in err
    assert not (project / "run").exists()


def test_weights_as_a_pickle_are_refused_and_never_loaded(project, kdtrain):
    (project / "teacher" / "model.safetensors").unlink()
    (project / "teacher" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    code, _, err = kdtrain("fit", "config.yaml")
    assert code == 2, err
    assert "rlhf.teacher_model: has no safetensors, only pickled weights" in err
    assert not (project / "ran").exists()


def test_a_nan_ends_with_exit_code_5_and_a_status_that_says_so(project, kdtrain):
    model = AutoModelForCausalLM.from_pretrained(project / "teacher")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(project / "teacher")
    code, _, err = kdtrain("fit", "config.yaml")
    assert code == 5, err
    assert "llm_kd_loss is not finite" in err
    status = json.loads((project / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert not (project / "run" / "model.safetensors").exists()


def test_weights_that_the_last_step_broke_end_with_exit_code_5_and_are_not_saved(project, kdtrain):
    broken = ["training.learning_rate=1e38", "training.max_steps=1", "training.eval_strategy=no", "data.eval=null"]
    code, _, err = kdtrain("fit", "config.yaml", *broken)
    assert code == 5, err
    assert "Not finite after step 1, rank 0: trained weights" in err
    assert not (project / "run" / "model.safetensors").exists()
    evaluated = ["training.learning_rate=1e38", "training.max_steps=1", "training.eval_steps=1"]
    evaluated.append("training.output_dir=evaluated")
    code, _, err = kdtrain("fit", "config.yaml", *evaluated)  # the evaluation after step 1 is the first to see it
    assert code == 5, err
    assert "Not finite after step 1, rank 0: trained weights" in err


def test_an_incomplete_checkpoint_is_refused_by_name_and_skipped_by_auto(project, kdtrain):
    save = ["training.save_strategy=steps", "training.save_steps=2"]
    assert kdtrain("fit", "config.yaml", *save)[0] == 0
    (project / "run" / "checkpoint-4" / "optimizer.pt").unlink()
    code, _, err = kdtrain("fit", "config.yaml", *save, "--resume", "run/checkpoint-4")
    assert code == 6
    assert "optimizer.pt" in err
    code, _, err = kdtrain("fit", "config.yaml", *save, "--resume", "auto")
    assert code == 0, err
    assert "checkpoint-4 is skipped: it lacks optimizer.pt" in err
    assert "checkpoint-2" in err


def test_auto_resumes_nothing_where_no_checkpoint_is_complete(project, kdtrain):
    save = ["training.save_strategy=steps", "training.save_steps=4"]
    assert kdtrain("fit", "config.yaml", *save)[0] == 0
    (project / "run" / "checkpoint-4" / "optimizer.pt").unlink()
    before = (project / "run" / "model.safetensors").stat()
    code, _, err = kdtrain("fit", "config.yaml", *save, "--resume", "auto")
    assert code == 6, err
    assert "no checkpoint in" in err
    assert "checkpoint-4 lacks optimizer.pt. Restore what is missing, or begin anew" in err
    assert (project / "run" / "model.safetensors").stat() == before


@pytest.mark.parametrize("state", ["missing", "empty", "begun"])
def test_auto_begins_anew_only_where_there_is_nothing_to_lose(project, kdtrain, state):
    if state == "begun":
        begun(project)
    elif state == "empty":
        (project / "run").mkdir()
    code, _, err = kdtrain("fit", "config.yaml", "--resume", "auto", "training.max_steps=1")
    assert code == 0, err
    assert "No checkpoint in" in err


@pytest.mark.parametrize("name", ["student", "./teacher/", "run/../student", "link", "STUDENT/../student/run", "."])
@pytest.mark.parametrize("resume", [[], ["--resume", "auto"]])
def test_a_run_never_writes_over_what_it_reads(project, kdtrain, name, resume):
    (project / "link").symlink_to("student")
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    output = f"training.output_dir={name}"
    code, _, err = kdtrain("fit", "config.yaml", "training.eval_strategy=no", "data.eval=null", output, *resume)
    assert code == 2, err
    assert "this run reads, and would write over or into it" in err
    assert kdtrain("validate", "config.yaml", output)[0] == 2
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before


def test_a_finished_run_takes_no_further_step_when_it_is_resumed(project, kdtrain):
    save = ["training.save_strategy=steps", "training.save_steps=4"]  # 4 steps are not an epoch
    assert kdtrain("fit", "config.yaml", *save)[0] == 0
    before = (project / "run" / "model.safetensors").read_bytes()
    (project / "run" / "model.safetensors").unlink()  # killed between the last checkpoint and the final save
    code, out, err = kdtrain("fit", "config.yaml", *save, "--resume", "auto")
    assert code == 0, err
    assert out.startswith("4 steps")
    assert "nothing is left to train" in err
    assert (project / "run" / "model.safetensors").read_bytes() == before


def test_a_run_that_is_half_done_goes_on_with_a_larger_batch_after_the_same_rows(project, kdtrain):
    """24 rows, 12 of them trained: not at its end, for all that six steps of four rows would be an epoch."""
    broken_data(project, "".join(json.dumps(tiny.CHATS[i % 6]) + "\n" for i in range(24)))
    edit(project, training={"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2, "save_steps": 6})
    edit(project, training={"save_strategy": "steps", "eval_strategy": "no", "logging_steps": 1}, data={"eval": None})
    assert kdtrain("fit", "config.yaml")[1].startswith("12 steps")
    shutil.rmtree(project / "run" / "checkpoint-12")
    larger = "training.per_device_train_batch_size=4"
    code, out, err = kdtrain("fit", "config.yaml", larger, "--resume", "auto")
    assert code == 0, err
    assert (
        "A step has 4 rows, and had 2: the run goes on at the next row (epoch 1, row 13 of 24), with step 7 of 9" in err
    )
    assert "nothing is left" not in err
    assert re.search(r"steps +9, of which 6 are done", err)
    assert out.startswith("9 steps")
    records = [json.loads(line) for line in (project / "run" / "logging.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records if record.get("step") in (7, 8, 9)][:3] == [16 / 24, 20 / 24, 1]
    code, out, err = kdtrain("fit", "config.yaml", larger, "--resume", "auto")
    assert code == 0, err
    assert "checkpoint-9 is at step 9 of 9: nothing is left to train" in err


@pytest.mark.parametrize(
    ("rows", "options", "steps", "epochs"),
    [
        (24, {"per_device_train_batch_size": 7, "num_train_epochs": 3}, 12, 3),
        (5, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3}, 6, 3),
        (24, {"max_steps": 5}, 5, 5 / 6),
        (24, {"max_steps": 3, "per_device_train_batch_size": 64}, 3, 3),
    ],
)
def test_the_planned_steps_are_those_that_are_taken(project, kdtrain, rows, options, steps, epochs):
    broken_data(project, "".join(json.dumps(tiny.CHATS[i % 6]) + "\n" for i in range(rows)))
    config = yaml.safe_load((project / "config.yaml").read_text())
    del config["training"]["max_steps"]
    (project / "config.yaml").write_text(yaml.safe_dump(config))
    edit(project, training=options)
    code, out, err = kdtrain("fit", "config.yaml", "training.eval_strategy=no", "data.eval=null")
    assert code == 0, err
    assert f"steps    {steps}, {epochs:.2f} epochs of {rows} rows" in err
    assert out.startswith(f"{steps} steps")


def test_a_config_for_a_gpu_runs_here_and_says_what_changed(project, kdtrain):
    code, _, err = kdtrain("fit", "config.yaml", "training.bf16=true", "training.max_steps=1")
    assert code == 0
    assert "training.bf16: not supported on this device (cpu), float32 is used instead" in err


def test_the_saved_config_keeps_its_cache_and_the_saved_model_stops_where_the_template_ends_a_turn(project, kdtrain):
    student = AutoModelForCausalLM.from_pretrained(project / "student")
    student.generation_config.eos_token_id = 0
    student.save_pretrained(project / "student")
    assert kdtrain("fit", "config.yaml")[0] == 0
    saved = json.loads((project / "run" / "config.json").read_text())
    assert saved["use_cache"] is True
    assert json.loads((project / "run" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_errors_are_objects_too_in_a_json_log(project, kdtrain):
    (project / "train.jsonl").write_text("")
    code, _, err = kdtrain("fit", "config.yaml", "--log-format", "json")
    assert code == 2
    assert json.loads(err.splitlines()[-1])["level"] == "CRITICAL"


def test_an_interruption_before_training_says_that_nothing_was_saved(project, kdtrain, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdtrain.runs.build.load_processing", interrupt)
    code, _, err = kdtrain("fit", "config.yaml")
    assert code == 130
    assert "nothing more was saved" in err


def test_a_bug_is_exit_code_1_with_a_traceback(project, kdtrain, monkeypatch):
    monkeypatch.setattr("kdtrain.runs.fit.fit", lambda *args, **kwargs: 1 / 0)
    code, _, err = kdtrain("fit", "config.yaml")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert "this is a bug" in err


# ---- the other commands ----------------------------------------------------------------------------------------------


def test_validate_tells_every_problem_at_once(project, kdtrain):
    edit(project, rlhf={"lambda": 0.5, "llm_kd_weight": -1}, training={"beta": 0.1})
    code, out, _ = kdtrain("validate", "config.yaml")
    assert code == 2
    assert "config.yaml: 3 errors" in out
    code, out, _ = kdtrain("validate", "config.yaml", "--json")
    assert code == 2
    assert {finding["path"] for finding in json.loads(out)} == {"rlhf.lambda", "rlhf.llm_kd_weight", "training.beta"}


def test_validate_of_a_good_file(kdtrain):
    assert kdtrain("validate", "config.yaml") == (0, "config.yaml: no problems found\n", "")


def test_validate_deep_asks_the_teacher(kdtrain):
    code, out, err = kdtrain("validate", "config.yaml", "--deep")
    assert code == 0, err
    assert "1. config.yaml:" in out
    assert "hardly better" in out + err


def test_preview_shows_rows_and_needs_no_weights(project, kdtrain):
    for weights in project.rglob("*.safetensors"):
        weights.unlink()
    code, out, err = kdtrain("preview", "config.yaml", "--rows", "1")
    assert (code, err) == (0, "")
    assert "train.jsonl:1  train, chat, 31 tokens, 6 supervised, a prompt of 24\n" in out
    assert "  ⟦the path<|im_end|>⟧⏎\n" in out
    code, out, err = kdtrain("preview", "config.yaml", "--rows", "2", "--json", "data.train_on=last")
    assert (code, err) == (0, "")
    assert [row["split"] for row in json.loads(out)[:-1]] == ["train", "train", "eval", "eval"]


@pytest.mark.parametrize("name", [name for name in WRONG_CONFIGS if name != "an unknown log format"])
def test_preview_of_a_wrong_config_is_exit_code_2(project, kdtrain, name):
    arguments, message = WRONG_CONFIGS[name]
    code, out, err = kdtrain("preview", "config.yaml", *arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("name", ["no rows", "a missing data file", "a hub model without a network"])
def test_preview_of_what_cannot_be_read_is_exit_code_2_or_3(project, kdtrain, name):
    change, arguments, message = WRONG_WORLDS[name]
    change(project)
    code, out, err = kdtrain("preview", "config.yaml", *arguments)
    assert (code, out) == (2 if name in FOUND_AT_ONCE else 3, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("name", ["a bad row", "over-long rows", "prompts without answers", "nothing that supervises"])
def test_preview_shows_what_fit_refuses_and_says_so(project, kdtrain, name):
    change, arguments, message = WRONG_WORLDS[name]
    change(project)
    code, out, err = kdtrain("preview", "config.yaml", *arguments)
    assert code == 0, err
    assert "kdtrain fit would stop: " in out
    assert message in out


def test_preview_of_a_negative_number_of_rows_is_exit_code_2(kdtrain):
    code, out, err = kdtrain("preview", "config.yaml", "--rows", "-1")
    assert (code, out) == (2, "")
    assert "--rows" in err


def test_an_interrupted_preview_ends_without_a_traceback(kdtrain, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kdtrain.runs.preview.load_processing", interrupt)
    code, out, err = kdtrain("preview", "config.yaml")
    assert (code, out) == (130, "")
    assert "Traceback" not in err


def test_schema_describes_every_option(kdtrain):
    code, out, _ = kdtrain("schema")
    schema = json.loads(out)
    assert code == 0
    assert {"model", "tuner", "data", "rlhf", "custom", "training", "launch", "extends"} <= set(schema["properties"])


def test_env_tells_secrets_as_set_or_unset_only(kdtrain, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    for arguments in ([], ["--json"]):
        code, out, err = kdtrain("env", *arguments)
        assert code == 0
        assert "secretsecret" not in out + err
    facts = json.loads(out)
    assert facts["secrets"]["HF_TOKEN"] == "set"
    assert facts["packages"]["torch"].startswith("2.")


def processor_time():
    """Of the processes that this one has waited for, seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["validate", "config.yaml"],
        *(tiny.slow(other) for other in (["fit", "--help"], ["preview", "--help"], ["schema"], ["env"])),
    ],
)
def test_what_needs_no_torch_answers_in_a_second_without_it(project, arguments):
    code = (
        "import sys\nsys.argv = ['kdtrain'] + sys.argv[1:]\nfrom kdtrain.cli import main\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules, 'trl' in sys.modules, file=sys.stderr)"
    )
    seconds = [math.inf]
    while min(seconds) >= 2 and len(seconds) <= 3:  # of processor time, which a busy machine needs little more of
        started = processor_time()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=project, capture_output=True, text=True, check=False
        )
        seconds.append(processor_time() - started)
        assert done.returncode == 0, done.stderr
        assert done.stderr.endswith("False False\n")
        assert done.stdout
    assert min(seconds) < 2  # a second, and as much for a slow machine


def test_every_error_class_has_a_documented_exit_code():
    def classes(base):
        yield base
        for child in base.__subclasses__():
            yield from classes(child)

    documented = (Path(cli.__file__).parents[1] / "errors.py").read_text()
    for cls in classes(KdtrainError):
        if cls.__module__ == "kdtrain.errors":
            assert f"{cls.__name__} " in documented
