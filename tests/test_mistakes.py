"""Typical mistakes, and what is said of them: what is wrong, where, and what to do, from the message alone.

Each is made in a project that works, and is found by `validate` and by `fit` before torch does anything.
"""

import json
import re
import shutil
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors import SafetensorError

from kdtrain.cli import app as cli
from kdtrain.cli import environment
from kdtrain.config import check_config
from kdtrain.config.best_step import DEFAULT_STEPS
from kdtrain.config.model_pair import parameters
from kdtrain.config.run_files import trackers
from kdtrain.errors import CheckpointError, PreflightError
from kdtrain.models.hub import require_model
from kdtrain.models.loading import load_model
from kdtrain.preflight.files import all_files, preview_files
from kdtrain.runs.failures import readable_failures
from kdtrain.runs.resume import resume_command
from tests import tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 118024\n"
WEIGHTS = "student/model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    return tiny.make_project(tmp_path_factory.mktemp("made") / "project", tokenizer)


@pytest.fixture
def project(made, tmp_path, monkeypatch):
    """A copy of a project that works; the current folder."""
    folder = shutil.copytree(made, tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


def edit(**sections):
    """A change of the config: keys of sections, or whole sections that are no maps."""

    def change(project):
        path = project / "config.yaml"
        config = yaml.safe_load(path.read_text())
        for name, values in sections.items():
            if isinstance(values, dict) and isinstance(config.get(name, {}), dict):
                config.setdefault(name, {}).update(values)
            else:
                config[name] = values
        path.write_text(yaml.safe_dump(config))

    return change


def training(**values):
    return edit(training=values)


BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 4}


def write(name, text):
    return lambda project: (project / name).write_text(text)


def rows(*given):
    return write("train.jsonl", "".join(json.dumps(row) + "\n" for row in given))


def remove(*names):
    return lambda project: [(project / name).unlink() for name in names]


def rename(old, new):
    return lambda project: (project / old).rename(project / new)


def both(*changes):
    return lambda project: [change(project) for change in changes]


def an_adapter(project):
    """An adapter in the student's place, on a base that is not there."""
    remove("student/config.json", WEIGHTS)(project)
    write("student/adapter_config.json", json.dumps({"base_model_name_or_path": "/nowhere/base"}))(project)


ANSWER = {"role": "assistant", "content": "y"}
TURNS = [{"role": "user", "content": "x"}, ANSWER]
# Name -> the mistake, and what is said: the option (or the place), what is wrong, and what to do.
MISTAKES = {
    # What the config names.
    "a data file that is not there": (
        edit(data={"train": "trian.jsonl"}),
        ["data.train: no such file or folder: ", "/trian.jsonl", "did you mean train.jsonl?"],
    ),
    "a data folder that is not there": (
        edit(data={"train": "dta/train.jsonl"}),
        ["data.train: no such file or folder: ", " has no dta", "the folder of the config file"],
    ),
    "one of several data files that is not there": (
        edit(data={"train": ["train.jsonl", {"path": "more.jsonl"}]}),
        ["data.train[1]: no such file or folder", "more.jsonl"],
    ),
    "columns of question and answer": (
        rows({"question": "a", "answer": "b"}),
        ["data.train: ", "but question, answer", "columns: {instruction: question, output: answer}}"],
    ),
    "columns of other names": (
        rows({"Problem": "a", "target": "b", "id": 1}),
        ["but Problem, target, id", "{instruction: Problem, output: target}"],
    ),
    "a question beside an output": (
        rows({"question": "a", "output": "b"}),
        ["{instruction: question, output: output}", "{prompt: question, completion: output}"],
    ),
    "columns of which nothing can be guessed": (
        rows({"foo": "a", "bar": "b"}),
        ["but foo, bar", "{instruction: …, output: …}"],
    ),
    "a column that is mapped to none": (
        edit(data={"train": {"path": "train.jsonl", "columns": {"messages": "mesages"}}}),
        ["has the columns messages, not those of columns (messages: mesages)", "did you mean messages?"],
    ),
    "a list of messages in every line": (
        rows(TURNS, TURNS),
        ["train.jsonl:1: a list of messages", 'write it as an object with a column, {"messages": [...]}'],
    ),
    "a prompt without an answer": (
        rows({"prompt": "x"}),
        ["train.jsonl:1: there is no answer", "answers: teacher", "rlhf.lmbda: 1"],
    ),
    "no rows": (write("train.jsonl", "\n"), ["data.train: ", "train.jsonl has no rows"]),
    "a workbook": (rename("train.jsonl", "train.xlsx"), ["no such file or folder", "did you mean train.xlsx?"]),
    "a pickle": (
        both(write("rows.pkl", "x"), edit(data={"train": "./rows.pkl"})),
        ["data.train: ", ".pkl files can run code", "Use .json, .jsonl"],
    ),
    "data that is a pointer": (write("train.jsonl", POINTER), ["a git-lfs pointer, not the data: run git lfs pull"]),
    "a chat for a student without a template": (
        remove("student/chat_template.jinja"),
        ["model.model: has no chat template", "chat_template.jinja", "instruction-tuned"],
    ),
    "a tracker misspelt": (
        training(report_to="tensorbord"),
        ["training.report_to: expected one of tensorboard", "did you mean 'tensorboard'?"],
    ),
    "a tracker that is not installed": (
        training(report_to=["dvclive"]),
        ["training.report_to[0]: dvclive needs the package dvclive", "pip install dvclive, or remove it"],
    ),
    "a DeepSpeed file that is not there": (
        training(deepspeed="zero9.json"),
        ["training.deepspeed: no such file: ", "/zero9.json", "the folder of the config file"],
    ),
    "an FSDP file that is no JSON": (
        both(write("fsdp.json", "{"), training(fsdp="full_shard", fsdp_config="fsdp.json")),
        ["training.fsdp_config: ", "fsdp.json is not valid JSON (line 1)", "correct the file"],
    ),
    "an accelerate file that is not there": (
        edit(launch={"config_file": "fsdp.yaml"}),
        ["launch.config_file: no such file: ", "/fsdp.yaml"],
    ),
    # Models.
    "a model folder misspelt": (
        both(
            lambda p: (p / "models").mkdir(),
            rename("student", "models/student"),
            edit(model={"model": "models/studnt"}),
        ),
        ["model.model: no such folder: ", "/models/studnt", "did you mean ", "/models/student?"],
    ),
    "a model folder without config.json": (
        remove("student/config.json"),
        ["model.model: not a model folder, it has no config.json: ", "give a model folder or a hub id"],
    ),
    "the folder above the model": (
        both(lambda p: (p / "up").mkdir(), rename("student", "up/inner"), edit(model={"model": "./up"})),
        ["model.model: not a model folder", "name the folder in it that has one: ", "/up/inner"],
    ),
    "a model folder without a tokenizer": (
        remove("student/tokenizer.json", "student/tokenizer_config.json"),
        ["model.model: has no tokenizer: ", "save the tokenizer that it was trained with beside it"],
    ),
    "a model folder without weights": (
        remove(WEIGHTS),
        ["model.model: has no weights, neither model.safetensors", "copy or download them too"],
    ),
    "weights that are a pointer": (
        write("teacher/model.safetensors", POINTER),
        ["rlhf.teacher_model: cannot be loaded: model.safetensors is a git-LFS pointer", "run git lfs pull"],
    ),
    "weights in a pickle": (
        rename(WEIGHTS, "student/pytorch_model.bin"),
        ["model.model: has no safetensors, only pickled weights", "save_pretrained("],
    ),
    "weights as GGUF": (
        rename(WEIGHTS, "student/q4.gguf"),
        ["model.model: holds its weights as GGUF (q4.gguf)", "the model that it was converted from"],
    ),
    "weights as their authors keep them": (
        rename(WEIGHTS, "student/consolidated.safetensors"),
        ["in the layout of their authors (consolidated.safetensors)", "model*.safetensors"],
    ),
    "an adapter whose base is gone": (an_adapter, ["model.model: ", "the base model /nowhere/base is not there"]),
    "the student as its own teacher": (
        edit(rlhf={"teacher_model": "./student", "sft_alpha": 0}),
        ["rlhf.teacher_model: is the student itself (model.model)", "name the larger model that is to teach"],
    ),
    # Options that do not fit each other.
    "a best step by what no evaluation has": (
        training(**BEST, metric_for_best_model="eval_kl"),
        [
            "training.metric_for_best_model: cannot choose the best step: expected one of eval_loss",
            "eval_llm_kd_loss",
            "got text 'eval_kl'",
        ],
    ),
    "a best step that would be the worst": (
        training(**BEST, metric_for_best_model="eval_loss", greater_is_better=True),
        ["training.greater_is_better: true would keep the worst step", "remove the option"],
    ),
    "saving between evaluations": (
        training(**BEST | {"save_steps": 30}, eval_steps=20),
        ["training.save_steps: every saved step must be evaluated", "set training.save_steps: 40"],
    ),
    "saving less often than evaluating, by what is not written": (
        both(training(**BEST | {"save_steps": 25}), lambda p: drop(p, "eval_steps", "logging_steps")),
        ["training.save_steps: every saved step", "no multiple of eval_steps 10", "set training.save_steps: 20"],
    ),
    "a best step that is never saved": (
        training(load_best_model_at_end=True),
        ["training.load_best_model_at_end: the best step must have been saved", "set training.save_strategy: steps"],
    ),
    # Names of other programs.
    "train for training": (edit(train={"max_steps": 3}), ["train: unknown key 'train'", "use training\n"]),
    "train for data": (edit(train="train.jsonl"), ["train: unknown key 'train'", "use data.train"]),
    "model.name": (edit(model={"name": "./student"}), ["model.name: unknown key", "use model.model"]),
    "a teacher as text": (
        edit(rlhf={"teacher": "../t"}),
        ["rlhf.teacher: expected a map, got text '../t'", "write rlhf.teacher_model: ../t"],
    ),
    "a model as text": (edit(model="./student"), ["model: expected a map", "write model.model: ./student"]),
    "teacher_model_name_or_path": (
        edit(rlhf={"teacher_model": None, "teacher_model_name_or_path": "./teacher"}),
        ["rlhf.teacher_model_name_or_path: unknown key", "use rlhf.teacher_model\n"],
    ),
    "overwrite_output_dir": (
        training(overwrite_output_dir=True),
        ["training.overwrite_output_dir: unknown key", "remove it: no run writes over another", "--resume auto"],
    ),
    "QLoRA": (
        edit(tuner={"train_type": "qlora"}),
        ["tuner.train_type: expected one of full, lora", "tuner.train_type: lora beside model.quantization: 4bit"],
    ),
    "fp16 as a dtype": (edit(model={"dtype": "fp16"}), ["model.dtype: expected one of", "did you mean 'float16'?"]),
    "torch.bfloat16": (
        edit(rlhf={"teacher": {"dtype": "torch.bfloat16"}}),
        ["rlhf.teacher.dtype: expected one of", "did you mean 'bfloat16'?"],
    ),
    "early_stopping": (
        training(early_stopping=3),
        ["training.early_stopping: unknown key", "use training.early_stopping_patience"],
    ),
    "a batch size": (
        training(per_device_batch_size=3),
        ["training.per_device_batch_size: unknown key", "use training.per_device_train_batch_size"],
    ),
    "a batch size as elsewhere": (
        training(batch_size=3),
        ["training.batch_size: unknown key", "use training.per_device_train_batch_size"],
    ),
    "a decimal comma": (
        training(learning_rate="1,0e-4"),
        ["training.learning_rate: expected a number, got text '1,0e-4'", "write 1.0e-4, with a point"],
    ),
    "a share without its sign": (
        edit(data={"eval": 0.05}),
        ["data.eval: a share of the training rows has a percent sign: 5%"],
    ),
    "a role of another program": (
        rows({"messages": [{"role": "human", "content": "x"}, ANSWER]}),
        ["train.jsonl:1: messages[0] has the unknown role human", "write user"],
    ),
    "a file that is not UTF-8": (
        lambda p: (p / "train.jsonl").write_bytes(json.dumps({"prompt": "ö"}, ensure_ascii=False).encode("latin-1")),
        ["data.train: ", "train.jsonl:1: not UTF-8: byte 0xf6", "iconv -f latin1 -t utf-8"],
    ),
    "a key misspelt": (
        training(learningrate=1e-4),
        ["training.learningrate: unknown key", "did you mean training.learning_rate?"],
    ),
}


def drop(project, *keys):
    path = project / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for key in keys:
        del config["training"][key]
    path.write_text(yaml.safe_dump(config))


def run(monkeypatch, capsys, *arguments):
    """A command in this process: exit code, and all that it says."""
    monkeypatch.setattr(sys, "argv", ["kdtrain", *arguments])
    with pytest.raises(SystemExit) as done:
        cli.main()
    said = capsys.readouterr()
    return done.value.code, said.out + said.err


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_with_its_place_and_what_to_do_before_torch_is_needed(name, project, monkeypatch, capsys):
    change, parts = MISTAKES[name]
    change(project)
    monkeypatch.setattr("kdtrain.cli.commands.fit._fit_here", lambda *_: pytest.fail("training began"))
    for command in ("validate", "fit"):
        code, text = run(monkeypatch, capsys, command, "config.yaml")
        assert code == 2, text
        assert re.match(r"config\.yaml:\d+:\d+: error: ", text), text
        assert text.count(": error: ") == (2 if "DeepSpeed" in name and not has_deepspeed() else 1), text
        for part in parts:
            assert part in text, f"{part!r} is not in:\n{text}"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("configs.yaml", "did you mean config.yaml?"),
        (".", "name the config in it: config.yaml"),
        ("nowhere/c.yaml", ""),
    ],
)
def test_a_config_that_is_not_there_is_told_from_its_neighbours(name, hint, project, monkeypatch, capsys):
    for command in ("validate", "fit"):
        code, text = run(monkeypatch, capsys, command, name)
        assert code == 2
        assert f"cannot read {name}: " in text
        assert hint in text


def has_deepspeed():
    import importlib.util

    return importlib.util.find_spec("deepspeed") is not None


WARNED = {
    "two lengths of a run": (
        training(num_train_epochs=3),
        "training.num_train_epochs: has no effect: training.max_steps",
    ),
    "the larger model as the student": (
        edit(model={"model": "./teacher"}, rlhf={"teacher_model": "./student"}),
        "is smaller than the student: 28.9k parameters, and 52.5k",
    ),
    "the student as its teacher beside cross-entropy": (
        edit(rlhf={"teacher_model": "./student"}),
        "it holds the student back to what it was",
    ),
    "a warmup that never ends": (training(warmup_steps=100), "the learning rate never reaches its value"),
    "a folder that is taken for a hub id": (
        both(lambda p: shutil.copytree(p / "student", p / "mine" / "qwen"), edit(model={"model": "mine/qwn"})),
        "looked up on the hub, for there is no folder ",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_may_be_meant_so_is_a_warning(name, project):
    change, part = WARNED[name]
    change(project)
    result = check_config("config.yaml", files=all_files)
    assert result.errors == []
    assert part in "\n".join(warning.render() for warning in result.warnings)


def test_nothing_is_found_in_a_project_that_works(project):
    result = check_config("config.yaml", files=all_files)
    assert [*result.errors, *result.warnings] == []


SOUND = {
    "rows in a list": lambda p: write("train.jsonl", json.dumps(tiny.CHATS, indent=1))(p),
    "rows in a table by columns of CSV": both(
        write("a.csv", "instruction,output\nx,y\n"), edit(data={"train": "a.csv"})
    ),
    "a prompt where the student answers": both(rows({"prompt": "x"}), edit(rlhf={"lmbda": 1.0})),
    "a bad first row that may be left out": both(rows(TURNS, tiny.CHATS[0]), edit(data={"max_bad_rows": 1})),
    "a mapped column that begins in a later row": both(
        rows({"messages": TURNS}, {"messages": TURNS, "about": "s"}),
        edit(data={"train": {"path": "train.jsonl", "columns": {"messages": "messages", "system": "about"}}}),
    ),
    "the same model with a prefix": edit(
        rlhf={"teacher_model": "./student", "sft_alpha": 0, "teacher": {"prefix": [{"role": "system", "content": "x"}]}}
    ),
    "text for a student without a template": both(
        remove("student/chat_template.jinja"), rows({"prompt": "x", "completion": "y"}), edit(data={"eval": None}),
        training(eval_strategy="no"), lambda p: drop(p, "eval_steps"),
    ),
    "saved steps that are multiples of evaluated ones": training(**BEST, eval_steps=2),
    "a share of all steps": training(**BEST | {"save_steps": 0.5}, eval_steps=0.25),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_what_is_fine_is_let_through(name, project):
    SOUND[name](project)
    assert check_config("config.yaml", files=all_files).errors == []


def test_preview_shows_bad_rows_and_stops_at_files_that_are_not_there(project):
    rows({"prompt": "x"})(project)
    assert check_config("config.yaml", files=preview_files).errors == []
    assert check_config("config.yaml", files=all_files).errors != []
    (project / "train.jsonl").unlink()
    (found,) = check_config("config.yaml", files=preview_files).errors
    assert "no such file or folder" in found.message


@pytest.mark.parametrize("form", ["lines", "list"])
def test_of_a_large_file_the_first_rows_are_looked_at_alone(form, project, monkeypatch):
    long = [{"question": "x" * 1000, "answer": "y"}] * 2000
    text = "\n".join(map(json.dumps, long)) if form == "lines" else json.dumps(long)
    write("train.jsonl", text + ("" if form == "lines" else "]not JSON"))(project)
    monkeypatch.setattr("kdtrain.data.first_rows.read_json", lambda *_: pytest.fail("all of it was read"))
    drop_eval = ["data.eval=~", "training.eval_strategy=no"]
    (found,) = check_config("config.yaml", drop_eval, files=all_files).errors
    assert "but question, answer" in found.message


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
def test_the_columns_of_a_table_are_read_from_its_head(name, project):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"question": ["x"], "answer": ["y"]})
    if name.endswith(".parquet"):
        parquet.write_table(table, name)
    else:
        with pa.OSFile(name, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    (found,) = check_config("config.yaml", [f"data.train={name}"], files=all_files).errors
    assert f"{name} has none of the columns" in found.message


@pytest.mark.parametrize(
    ("override", "limits"),
    [
        ("data.train.0.limit=1", [1]),
        ("data.train[0].limit=1", [1]),
        ("data.train.limit=1", [1]),
        ("data.eval.0.limit=1", [None]),
    ],
)
def test_the_command_line_sets_an_option_of_a_source_that_is_only_a_path(override, limits, project):
    config = check_config("config.yaml", [override]).config
    assert [source.limit for source in config.data.train] == limits
    assert config.data.train[0].path == str(project / "train.jsonl")


def test_the_command_line_names_a_source_by_its_position(project):
    edit(data={"train": ["train.jsonl", {"path": "eval.jsonl"}]})(project)
    config = check_config("config.yaml", ["data.train.1.limit=3", "data.train.0.weight=2"]).config
    assert [(one.limit, one.weight) for one in config.data.train] == [(None, 2.0), (3, 1.0)]
    (error,) = check_config("config.yaml", ["data.train.2.limit=3"]).errors
    assert "data.train has 2 entries, of which the first is 0" in error.message


@pytest.mark.parametrize(
    ("name", "meant"), [("train", "fit"), ("evalute", "evaluate"), ("merge", "export"), ("distill", "fit")]
)
def test_an_unknown_command_names_the_one_that_is_meant(name, meant, monkeypatch, capsys):
    code, text = run(monkeypatch, capsys, name, "config.yaml")
    assert code == 2
    assert f"There is no command {name}. Did you mean kdtrain {meant}?" in text


def test_an_old_library_is_named_with_the_command_that_renews_it(project, monkeypatch):
    found = {"torch": "2.9.1", "trl": "1.17.0"}
    real = __import__("importlib.metadata", fromlist=["version"]).version
    monkeypatch.setattr("kdtrain.config.versions.version", lambda name: found.get(name) or real(name))
    monkeypatch.setattr(
        "kdtrain.config.versions.requires", lambda _: ["torch>=2.11,<2.14", "trl>=1.16,<1.17", 'x>1; extra == "y"']
    )
    result = check_config("config.yaml", files=all_files)
    assert [(one.message, one.hint) for one in result.errors] == [
        ("torch 2.9.1 is installed, and kdtrain is for torch <2.14,>=2.11", "pip install 'torch<2.14,>=2.11'")
    ]
    assert "trl 1.17.0 is installed" in result.warnings[0].message


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "run/logging.jsonl"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_is_exit_code_6_with_what_makes_room(error):
    with pytest.raises(CheckpointError) as caught, readable_failures(SimpleNamespace(output_dir="run")):
        raise error
    assert re.match(
        r"Writing run\S* failed: .*Make room there\. .*training\.save_total_limit.* --resume auto", str(caught.value)
    )


def test_other_errors_are_not_taken_for_a_full_disk():
    with pytest.raises(RuntimeError, match="shapes"), readable_failures(SimpleNamespace(output_dir="run")):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_teacher_for_a_gpu_that_is_not_there_names_the_option(project):
    with pytest.raises(PreflightError, match=r"to be placed on a GPU.*Remove rlhf\.teacher\.device_map"):
        load_model(str(project / "teacher"), init_kwargs={"device_map": "cuda:0"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize("gpus", [0, 2])
def test_gpus_that_torch_does_not_see_are_a_warning(gpus, monkeypatch):
    said = []
    monkeypatch.setattr(environment, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(environment.logger, "warning", lambda text, *values: said.append(text % values))
    environment.warn_of_unseen_gpus()
    assert len(said) == (1 if gpus else 0)
    assert all("sees none of them: this runs on the CPU" in text for text in said)


def test_the_command_to_go_on_with_is_the_one_that_was_typed(monkeypatch):
    typed = ["kdtrain", "fit", "my config.yaml", "--resume", "auto", "training.seed=3", "--dry-run", "--resume=x"]
    monkeypatch.setattr(sys, "argv", typed)
    assert resume_command() == "kdtrain fit 'my config.yaml' training.seed=3 --resume auto"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert resume_command().startswith('kdtrain.fit(…, resume="auto")')


# What hub ids end with, without a network: a server on this machine in place of the hub.
ANSWERS = {
    "a gated model": (403, "GatedRepo", None, "is gated. Accept its licence on http", "HF_TOKEN"),
    "a model that is not there": (404, "RepoNotFound", None, "There is no model org/name on http", "Check its name"),
    "a revision that is not there": (404, "RevisionNotFound", "v9", "has no revision v9", "Correct the revision"),
    "a hub that fails": (500, "", None, "is not in the cache (", "hf download org/name"),
}


@pytest.fixture
def hub(monkeypatch):
    """A hub that gives one answer; the requests that it has had."""
    answer, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            code, said = answer[0]
            self.send_response(code)
            self.send_header("X-Error-Code", said)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("kdtrain.models.hub.hf_hub_url", lambda name, file, **_: f"{url}/{name}/{file}")
    require_model.cache_clear()
    yield answer, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ANSWERS)
def test_a_hub_id_that_cannot_be_had_is_asked_for_once_and_says_why(name, hub):
    answer, asked = hub
    code, said, revision, *parts = ANSWERS[name]
    answer.append((code, said))
    with pytest.raises(PreflightError) as caught:
        require_model("org/name", revision)
    for part in parts:
        assert part in str(caught.value)
    assert len(asked) == 1


def test_a_hub_that_does_not_answer_is_named_at_once(hub, monkeypatch):
    closed = f"http://127.0.0.1:{tiny.free_port()}/config.json"
    monkeypatch.setattr("kdtrain.models.hub.hf_hub_url", lambda *_, **__: closed)
    with pytest.raises(PreflightError, match=r"cannot be reached: .*Download it where.*write its path: \./org/name"):
        require_model("org/name")


def test_a_model_that_is_not_in_the_cache_says_so_offline(monkeypatch):
    require_model.cache_clear()
    with pytest.raises(PreflightError, match=r"HF_HUB_OFFLINE is set.*hf download org/name.*licence accepted"):
        require_model("org/name")


def test_folders_are_no_business_of_the_hub(project):
    require_model("student")
    require_model(str(project / "nothing"))


def test_parameters_are_counted_from_headers_and_not_where_they_are_packed(project):
    assert parameters(project / "student") == tiny.make_qwen3(seed=1).num_parameters()
    config = json.loads((project / "student/config.json").read_text())
    write("student/config.json", json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))(project)
    assert parameters(project / "student") is None


def test_names_and_defaults_of_upstream_are_as_they_are_taken_for():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from trl.experimental.gkd import GKDConfig

    assert trackers() == tuple(INTEGRATION_TO_CALLBACK)
    defaults = GKDConfig(output_dir="x", report_to="none", bf16=False)
    assert {name: getattr(defaults, name) for name in DEFAULT_STEPS} == DEFAULT_STEPS
