"""`kdtrain.fit`: what the command does, as a function."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import kdtrain
from kdtrain.cli.commands.fit import _fit_here
from kdtrain.config import ConfigLoader
from kdtrain.data import Collator
from kdtrain.errors import ConfigError, DataError, Interrupted, PreflightError
from kdtrain.teachers import SelfTeacher, Teacher
from kdtrain.trainer import startup_checks
from tests import tiny
from tests.test_python_class import with_lora
from tests.test_trainer import expected_terms

LORA = ["tuner.train_type=lora", "tuner.lora_rank=4"]


def steps(run):
    return [json.loads(line)["step"] for line in (run / "logging.jsonl").read_text().splitlines()]


def test_it_does_what_the_command_does(project):
    result = kdtrain.fit(project / "config.yaml", LORA, quiet=True)
    _fit_here(
        ConfigLoader.load(project / "config.yaml", [*LORA, f"training.output_dir={project}/other"]),
        None,
        False,
        True,
        "text",
    )
    assert (result.steps, result.run_dir) == (4, project / "run")
    assert result.metrics["loss"] > 0
    assert result.metrics["eval_loss"] > 0
    own, other = (load_file(project / run / "adapter_model.safetensors") for run in ("run", "other"))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    files = [{path.name for path in (project / run).iterdir()} for run in ("run", "other")]
    assert files[0] == files[1] >= {"status.json", "logging.jsonl", "run_config.json", "tokenizer.json"}
    assert steps(project / "run") == [1, 2, 3, 4, 4]
    assert json.loads((project / "run" / "status.json").read_text())["state"] == "finished"


def test_models_rows_and_callbacks_may_be_handed_over(project, student, teacher):
    class Seen(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            self.steps += 1

    seen, before = Seen(), student.lm_head.weight.clone()
    config = {
        "model": {"model": str(project / "student")},
        "rlhf": {"sft_alpha": 0.3, "lmbda": 0.5, "max_new_tokens": 4},
        "training": {"output_dir": str(project / "run"), "max_steps": 3, "per_device_train_batch_size": 2},
    }
    result = kdtrain.fit(
        config, ["training.logging_steps=1"], callbacks=[seen], train_dataset=datasets.Dataset.from_list(tiny.CHATS),
        eval_dataset=tiny.CHATS[:2], model=student, teacher=teacher, quiet=True,
    )  # fmt: skip
    assert seen.steps == result.steps == 3
    assert not torch.equal(student.lm_head.weight, before)
    assert json.loads((project / "run" / "run_config.json").read_text())["data"]["train"][0]["path"] == "train_dataset"
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_options_of_a_source_hold_for_the_rows_that_take_its_place(project):
    sources = [
        "data.train={path: train.jsonl, ce: false, limit: 2, weight: 3, columns: {messages: talk}}",
        "data.train=[{path: train.jsonl, ce: false, limit: 2, weight: 3, columns: {messages: talk}}]",
    ]
    rows = [{"talk": row["messages"]} for row in tiny.CHATS]
    for source in sources:
        options = [source, "rlhf.sft_alpha=1", "training.max_steps=1", f"training.output_dir={project}/{len(source)}"]
        result = kdtrain.fit(project / "config.yaml", options, train_dataset=rows, quiet=True)
        assert result.metrics["sft_loss"] == 0
        kept = json.loads((result.run_dir / "run_config.json").read_text())["data"]["train"]
        assert [(one["path"], one["ce"], one["limit"], one["weight"]) for one in kept] == [
            ("train_dataset", False, 2, 3)
        ]
    evaluated = kdtrain.fit(
        project / "config.yaml", ["data.eval={path: none.jsonl, limit: 1}"], eval_dataset=tiny.CHATS, dry_run=True
    )
    assert evaluated.steps == 0


def test_rows_take_the_place_of_one_source_not_of_several(project):
    with pytest.raises(ConfigError, match=r"train_dataset takes the place of a source, and data\.train has 2 of them"):
        kdtrain.fit(
            project / "config.yaml", ["data.train=[train.jsonl, {path: b.jsonl, weight: 2}]"], train_dataset=tiny.CHATS
        )
    with pytest.raises(ConfigError, match=r"eval_dataset takes the place of a source, and data\.eval has 2"):
        kdtrain.fit(project / "config.yaml", ["data.eval=[a.jsonl, b.jsonl]"], eval_dataset=tiny.CHATS)


def test_options_of_loading_have_no_effect_on_what_is_loaded_already(project, student, teacher, caplog):
    idle = ["model.dtype=float32", "model.init_kwargs={low_cpu_mem_usage: true}", "model.attn_implementation=eager",
            "rlhf.teacher.dtype=float32", "rlhf.teacher_model_init_kwargs={low_cpu_mem_usage: true}",
            "data.train={path: a.jsonl, split: validation}"]  # fmt: skip
    kdtrain.fit(project / "config.yaml", idle, model=student, teacher=teacher, train_dataset=tiny.CHATS, dry_run=True)
    told = [record.message for record in caplog.records if record.name == "kdtrain.runs.python_api"]
    assert told == [
        "model.dtype has no effect: the model is loaded already.",
        "model.attn_implementation has no effect: the model is loaded already.",
        "model.init_kwargs has no effect: the model is loaded already.",
        "rlhf.teacher_model_init_kwargs has no effect: the teacher is loaded already.",
        "rlhf.teacher.dtype has no effect: the teacher is loaded already.",
        "data.train[0].split has no effect: the rows were handed over.",
    ]
    caplog.clear()
    sliced = ["data.train={path: a.jsonl, split: 'train[:50%]'}"]
    kdtrain.fit(project / "config.yaml", [*idle[:-1], *sliced], train_dataset=tiny.CHATS, dry_run=True)
    assert not [record for record in caplog.records if "split" in record.message]
    names = {"model": str(project / "student"), "teacher": str(project / "teacher")}
    kdtrain.fit(project / "config.yaml", idle[:-1], **names, dry_run=True)
    assert not [record for record in caplog.records if record.name == "kdtrain.runs.python_api"]


def test_a_teacher_that_only_gives_targets_is_refused_where_it_has_to_write(project):
    class Targets(Teacher):
        vocab_size = 320

        def targets(self, batch):
            raise AssertionError

    answers = [f"data.train={{path: {project}/train.jsonl, answers: teacher}}"]
    with pytest.raises(ConfigError, match=r"a teacher that can write.*Targets handed over cannot"):
        kdtrain.fit(project / "config.yaml", answers, teacher=Targets(), quiet=True)
    assert not (project / "run").exists()


def test_a_run_is_rehearsed_once(project, monkeypatch):
    made = []
    original = startup_checks._try_scheduler
    monkeypatch.setattr(startup_checks, "_try_scheduler", lambda trainer: (made.append(trainer), original(trainer)))
    kdtrain.fit(project / "config.yaml", ["training.max_steps=1"], quiet=True)
    assert len(made) == 1
    trainer = made[0]
    trainer.train()
    assert len(made) == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [["rlhf.teacher.backend=self", "rlhf.teacher_model=null"], []])
def test_a_self_teacher_is_named_in_the_config_or_handed_over(project, options, caplog):
    teacher = None if options else SelfTeacher("base")
    results = [
        kdtrain.fit(project / "config.yaml", [*LORA, *options, f"training.output_dir={project}/{run}"], quiet=True,
                    teacher=given).metrics["llm_kd_loss"]
        for run, given in (("one", teacher), ("two", SelfTeacher("base")))
    ]  # fmt: skip
    assert results[0] == results[1] > 0
    assert not [record for record in caplog.records if "teacher_model" in record.message]


def test_names_of_models_win_over_the_config(project, monkeypatch):
    monkeypatch.chdir(project)
    (project / "student").rename(project / "pupil")
    (project / "teacher").rename(project / "master")
    assert kdtrain.fit("config.yaml", model="pupil", teacher="master", quiet=True).steps == 4


def test_a_model_from_a_folder_brings_its_tokenizer(project, student):
    model = type(student).from_pretrained(project / "student")
    config = {"rlhf": {"llm_kd_weight": 0}, "training": {"output_dir": str(project / "run"), "max_steps": 1}}
    kdtrain.fit(config, model=model, train_dataset=tiny.CHATS, quiet=True)
    with pytest.raises(ConfigError, match="model was built without a name"):
        kdtrain.fit(config, model=student, train_dataset=tiny.CHATS)


@pytest.fixture
def adapter(project):
    """An adapter of the project's teacher, in a folder of its own; what both give together."""
    from transformers import AutoModelForCausalLM

    model = with_lora(AutoModelForCausalLM.from_pretrained(project / "teacher"))
    model.save_pretrained(project / "adapter")
    return model.eval()


@pytest.mark.parametrize(
    "options", [["rlhf.teacher_model=./adapter"], ["rlhf.teacher_model=./teacher", "rlhf.teacher.adapter=./adapter"]]
)
def test_a_teacher_with_an_adapter_by_its_folder(project, adapter, options, monkeypatch):
    monkeypatch.chdir(project)
    once = ["training.max_steps=1", "training.learning_rate=0", "training.per_device_train_batch_size=2"]
    metrics = kdtrain.fit("config.yaml", [*options, *once, "rlhf.sft_alpha=0"], quiet=True).metrics
    student = type(adapter.get_base_model()).from_pretrained("student")
    batch = Collator(tiny.make_tokenizer())(tiny.CHATS[:2])
    assert metrics["llm_kd_loss"] == pytest.approx(expected_terms(student, adapter, batch)[0], rel=1e-5)


@pytest.mark.slow
def test_a_teachers_answers_are_made_anew_for_another_adapter(project, adapter, monkeypatch):
    monkeypatch.chdir(project)
    options = ["data.train={path: train.jsonl, answers: teacher}", "rlhf.max_new_tokens=3", "training.max_steps=1"]
    kdtrain.fit("config.yaml", [*options, "rlhf.teacher.adapter=./adapter", "training.save_strategy=steps"], quiet=True)
    with_lora(adapter.unload(), seed=6).save_pretrained("adapter")
    told = []
    monkeypatch.setattr("kdtrain.cli.progress.ConsoleReporter.answers", lambda self, done, total: told.append(done))
    options.append("rlhf.teacher.adapter=./adapter")
    kdtrain.fit("config.yaml", options, resume="auto", allow_changes=["rlhf.teacher.adapter"], quiet=True)
    assert told


def test_bad_rows_are_found_before_training_as_those_of_a_file(project):
    with pytest.raises(DataError, match=r"train_dataset:2: "):
        kdtrain.fit(project / "config.yaml", train_dataset=[tiny.CHATS[0], {"messages": []}], quiet=True)
    assert not (project / "run").exists()


def test_errors_are_raised_and_end_nothing(project, student, teacher):
    with pytest.raises(ConfigError, match=r"beta.*1\.5"):
        kdtrain.fit(project / "config.yaml", ["rlhf.beta=1.5"])
    with pytest.raises(ConfigError, match=r"data\.train: no such file or folder: .*gone\.jsonl"):
        kdtrain.fit(project / "config.yaml", ["data.train=gone.jsonl"])
    with pytest.raises(ConfigError, match="path of a YAML file or a mapping"):
        kdtrain.fit(ConfigLoader.load_training_config(project / "config.yaml"))
    with pytest.raises(ConfigError, match="train_dataset must be"):
        kdtrain.fit(project / "config.yaml", train_dataset=3)
    with pytest.raises(ConfigError, match="teacher must be a transformers or PEFT model, or the name of one"):
        kdtrain.fit(project / "config.yaml", teacher=3)
    with pytest.raises(ConfigError, match="backend: self"):
        kdtrain.fit(project / "config.yaml", model=student, teacher=student)
    (project / "run").mkdir()
    (project / "run" / "mine.txt").write_text("")
    with pytest.raises(PreflightError, match="not empty"):
        kdtrain.fit(project / "config.yaml", teacher=teacher)


def test_a_signal_saves_the_state_and_is_raised(project):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        kdtrain.fit(project / "config.yaml", callbacks=[Stop()], quiet=True)
    assert (project / "run" / "checkpoint-2").is_dir()
    assert json.loads((project / "run" / "status.json").read_text())["state"] == "stopped"
    assert kdtrain.fit(project / "config.yaml", resume="auto", quiet=True).steps == 4


def test_it_runs_in_a_thread_and_says_that_it_launches_nothing(project, caplog):
    results = []

    def run():
        results.append(kdtrain.fit(project / "config.yaml", ["launch.num_processes=2"], quiet=True))

    thread = threading.Thread(target=run)
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join()
    assert results[0].steps == 4
    assert any("launch.num_processes: 2 has no effect on kdtrain.fit" in record.message for record in caplog.records)


def test_importing_the_package_and_reading_its_help_imports_no_torch():
    code = (
        "import kdtrain, sys; assert kdtrain.fit.__doc__; print([m for m in sys.modules if m in ('torch', 'pydantic')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("overrides", ["rlhf.beta=0.1", {"rlhf.beta": 0.1}])
def test_overrides_are_a_list(overrides):
    with pytest.raises(ConfigError, match="overrides must be a list such as"):
        kdtrain.fit("config.yaml", overrides)
