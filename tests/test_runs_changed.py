"""A resumed run is compared with the one that made its checkpoint, as a user does it: options, models and data."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import kdtrain as package
from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.runs.folder import MANIFEST
from kdtrain.runs.resume_facts import file_fingerprint
from tests import tiny
from tests.test_cli import edit, kdtrain  # noqa: F401 - a fixture

SAVE = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 2,
    "eval_strategy": "no",
    "report": False,
    "eval_steps": None,
}


@pytest.fixture(scope="module")
def after_two_steps(tmp_path_factory, tokenizer):
    """A project with a run of two steps and their checkpoint."""
    folder = tiny.make_project(tmp_path_factory.mktemp("begun"), tokenizer)
    edit(folder, training=SAVE, data={"eval": None})
    package.fit(folder / "config.yaml", quiet=True)
    return folder


@pytest.fixture
def begun(after_two_steps, project, kdtrain):  # noqa: F811
    """A copy of it at another place, which is the same, and a command that goes on to the third step."""
    shutil.copytree(after_two_steps, project, dirs_exist_ok=True)

    def resume(*options):
        return kdtrain("fit", "config.yaml", "training.max_steps=3", "--resume", "auto", *options)

    return resume


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def insisting(err):
    """The end of the command that a refusal names: what allows it."""
    command = shlex.split(err.strip().splitlines()[-1])
    assert command[:2] == ["kdtrain", "fit"]
    return command[command.index("--allow-changes") :]


def test_a_run_that_is_the_same_goes_on_without_a_word(project, begun):
    code, _, err = begun("training.save_steps=1", "training.logging_steps=2", "data.max_bad_rows=1")
    assert code == 0, err
    assert "otherwise" not in err
    assert "earlier version" not in err


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("rlhf.beta=0.25", "rlhf.beta: 0.5 -> 0.25"),
        ("training.weight_decay=0.1", "training.weight_decay: 0.0 -> 0.1"),
        ("data.max_length=60", "data.max_length: 64 -> 60"),
    ],
)
def test_a_changed_option_is_refused_and_the_command_that_insists_goes_on(project, begun, option, line):
    before = snapshot(project / "run")
    code, _, err = begun(option)
    assert code == 6, err
    assert f"  {line}" in err
    assert snapshot(project / "run") == before
    code, _, err = begun(option, *insisting(err))
    assert code == 0, err
    assert f"Going on otherwise than checkpoint-2 was made: {line}" in err


def test_what_is_allowed_of_the_optimizer_is_what_the_longer_run_goes_on_with(project, begun):
    """The saved state holds options of the optimizer, and the rate 0 that the shorter run ended with."""
    options = ["training.weight_decay=0.1", "training.adam_beta2=0.9", "training.adam_epsilon=1e-6"]
    options += ["training.learning_rate=0.004", "training.max_steps=4"]
    before = (project / "run" / "checkpoint-2" / "model.safetensors").read_bytes()
    code, _, err = begun(*options, "training.save_steps=3", "--allow-changes", "training")
    assert code == 0, err
    groups = torch.load(project / "run" / "checkpoint-3" / "optimizer.pt", weights_only=True)["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert {(group["lr"], group["initial_lr"]) for group in groups} == {(0.001, 0.004)}  # linear, a quarter is left
    assert {(*group["betas"], group["eps"]) for group in groups} == {(0.9, 0.9, 1e-6)}
    records = [json.loads(line) for line in (project / "run" / "logging.jsonl").read_text().splitlines()]
    rates = {record["step"]: record["learning_rate"] for record in records if "learning_rate" in record}
    assert [rates[3], rates[4]] == pytest.approx([0.002, 0.001])
    assert (
        project / "run" / "checkpoint-3" / "model.safetensors"
    ).read_bytes() != before  # which the step was taken with


def test_a_schedule_whose_state_sets_the_rate_takes_no_other(project, kdtrain):  # noqa: F811
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    edit(project, training=SAVE | plateau)
    assert kdtrain("fit", "config.yaml")[0] == 0
    options = ["training.learning_rate=1e-5", "--allow-changes", "training.learning_rate"]
    code, _, err = kdtrain("fit", "config.yaml", "training.max_steps=3", "--resume", "auto", *options)
    assert code == 6, err
    assert "training.learning_rate cannot change here: the state of reduce_lr_on_plateau in the checkpoint" in err


def test_of_many_changes_each_is_named_and_one_allowed_leaves_the_others(project, begun):
    code, _, err = begun("rlhf.beta=0.25", "rlhf.sft_alpha=0.4", "training.seed=7", "--allow-changes", "rlhf")
    assert code == 6, err
    assert "training.seed: 42 -> 7" in err or "training.seed: 0 -> 7" in err
    assert "rlhf.beta:" not in err
    assert insisting(err) == ["--allow-changes", "rlhf,training.seed"]


def test_what_cannot_be_loaded_is_refused_whatever_is_allowed(project, begun):
    code, _, err = begun("tuner.train_type=lora", "--allow-changes", "tuner")
    assert code == 6, err
    assert "tuner.train_type: full -> lora (an adapter and full weights cannot be loaded into each other)" in err
    assert "This cannot be allowed" in err
    assert f"model.model={project / 'run' / 'checkpoint-2'}" in err


def test_an_option_is_refused_before_torch_is_imported(project, begun):
    """By a process of its own, which names the modules that it has imported."""
    code = (
        "import sys; from kdtrain.cli import app\n"
        "sys.argv = ['kdtrain', 'fit', 'config.yaml', 'rlhf.beta=0.25', '--resume', 'auto']\n"
        "try: app.main()\n"
        "except SystemExit as done: print(done.code, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project, check=False)
    assert done.stdout.split() == ["6", "False"], done.stderr


def test_the_checkpoint_is_compared_not_the_run_that_went_on_from_it(project, begun):
    keep = ["training.save_total_limit=null"]
    assert begun("rlhf.beta=0.25", "--allow-changes", "rlhf.beta", "training.save_steps=3", *keep)[0] == 0
    code, _, err = begun("training.max_steps=4", "rlhf.beta=0.25", *keep)  # of checkpoint-3, which was made by it
    assert code == 0, err
    assert "otherwise" not in err
    code, _, err = begun("training.max_steps=4")
    assert code == 6, err
    assert "rlhf.beta: 0.25 -> 0.5" in err
    resume = ["--resume", str(project / "run" / "checkpoint-2")]
    code, _, err = begun("training.max_steps=4", *resume)
    assert code == 0, err


# ---- data ------------------------------------------------------------------------------------------------------------


def test_other_rows_under_the_same_path_are_refused_or_allowed_by_name(project, begun):
    rows = (project / "train.jsonl").read_text().splitlines(keepends=True)
    (project / "train.jsonl").write_text("".join([rows[1], rows[0], *rows[2:]]))
    before = snapshot(project / "run")
    code, _, err = begun()
    assert code == 6, err
    assert f"data.content: data.train ({project / 'train.jsonl'}, " in err
    assert "rows are others" in err
    assert snapshot(project / "run") == before
    assert insisting(err) == ["--allow-changes", "data.content"]
    code, _, err = begun("--allow-changes", "data.content")
    assert code == 0, err
    assert "Going on otherwise than checkpoint-2 was made: data.content: data.train" in err


def test_data_that_were_only_moved_are_the_same_and_the_source_that_changed_is_named(project, kdtrain):  # noqa: F811
    shutil.copy(project / "train.jsonl", project / "more.jsonl")
    edit(project, training=SAVE, data={"eval": None, "train": ["train.jsonl", "more.jsonl"]})
    assert kdtrain("fit", "config.yaml")[0] == 0
    (project / "elsewhere").mkdir()
    for name in ("train", "more"):
        (project / f"{name}.jsonl").rename(project / "elsewhere" / f"{name}-2.jsonl")
    moved = {"train": ["elsewhere/train-2.jsonl", "elsewhere/more-2.jsonl"]}
    edit(project, data=moved)
    resume = ("fit", "config.yaml", "training.max_steps=3", "--resume", "auto")
    with (project / "elsewhere" / "more-2.jsonl").open("a") as file:
        file.write(json.dumps(tiny.CHATS[0]) + "\n")
    code, _, err = kdtrain(*resume)
    assert code == 6, err
    assert f"data.train[1] ({project / 'elsewhere' / 'more-2.jsonl'}, {project / 'more.jsonl'} then)" in err
    assert "24 rows then, 25 now" in err
    assert "data.train[0]" not in err
    shutil.copy(project / "elsewhere" / "train-2.jsonl", project / "elsewhere" / "more-2.jsonl")
    code, _, err = kdtrain(*resume)
    assert code == 0, err
    assert "otherwise" not in err


def test_a_limit_counts_by_the_rows_that_it_leaves(project, begun):
    def data(limit: int) -> str:
        return "data.train=" + json.dumps({"path": str(project / "train.jsonl"), "limit": limit})

    assert begun(data(24))[0] == 0
    code, _, err = begun(data(20), "training.max_steps=4")
    assert code == 6, err
    assert "24 rows then, 20 now" in err


# ---- models ----------------------------------------------------------------------------------------------------------


def test_another_model_under_the_same_path_is_refused(project, begun):
    model = AutoModelForCausalLM.from_pretrained(project / "student")
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(project / "student")
    code, _, err = begun()
    assert code == 6, err
    assert f"{project / 'student'} now)" in err
    assert "model.model: the student is another (" in err
    assert begun(*insisting(err))[0] == 0


def test_another_teacher_is_refused_and_one_that_was_moved_is_the_same(project, begun):
    shutil.copytree(project / "teacher", project / "moved")
    code, _, err = begun("rlhf.teacher_model=./moved")
    assert code == 0, err
    assert "otherwise" not in err
    model = AutoModelForCausalLM.from_pretrained(project / "teacher")
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(project / "moved")
    code, _, err = begun("rlhf.teacher_model=./moved", "training.max_steps=4")
    assert code == 6, err
    assert "rlhf.teacher_model: the teacher is another" in err


def test_another_chat_template_is_refused(project, begun):
    file = next(path for path in (project / "student").iterdir() if tiny.CHATML[:20] in path.read_text(errors="ignore"))
    text = file.read_text()
    changed = text.replace("<|im_start|>", "<|im_start|> ", 1)
    assert changed != text
    file.write_text(changed)
    code, _, err = begun()
    assert code == 6, err
    assert "model.model: the chat template is another" in err


def test_of_large_files_pieces_over_the_whole_length_are_compared(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(200 << 20)
    first = file_fingerprint(path)
    for place in (0, 100 << 20, (200 << 20) - 1):
        with path.open("r+b") as file:
            # Weights that were trained differ everywhere: a piece of a hundredth of the file is met by some.
            file.seek(min(place, (200 << 20) - (4 << 20)))
            file.write(b"\1" * (4 << 20))
        second = file_fingerprint(path)
        assert second != first
        first = second


# ---- checkpoints of earlier versions, and Python ---------------------------------------------------------------------


def test_a_checkpoint_without_facts_is_compared_by_the_config_in_its_folder(after_two_steps, project, begun):
    (project / "run" / "checkpoint-2" / MANIFEST).unlink()
    code, _, err = begun()  # whether what lies here is what lay there is not known
    assert code == 6, err
    assert f"model.model: {after_two_steps / 'student'} -> {project / 'student'}" in err
    config = project / "run" / "run_config.json"
    config.write_text(config.read_text().replace(str(after_two_steps), str(project)))
    code, _, err = begun("rlhf.teacher_model=org/other", "model.trust_remote_code=false")
    assert code == 6, err
    assert "rlhf.teacher_model: " in err
    code, _, err = begun("training.learning_rate=1")
    assert code == 6, err
    assert "training.learning_rate: " in err
    code, _, err = begun()
    assert code == 0, err
    assert "is of an earlier version: its options were compared" in err


def test_a_checkpoint_that_nothing_is_known_of_is_accepted_with_a_line(project, begun):
    (project / "run" / "checkpoint-2" / MANIFEST).unlink()
    (project / "run" / "run_config.json").unlink()
    code, _, err = begun("rlhf.beta=0.25")
    assert code == 0, err
    assert "does not say what it was made from" in err


def test_python_refuses_and_allows_the_same(project, begun, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    options = ["training.max_steps=3", "rlhf.beta=0.25"]
    with pytest.raises(CheckpointError) as error:
        package.fit(project / "config.yaml", options, resume="auto", quiet=True)
    assert "kdtrain.fit(…, allow_changes=['rlhf.beta'])" in str(error.value)
    result = package.fit(project / "config.yaml", options, resume="auto", allow_changes=["rlhf.beta"], quiet=True)
    assert result.steps == 3
    with pytest.raises(ConfigError, match=r"did you mean rlhf\.beta\?"):
        package.fit(project / "config.yaml", options, resume="auto", allow_changes=["rlhf.bta"], quiet=True)


def test_allowing_without_resuming_is_a_mistake(project, kdtrain):  # noqa: F811
    code, _, err = kdtrain("fit", "config.yaml", "--allow-changes", "rlhf.beta")
    assert code == 2
    assert "--allow-changes is of a run that is resumed" in err
    code, _, err = kdtrain("fit", "config.yaml", "--resume", "auto", "--allow-changes", "rlhf.bta")
    assert code == 2
    assert "did you mean rlhf.beta?" in err
