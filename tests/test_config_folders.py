"""What a config says about local folders: where a run may write, and what a model there takes."""

import json

import pytest

from kdtrain.config import check_config
from kdtrain.config.folders import broken_models


@pytest.fixture
def root(tmp_path):
    """Student, teacher, an adapter, data in a file and in a folder, and links to some of them."""
    for name in ("models/student", "models/teacher", "adapter"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "data" / "folder").mkdir(parents=True)
    (tmp_path / "data" / "train.jsonl").write_text("{}\n")
    (tmp_path / "to_student").symlink_to("models/student")
    (tmp_path / "to_models").symlink_to("models")
    return tmp_path


def problems(root, output, **changes):
    config = {
        "model": {"model": str(root / "models/student")},
        "data": {"train": str(root / "data/train.jsonl"), "eval": [str(root / "data/folder"), "org/rows"]},
        "rlhf": {"teacher_model": str(root / "models/teacher"), **changes},
        "training": {"output_dir": str(root / output)},
    }
    config["data"] = config["rlhf"].pop("data", config["data"])
    return [error.message for error in check_config(config).errors if error.path == "training.output_dir"]


@pytest.mark.parametrize(
    ("output", "relation", "option"),
    [
        ("models/student", "is", "model.model"),
        ("models/student/", "is", "model.model"),
        ("runs/../models/student", "is", "model.model"),
        ("to_student", "is", "model.model"),
        ("models/student/run", "lies in", "model.model"),
        ("to_student/new/run", "lies in", "model.model"),
        ("models/teacher", "is", "rlhf.teacher_model"),
        ("models/teacher/run", "lies in", "rlhf.teacher_model"),
        ("models", "holds", "model.model"),
        ("to_models", "holds", "model.model"),
        (".", "holds", "model.model"),
        ("..", "holds", "model.model"),
        ("data", "holds", "data.train"),
        ("data/folder", "is", "data.eval[0]"),
        ("data/folder/run", "lies in", "data.eval[0]"),
        ("data/train.jsonl", "is", "data.train"),
    ],
)
def test_an_output_folder_that_is_holds_or_lies_in_what_is_read_is_an_error(root, output, relation, option):
    (message,) = problems(root, output)
    assert message.startswith(f"{relation} what this run reads")
    assert message.endswith(f"({option})")


@pytest.mark.parametrize(
    "output", ["runs/x", "run", "models/student2", "models/new", "data_run", "data/run", "adapter"]
)
def test_an_output_folder_beside_what_is_read_is_fine(root, output):
    assert problems(root, output) == []


def test_the_model_below_an_adapter_is_not_written_over_either(root):
    (root / "base").mkdir()
    (root / "adapter" / "config.json").unlink()
    (root / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(root / "base")}))
    assert problems(root, "base") == []
    (message,) = problems(root, "base/run", teacher_model=str(root / "adapter"))
    assert message.startswith("lies in what this run reads")
    assert f"the model below an adapter, {root / 'base'} (rlhf.teacher_model)" in message


@pytest.mark.parametrize("option", ["image_root", "cache_dir"])
def test_a_folder_of_images_or_encoded_rows_may_hold_a_run_and_be_none(root, option):
    shared = {"data": {"train": str(root / "data/train.jsonl"), option: str(root / "shared")}}
    (message,) = problems(root, "shared", **shared)
    assert message.endswith(f"(data.{option})")
    assert problems(root, "shared/run", **shared) == []


def test_a_teacher_that_is_not_asked_is_not_written_over_either(root):
    assert problems(root, "models/teacher", llm_kd_weight=0)
    assert problems(root, "adapter", teacher={"adapter": str(root / "adapter")})


def test_another_spelling_of_the_same_folder_is_found_by_what_the_file_system_says(root, monkeypatch):
    monkeypatch.setattr("os.path.samefile", lambda first, second: str(first).lower() == str(second).lower())
    assert problems(root, "models/Student")
    assert problems(root, "Models/student/run")
    monkeypatch.undo()
    assert problems(root, "models/Student") == []


@pytest.mark.parametrize(
    ("name", "hint"),
    [("dtyp", "did you mean 'dtype'?"), ("of_another", "see from_pretrained"), ("atn_implementation", "attn_implem")],
)
def test_an_argument_that_no_one_takes_is_found_for_a_local_model(root, name, hint):
    (root / "models/student/config.json").write_text('{"model_type": "qwen3", "of_its_own": 1}')
    known = {"attention_dropout": 0.1, "use_cache": False, "variant": "fp16", "of_its_own": 2, "max_memory": {}}
    for path, sections in (
        ("model.init_kwargs", {"model": {"model": str(root / "models/student"), "init_kwargs": {**known, name: 1}}}),
        (
            "rlhf.teacher_model_init_kwargs",
            {
                "model": {"model": "org/student"},
                "rlhf": {
                    "teacher_model": str(root / "models/student"),
                    "teacher_model_init_kwargs": {**known, name: 1},
                },
            },
        ),
    ):
        rest = {"data": {"train": "rows.jsonl"}, "training": {"output_dir": "r"}, "rlhf": {"teacher_model": "org/t"}}
        (error,) = check_config({**rest, **sections}).errors
        assert error.path == f"{path}.{name}"
        assert "unknown to from_pretrained" in error.message
        assert hint in error.hint


def test_arguments_of_a_model_that_cannot_be_looked_at_are_left_to_its_loading(root):
    config = {
        "model": {"model": "org/student", "init_kwargs": {"dtyp": 1}},
        "data": {"train": "rows.jsonl"},
        "rlhf": {"teacher_model": str(root / "models/teacher"), "teacher_model_init_kwargs": {"of_custom_code": 1}},
        "training": {"output_dir": "r"},
    }
    assert check_config(config).errors == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 8), "cannot be loaded: model.safetensors is"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights, neither model.safetensors nor"),
        (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "has no tokenizer"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be loaded: config.json is not valid JSON"),
    ],
)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_validate_looks_into_the_models_folders(project, change, message, whose):
    assert check_config(project / "config.yaml", files=broken_models).errors == []
    change(project / whose)
    found = check_config(project / "config.yaml", files=broken_models).errors
    assert [error.path for error in found] == ["model.model" if whose == "student" else "rlhf.teacher_model"]
    assert message in found[0].message
    assert check_config(project / "config.yaml").errors == []  # a run finds it in its preflight, with exit code 3


def test_a_teacher_that_is_not_asked_need_not_be_sound(project):
    (project / "teacher" / "model.safetensors").unlink()
    assert check_config(project / "config.yaml", ["rlhf.llm_kd_weight=0"], files=broken_models).errors == []
