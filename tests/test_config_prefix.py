"""`rlhf.teacher.prefix`: its forms, files, and what is said of each mistake and where."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdtrain.config import check_config
from kdtrain.config.json_schema import json_schema

SYSTEM = {"role": "system", "content": "Answer briefly."}
SHOTS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def config(prefix: Any, **teacher: Any) -> dict[str, Any]:
    return {
        "model": {"model": "a/b"},
        "data": {"train": "c/d"},
        "rlhf": {"teacher_model": "e/f", "lmbda": 0.0, "teacher": {"prefix": prefix, **teacher}},
        "training": {"output_dir": "run"},
    }


def chats(path: Path, prefix: Any, **teacher: Any) -> dict[str, Any]:
    (path / "config.yaml").write_text(yaml.safe_dump(config(prefix, **teacher)))
    result = check_config(path / "config.yaml")
    assert result.errors == []
    assert result.config is not None
    return {name: value for name, value in result.config.chats.items() if name.startswith("teacher_prefix")}


FILES = {
    "p.txt": ("\nAnswer briefly.\n\n", [SYSTEM]),
    "p": ("Answer briefly.", [SYSTEM]),
    "p.md": ("# Be brief: [x]", [{"role": "system", "content": "# Be brief: [x]"}]),
    "p.json": (json.dumps([SYSTEM, *SHOTS], indent="\t"), [SYSTEM, *SHOTS]),
    "p.yaml": ("- role: system\n  content: |\n    Answer briefly.\n", [{**SYSTEM, "content": "Answer briefly.\n"}]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_beside_the_config_that_names_it(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    text, messages = FILES[name]
    (tmp_path / name).write_text(text)
    monkeypatch.chdir("/")
    expected = {"teacher_prefix": messages, "teacher_prefix_column": None, "teacher_prefix_mode": "prepend"}
    assert chats(tmp_path, name) == expected
    assert chats(tmp_path, {"column": "hint", "default": name}) == {**expected, "teacher_prefix_column": "hint"}


def test_the_messages_of_a_list_and_a_column_come_as_they_are(tmp_path: Path) -> None:
    found = chats(tmp_path, [SYSTEM, *SHOTS], prefix_mode="system")
    assert found == {
        "teacher_prefix": [SYSTEM, *SHOTS],
        "teacher_prefix_column": None,
        "teacher_prefix_mode": "system",
    }
    found = chats(tmp_path, {"column": "hint"})
    assert found == {"teacher_prefix": None, "teacher_prefix_column": "hint", "teacher_prefix_mode": "prepend"}
    found = chats(tmp_path, {"column": "hint", "default": None})
    assert found == {"teacher_prefix": None, "teacher_prefix_column": "hint", "teacher_prefix_mode": "prepend"}


def test_what_a_run_has_read_is_in_its_config(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Answer briefly.")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config("p.txt")))
    loaded = check_config(tmp_path / "config.yaml").config
    assert loaded is not None
    assert loaded.model_dump(mode="json")["rlhf"]["teacher"]["prefix"] == [SYSTEM]


WRONG: dict[str, tuple[Any, str, str]] = {
    "a sentence": ("You are a pirate.", "rlhf.teacher.prefix", "there is no file 'You are a pirate.' in "),
    "a file that is not there": ("./p.txt", "rlhf.teacher.prefix", "there is no file './p.txt' in "),
    "a folder": (".", "rlhf.teacher.prefix", "is a directory"),
    "rows": ("rows.jsonl", "rlhf.teacher.prefix", "a .jsonl file holds rows, not messages"),
    "no text": ("", "rlhf.teacher.prefix", "is empty"),
    "no messages": ([], "rlhf.teacher.prefix", "is empty"),
    "a number": (5, "rlhf.teacher.prefix", "expected a list of messages, got the number 5"),
    "one message": (SYSTEM, "rlhf.teacher.prefix", "expected a list of messages, got one message"),
    "text in the list": (["x"], "rlhf.teacher.prefix[0]", "expected a message, got text 'x'"),
    "no role": ([{"content": "x"}], "rlhf.teacher.prefix[0].role", "is required: one of system, developer, user, assi"),
    "a role": ([{"role": "boss", "content": "x"}], "rlhf.teacher.prefix[0].role", "expected one of system, developer"),
    "no content": ([{"role": "user"}], "rlhf.teacher.prefix[0].content", "is required: text"),
    "a number as content": ([{"role": "user", "content": 4}], "rlhf.teacher.prefix[0].content", "expected text, got"),
    "empty content": ([{"role": "user", "content": " "}], "rlhf.teacher.prefix[0].content", "is empty"),
    "a key": ([{**SYSTEM, "name": "x"}], "rlhf.teacher.prefix[0].name", "unknown key"),
    "a later system message": ([*SHOTS, SYSTEM], "rlhf.teacher.prefix[2].role", "only the first message can be a syst"),
    "a key beside the column": ({"column": "a", "defualt": "p"}, "rlhf.teacher.prefix.defualt", "unknown key"),
    "no column": ({"default": [SYSTEM]}, "rlhf.teacher.prefix.column", "expected the name of a column"),
    "a column that is a number": ({"column": 3}, "rlhf.teacher.prefix.column", "expected the name of a column"),
    "a default": ({"column": "a", "default": "x y"}, "rlhf.teacher.prefix.default", "there is no file 'x y' in "),
    "an empty default": ({"column": "a", "default": []}, "rlhf.teacher.prefix.default", "is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_error_at_its_place(case: str, tmp_path: Path) -> None:
    value, path, words = WRONG[case]
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(value)))
    result = check_config(tmp_path / "config.yaml")
    assert [error.path for error in result.errors] == [path]
    assert words in result.errors[0].message
    assert result.errors[0].file == str(tmp_path / "config.yaml")
    lines = (tmp_path / "config.yaml").read_text().splitlines()
    first, behind = (next(i for i, line in enumerate(lines, 1) if key in line) for key in ("prefix:", "teacher_model:"))
    assert first <= (result.errors[0].line or 0) < behind
    if "there is no file" in words:
        assert result.errors[0].hint == 'to give one message, write [{role: system, content: "…"}]'


BROKEN = {
    "p.json": ('[{"role": "system"\n "content": "x"}]', (2, 2), "not valid JSON"),
    "p.yaml": ("- role: user\n  content: x\n- role: boss\n  content: y\n", (3, 9), "expected one of system, developer"),
    "p.yml": ("- role: [\n", (2, 1), "not valid YAML"),
    "p.txt": ("\n \n", (None, None), "is empty"),
    "key.txt": ("Use hf_AbCdEfGhIjKlMnOp", (None, None), "looks like a secret"),
    "map.json": ('{"role": "system", "content": "x"}', (None, None), "expected a list of messages, got a map"),
}


@pytest.mark.parametrize("key", ["path", "file"])
def test_a_file_in_a_map_is_told_how_a_file_is_named(key: str) -> None:
    (found,) = check_config(config({key: "p.txt"})).errors
    assert found.hint == "name the file itself, prefix: rules.txt"


@pytest.mark.parametrize("name", BROKEN)
def test_a_mistake_in_a_file_is_shown_where_it_stands(name: str, tmp_path: Path) -> None:
    text, place, words = BROKEN[name]
    (tmp_path / name).write_text(text)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(name)))
    (error,) = check_config(tmp_path / "config.yaml").errors
    assert (error.file, error.line, error.col) == (str(tmp_path / name), *place)
    assert words in error.message
    assert "AbCdEf" not in error.headline


def test_options_that_go_together() -> None:
    (error,) = check_config(config(SHOTS, prefix_mode="system")).errors
    assert (error.path, "does not begin with one" in error.message) == ("rlhf.teacher.prefix_mode", True)
    assert check_config(config({"column": "hint"}, prefix_mode="system")).errors == []
    (warning,) = check_config(config(None, prefix_mode="system")).warnings
    assert (warning.path, "no rlhf.teacher.prefix" in warning.message) == ("rlhf.teacher.prefix_mode", True)
    idle = config([SYSTEM])
    idle["rlhf"]["llm_kd_weight"] = 0.0
    assert any("nothing asks the teacher" in warning.message for warning in check_config(idle).warnings)
    visual = config([SYSTEM])
    visual["custom"] = {"visual_kd": {"enabled": True}}
    (error,) = check_config(visual).errors
    assert (error.path, "visual_kd yet" in error.message) == ("rlhf.teacher.prefix", True)


SERVER = {"base_url": "http://127.0.0.1:9/v1", "model": "teacher"}


@pytest.mark.parametrize("backend", [{"backend": "vllm", **SERVER}, {"backend": "openai", **SERVER}])
def test_a_served_teacher_takes_it(backend: dict[str, Any]) -> None:
    written = config([SYSTEM], **backend, prefix_mode="system")
    del written["rlhf"]["teacher_model"]
    result = check_config(written)
    assert (result.errors, result.warnings) == ([], [])


@pytest.mark.parametrize("backend", ["self", "cache"])
def test_no_backend_says_that_it_has_no_effect(backend: str) -> None:
    found = check_config(config([SYSTEM], backend=backend, prefix_mode="system"))
    assert not [warning for warning in found.warnings if "prefix" in warning.path]


def test_the_json_schema_has_every_form() -> None:
    teacher = json_schema()["$defs"]["TeacherConfig"]["properties"]
    assert teacher["prefix"]["type"] == ["array", "string", "object", "null"]
    assert teacher["prefix_mode"]["enum"] == ["prepend", "system"]
