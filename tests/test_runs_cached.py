"""Whole runs from a cache: the same numbers as from its teacher, and what is refused before the first step."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import kdtrain
from kdtrain.config import ConfigLoader
from kdtrain.data import Collator
from kdtrain.errors import ConfigError, DataError, PreflightError, TeacherError
from kdtrain.runs import build
from kdtrain.teachers import CachedTeacher, LocalTeacher
from tests import tiny
from tests.test_runs_deep import own_logging, validate  # noqa: F401 - a fixture
from tests.test_runs_served import AfterStep, status, weights
from tests.test_teachers_cached import losses, train
from tests.test_trainer import TopKTeacher
from tests.tiny_cache import MODES, cache_of, form_of, write_cache

ROOT = Path(__file__).parents[1]
CACHE = "rlhf.teacher.backend=cache"


def chat(i):
    """A row of its own for each number."""
    question = {"role": "user", "content": f"What is {i}?"}
    return {"messages": [question, {"role": "assistant", "content": f"{i} it returns " * (1 + i % 3)}]}


def write_rows(path, numbers):
    path.write_text("".join(json.dumps(chat(i)) + "\n" for i in numbers))


@pytest.fixture
def config(project, monkeypatch):
    """A run of ten steps on 40 different rows, evaluated on 8 others."""
    monkeypatch.chdir(project)  # paths on the command line begin here
    content = yaml.safe_load((project / "config.yaml").read_text())
    content["training"] |= {"max_steps": 10, "eval_steps": 5}
    write_rows(project / "train.jsonl", range(40))
    write_rows(project / "eval.jsonl", range(100, 108))
    (project / "config.yaml").write_text(yaml.safe_dump(content))
    return project / "config.yaml"


def fit(config, *overrides, output="run", **options):
    """The records and the weights of a run."""
    folder = config.parent / output
    kdtrain.fit(config, [*overrides, f"training.output_dir={folder}"], quiet=True, **options)
    records = [json.loads(line) for line in (folder / "logging.jsonl").read_text().splitlines()]
    return records, weights(folder)


def from_cache(folder, *more):
    return (CACHE, f"rlhf.teacher.path={folder}", *more)


# ---- the same numbers ------------------------------------------------------------------------------------------------


def test_ten_steps_from_hidden_states_are_those_of_the_teacher_bit_for_bit(config, monkeypatch):
    """Written in the batches of training: another number of rows beside it moves the last bit of a row's product."""
    expected, of_teacher = fit(config, output="own")
    cache = cache_of(config, config.parent / "cache", "hidden", together=4)
    shutil.rmtree(config.parent / "teacher")  # nothing of it is needed any more
    monkeypatch.setattr(build, "build_teacher", lambda *args, **kwargs: pytest.fail("a teacher is loaded"))
    found, of_cache = fit(config, *from_cache(cache))
    assert torch.equal(of_cache, of_teacher)
    assert losses(found) == losses(expected)
    assert all("teacher_wait_fraction" in record for record in found if "loss" in record)
    assert len([record for record in found if "eval_llm_kd_loss" in record]) == 2


def test_ten_steps_from_every_token_of_the_vocabulary_are_those_of_the_teacher(config):
    expected, _ = fit(config, output="own")
    cache = cache_of(config, config.parent / "cache", "topk", entries=320)
    found, _ = fit(config, *from_cache(cache))
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"beta": 0.5}, {"tail": "renormalize"}], ids=["", "beta", "renormalize"])
def test_the_quantised_top_50_give_the_loss_of_the_top_50_themselves(tmp_path, tokenizer, options):
    own = TopKTeacher(tiny.make_qwen3(seed=2, hidden=48), 50)
    collate = Collator(tokenizer, row_keys=True)
    form = replace(form_of("topk", own, entries=50), exact=False)
    whole = LocalTeacher(tiny.make_qwen3(seed=2, hidden=48))
    teacher = CachedTeacher(write_cache(tmp_path / "cache", whole, tiny.CHATS, collate, form))
    for mine, theirs in zip(*(kd_losses(tmp_path, one, options) for one in (teacher, own)), strict=True):
        assert abs(mine - theirs) <= (1e-3 * theirs if theirs >= 0.05 else 5e-5)
    teacher.close()


def kd_losses(folder, teacher, options):
    records, _ = train(folder, teacher, tiny.CHATS, max_steps=4, learning_rate=1e-3, **{"beta": 0.0, **options})
    return [record["llm_kd_loss"] for record in records if "llm_kd_loss" in record]


def test_drawn_tokens_train(config):
    cache = cache_of(config, config.parent / "cache", "sample")
    found, _ = fit(config, *from_cache(cache, "rlhf.beta=0"))
    assert len(losses(found)) == 12
    assert all(loss > 0 for loss in losses(found))


DATA = {
    "shuffled, several epochs, accumulated": [
        "training.train_sampling_strategy=random", "training.per_device_train_batch_size=3", "training.max_steps=12",
        "training.gradient_accumulation_steps=2",
    ],
    "a share of the rows to evaluate on": ["data.eval=20%", "training.eval_steps=4"],
    "mixed sources of other weights": [
        "data.train=[{path: train.jsonl, weight: 0.5, ce: false}, {path: eval.jsonl, weight: 2}]", "data.eval=null",
        "training.eval_strategy=no", "training.eval_steps=null", "training.train_sampling_strategy=random",
    ],
    "rows that are cut": ["data.max_length=36", "data.on_overlength=truncate"],
}  # fmt: skip


@pytest.mark.parametrize("name", tiny.one_in(2, DATA))
def test_every_row_gets_its_own_targets(config, name):
    expected, _ = fit(config, *DATA[name], output="own")
    cache = cache_of(config, config.parent / "cache", "hidden", DATA[name])
    found, _ = fit(config, *DATA[name], *from_cache(cache))
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)


def test_a_file_whose_rows_were_reordered_repeated_and_shortened_needs_no_new_cache(config):
    cache = cache_of(config, config.parent / "cache", "hidden")
    write_rows(config.parent / "other.jsonl", [7, 3, 3, 39, 0, *range(20, 30), 104, 3])
    expected, _ = fit(config, "data.train=other.jsonl", output="own")
    found, _ = fit(config, "data.train=other.jsonl", *from_cache(cache))
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)


def test_a_resumed_run_equals_the_uninterrupted_one(config):
    options = from_cache(
        cache_of(config, config.parent / "cache", "topk"),
        "training.save_strategy=steps",
        "training.save_steps=3",
        "training.train_sampling_strategy=random",
    )
    _, expected = fit(config, *options, output="whole")

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    with pytest.raises(Stop):
        fit(config, *options, callbacks=[AfterStep(7, stop)])
    records, found = fit(config, *options, resume="auto")
    assert torch.equal(found, expected)
    assert records[-1]["step"] == 10


@pytest.mark.slow
def test_two_real_processes_train_as_one_does(config):
    cache = cache_of(config, config.parent / "cache", "hidden")
    expected, _ = fit(config, *from_cache(cache), output="one")
    options = [*from_cache(cache), "launch.num_processes=2", "training.per_device_train_batch_size=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kdtrain", "fit", str(config), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=config.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (config.parent / "run" / "logging.jsonl").read_text().splitlines()]
    assert losses(records) == pytest.approx(losses(expected), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_cache_that_the_command_writes_is_trained_from_by_the_same_file(config, mode):
    folder = config.parent / "cache"
    command = [sys.executable, "-m", "kdtrain", "cache", str(config), "--out", str(folder), "--mode", mode]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    if mode == "sample":
        assert all(loss > 0 for loss in losses(fit(config, *from_cache(folder, "rlhf.beta=0"))[0]))
        return
    found, _ = fit(config, *from_cache(folder))
    expected, _ = fit(config, output="own")
    # Its 50 most likely tokens are quantised; hidden states are those of the teacher.
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4 if mode == "hidden" else 0.2)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(config):
    return cache_of(config, config.parent / "cache", "topk")


@pytest.fixture
def refuse_students(monkeypatch):
    """What is wrong is found before a model is loaded."""
    monkeypatch.setattr(build, "load_student", lambda *args, **kwargs: pytest.fail("the student is loaded"))


@pytest.mark.usefixtures("refuse_students")
def test_all_in_which_a_run_differs_is_named_in_one_error(config, cache):
    folder = config.parent
    tiny.save_model(tiny.make_qwen3(seed=5, hidden=48), tiny.make_tokenizer(), folder / "other")
    with pytest.raises(PreflightError) as caught:
        fit(
            config, *from_cache(cache), "rlhf.teacher_model=./other", "data.train_on=last",
            "data.chat_template_kwargs={a: 1}", "rlhf.teacher.dtype=bfloat16",
            "rlhf.teacher.chat_template_kwargs={b: 2}",
        )  # fmt: skip
    text = str(caught.value)
    assert caught.value.exit_code == 3
    for part in (
        str(cache),
        "another data.train_on: assistant. This run has: last.",
        "another data.chat_template_kwargs: none. This run has: ",
        f"another teacher (rlhf.teacher_model): {folder}/teacher. This run has: {folder}/other.",
        "another rlhf.teacher.dtype: float32. This run has: bfloat16.",
        "another rlhf.teacher.chat_template_kwargs: none. This run has: ",
        "kdtrain cache CONFIG --out DIR",
    ):
        assert part in text, text


@pytest.mark.usefixtures("refuse_students")
def test_a_tokenizer_or_template_that_changed_is_named(config, cache):
    path = config.parent / "student" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> "))
    with pytest.raises(PreflightError, match="made with another chat template: 299 characters"):
        fit(config, *from_cache(cache))


@pytest.mark.usefixtures("refuse_students")
def test_rows_that_are_not_in_the_cache_are_counted_and_the_first_are_placed(config, cache):
    write_rows(config.parent / "train.jsonl", [*range(20), 50, 3, 51, 52, 53])
    write_rows(config.parent / "eval.jsonl", [100, 200])
    with pytest.raises(DataError) as caught:
        fit(config, *from_cache(cache))
    text = str(caught.value)
    assert "4 of 25 rows of data.train have no targets there" in text
    assert [f"train.jsonl, row {row} " in text for row in (20, 21, 22, 23, 24)] == [True, False, True, True, False]
    assert "1 of 2 rows of data.eval have no targets there" in text
    assert "eval.jsonl, row 1 " in text
    assert "added or changed after it was written" in text
    write_rows(config.parent / "train.jsonl", range(60, 80))
    with pytest.raises(DataError, match="Not one of them is there: it was written from other files"):
        fit(config, *from_cache(cache), "data.eval=null", "training.eval_strategy=no", "training.eval_steps=null")


def test_rows_to_evaluate_on_need_no_targets_where_evaluation_asks_no_teacher(config, cache):
    write_rows(config.parent / "eval.jsonl", [200, 201])
    with pytest.raises(DataError):
        fit(config, *from_cache(cache))
    records, _ = fit(config, *from_cache(cache), "rlhf.eval_kd=false", "training.max_steps=5")
    assert [("eval_llm_kd_loss" in record) for record in records if "eval_loss" in record] == [False]


def test_rows_without_an_answer_need_no_targets(config):
    """Their answer is cut off: they supervise nothing, in the cache as in training."""
    long = {"messages": [{"role": "user", "content": "the path " * 30}, {"role": "assistant", "content": "two"}]}
    with (config.parent / "train.jsonl").open("a") as file:
        file.write(json.dumps(long) + "\n")
    options = ["data.on_overlength=truncate", "data.max_length=60"]
    cache = cache_of(config, config.parent / "cache", "topk", options)
    fit(config, *options, *from_cache(cache))


def test_lmbda_and_an_incomplete_cache_are_found_before_torch(config, cache):
    manifest = cache / "manifest.json"
    content = json.loads(manifest.read_text())
    with pytest.raises(ConfigError, match="a cache has no targets for text that does not exist yet"):
        ConfigLoader.load_training_config(str(config), overrides=[*from_cache(cache), "rlhf.lmbda=0.5"])
    manifest.write_text(json.dumps({**content, "complete": False}))
    with pytest.raises(ConfigError, match="not complete"):
        ConfigLoader.load_training_config(str(config), overrides=list(from_cache(cache)))


def test_a_manifest_of_another_version_is_refused(config, cache):
    manifest = cache / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 99}))
    with pytest.raises(DataError, match="version 99"):
        fit(config, *from_cache(cache))


@pytest.mark.parametrize("kind", ["cut", "pickle", "gone"])
def test_a_damaged_file_is_named_before_training_and_nothing_in_it_is_run(config, cache, kind):
    path = sorted(cache.glob("shard-*"))[1]

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(cache / "was run"),)

    if kind == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Runs()))
    else:
        path.unlink()
    with pytest.raises(DataError) as caught:
        fit(config, *from_cache(cache))
    assert (path.name if kind != "gone" else "has 40 rows where 48 were written") in str(caught.value)
    assert not (config.parent / "run").exists()
    assert not (cache / "was run").exists()


def test_a_row_that_is_damaged_on_the_disk_ends_the_run_with_its_state_saved(config, cache):
    """Rows are checked when they are read: to check a cache of gigabytes first would be to read it twice."""
    path = sorted(cache.glob("shard-*"))[3]  # rows 24 to 31: of the seventh and eighth step
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(TeacherError, match=r"The state of step 7 is saved: go on with .*resume") as caught:
        fit(config, *from_cache(cache))
    assert path.name in str(caught.value)
    assert status(config.parent)["exit_code"] == 4
    assert (config.parent / "run" / "checkpoint-7").is_dir()
    cache_of(config, cache, "topk")
    assert losses(fit(config, *from_cache(cache), resume="auto")[0])[-1] > 0


def test_a_run_never_writes_into_the_cache_that_it_reads(config, cache):
    with pytest.raises(ConfigError, match=r"would write over or into it: the teacher's cache"):
        ConfigLoader.load_training_config(
            str(config), overrides=[*from_cache(cache), f"training.output_dir={cache / 'run'}"]
        )


# ---- validate --deep -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_deep_check_reads_a_few_rows_of_the_cache(config, mode):
    folder = cache_of(config, config.parent / "cache", mode)
    shutil.rmtree(config.parent / "teacher")
    content = yaml.safe_load(config.read_text())
    code, out, _ = validate(config.parent, content, *from_cache(folder, "rlhf.beta=0"))
    assert code == 0, out
    assert "warning: rlhf.teacher.path: The teacher's targets fit" in out  # its teacher has learnt nothing
    assert "nats per token, against" in out


def test_what_would_end_the_run_is_an_error_at_the_path_of_the_cache(config, cache):
    content = yaml.safe_load(config.read_text())
    code, out, _ = validate(config.parent, content, *from_cache(cache, "data.train_on=last"))
    assert code == 3
    assert "error: rlhf.teacher.path: The cache" in out
    assert "another data.train_on: assistant. This run has: last." in out
    assert "\\n" not in out
    write_rows(config.parent / "train.jsonl", [1, 70])
    code, out, _ = validate(config.parent, content, *from_cache(cache))
    assert code == 3
    assert "1 of 2 rows of data.train have no targets there" in out
