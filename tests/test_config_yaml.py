"""Reading YAML: what is a number, what is refused, and how a mistake is shown."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from kdtrain.config import Diagnostic, check_config
from kdtrain.config.sources import Composer
from kdtrain.config.tree import SourceFile, plain
from kdtrain.config.yaml_reader import read_yaml

SOURCE = SourceFile("run.yaml", Path.cwd())


def value_of(text: str) -> Any:
    node, problems = read_yaml(f"key: {text}", SOURCE)
    assert not problems
    return plain(node)["key"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-2.", -2.0),
        ("+7", 7),
        ("08", 8),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("nan", "nan"),
        ('"1e-5"', "1e-5"),
        ("'true'", "true"),
        ("[1, a, {b: .5}]", [1, "a", {"b": 0.5}]),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, expected: Any) -> None:
    value = value_of(text)
    assert value == expected
    assert type(value) is type(expected)


def alias_bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


UNREADABLE = {
    "python tag": ("model: !!python/object/apply:os.system [ls]", "tag"),
    "custom tag": ("model: !mine {model: a}", "tag"),
    "alias bomb": (alias_bomb(9), "10000 values"),
    "recursive alias": ("a: &a [*a]", "contains itself"),
    "unknown alias": ("a: *b", "no anchor"),
    "20k levels": ("a: " + "[" * 20_000 + "]" * 20_000, "64 levels"),
    "20k block levels": ("\n".join(" " * i + "a:" for i in range(1000)), "64 levels"),
    "levels by alias": ("a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40, "64 levels"),
    "10 MB": ("a: " + "x" * 10_000_000, "1 MiB"),
    "many values": ("a: [" + "1," * 20_000 + "]", "10000 values"),
    "empty": ("", "empty"),
    "only a comment": ("# nothing\n", "empty"),
    "a list": ("- model\n", "a list"),
    "a text": ("model\n", "a single value"),
    "two documents": ("model: {model: a}\n---\nmodel: {model: b}", "second document"),
    "tab": ("model:\n\tmodel: a\n", "tab"),
    "unclosed": ("model: {model: a\n", "not valid YAML"),
    "control character": ("model: a\x00b", "control character"),
    "key not text": ("1: a", "key that is not text"),
    "complex key": ("? [a]\n: b", "key that is not plain text"),
    "merge key": ("a: &a {b: 1}\nc:\n  <<: *a", "extends"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_hostile_or_broken_file_is_one_short_error_at_once(name: str, tmp_path: Path) -> None:
    text, expected = UNREADABLE[name]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = check_config(path)
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert result.config is None
    assert len(result.errors) == 1, [error.headline for error in result.errors]
    assert expected in result.errors[0].render()
    assert str(path) in result.errors[0].headline
    assert "\n" not in result.errors[0].headline
    assert max(map(len, result.errors[0].render().split("\n"))) < 400


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"model:\n  model: caf\xe9\n")
    (error,) = check_config(path).errors
    assert error.location == f"{path}:2"
    assert "UTF-8" in error.message


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read_is_an_error(name: str, tmp_path: Path) -> None:
    (error,) = check_config(tmp_path / name).errors
    assert "cannot read" in error.message


@pytest.mark.parametrize(
    ("written", "warned"),
    [("#### (\\S+)", True), ("'#### (\\S+)'", False), ("null  # none", False), ("", False)],
)
def test_an_expression_that_is_a_comment_is_a_warning(written: str, warned: bool, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {model: m}\ndata: {train: x.jsonl}\nrlhf:\n  teacher_model: t\n  lmbda: 1.0\n"
        f"  select_regex: {written}\ntraining: {{output_dir: out}}\n"
    )
    found = [warning for warning in check_config(path).warnings if warning.path == "rlhf.select_regex"]
    assert ["what begins with # is a comment" in warning.message for warning in found] == [True] * warned
    assert all(warning.line == 6 for warning in found)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel:\r\n  model: a\r\n  modle: b\r\n")
    error = next(e for e in check_config(path).errors if e.path == "model.modle")
    assert (error.line, error.col, error.source_line) == (3, 3, "  modle: b")


def test_every_duplicate_key_and_every_nan_is_reported_with_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model:\n  model: a\n  model: b\nrlhf: {beta: .nan, lmbda: .inf, kd_temperature: 1e999, bta: 1}\n")
    found = {(e.path, e.line) for e in check_config(path).errors}
    assert {
        ("model.model", 3),
        ("rlhf.beta", 4),
        ("rlhf.lmbda", 4),
        ("rlhf.kd_temperature", 4),
        ("rlhf.bta", 4),
    } <= found


def test_an_alias_repeats_a_value_without_counting_as_a_mistake(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {model: &name org/a}\nrlhf: {teacher_model: *name}\n")
    root = Composer().compose(path)
    assert plain(root) == {"model": {"model": "org/a"}, "rlhf": {"teacher_model": "org/a"}}


def test_a_mistake_is_shown_with_its_line_a_caret_and_what_was_meant(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: {model: org/a}\nrlhf:\n  lambda: 0.5\n")
    error = next(e for e in check_config("run.yaml").errors if e.path == "rlhf.lambda")
    assert error.render() == (
        "run.yaml:3:3: error: rlhf.lambda: unknown key 'lambda' in rlhf\n"
        "  3 |   lambda: 0.5\n"
        "    |   ^^^^^^\n"
        "    = did you mean rlhf.lmbda?"
    )


def test_the_caret_stays_under_its_place_beside_wide_and_escaped_characters() -> None:
    line = "a: [日本, \x1b[31m, 1]"
    rendered = Diagnostic("error", "a", "wrong", file="f", line=1, col=line.index("1]") + 1, source_line=line).render()
    shown, caret = rendered.split("\n")[1:3]
    assert "\x1b" not in rendered
    # Each wide character takes two columns on a terminal.
    assert caret.index("^") == shown.index("1]") + 2


def test_a_very_long_line_is_cut_around_its_place() -> None:
    line = "x" * 5000 + " bad " + "y" * 5000
    rendered = Diagnostic("error", "a", "wrong", file="f", line=1, col=5002, source_line=line).render()
    shown, caret = rendered.split("\n")[1:3]
    assert len(shown) < 140
    assert shown[caret.index("^") :].startswith("bad")


HOSTILE_LINES = {
    "one word": "a: " + "x" * 1_000_000,
    "words": "a: " + "hf_" * 300_000,
    "keys": "a: " + "key " * 200_000,
    "dashes": "a: " + "sk-" * 300_000,
    "blanks": "a: [token" + " " * 900_000 + "]",
    "schemes": "a: " + "x://" * 200_000,
    "unknown keys": "rlhf: {" + ", ".join(f"key_{i}: 1" for i in range(4900)) + "}",
    "unknown training keys": "training: {" + ", ".join(f"learning_{i}: 1" for i in range(4900)) + "}",
    "unknown sections": "\n".join(f"section_{i}: 1" for i in range(4900)),
    "a long key": "? " + "k" * 900_000 + "\n: 1",
}


@pytest.mark.parametrize("name", HOSTILE_LINES)
def test_a_large_file_of_nonsense_is_judged_and_shown_quickly(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(HOSTILE_LINES[name])
    start = time.process_time()
    result = check_config(path)
    shown = "\n".join(error.render() for error in result.errors)
    assert time.process_time() - start < 1
    assert result.config is None
    assert len(result.errors) < 250
    assert len(shown) < 200_000


@pytest.mark.parametrize("char", ["\x1b[2J", "\r", "\x07", "\u202e", "\ud800"])
def test_control_characters_are_shown_escaped(char: str) -> None:
    shown = Diagnostic("error", "p" + char, "m" + char, "h" + char, "f" + char, 1, 1, "s" + char).render()
    assert char not in shown
    shown.encode()


SECRETS = [
    ("rlhf: {teacher: {api_key_env: sk-abc123DEF456ghi}}", "abc123DEF456ghi"),
    ("rlhf: {teacher: {api_key_env: 'not a name 77'}}", "not a name 77"),
    ("rlhf: {teacher: {api_key: hunter2hunter}}", "hunter2hunter"),
    ("rlhf: {teacher: {base_url: 'http://user:pa55word@host/v1'}}", "pa55word"),
    ("training: {hub_token: hf_AbCdEfGhIjKlMnOpQrSt}", "AbCdEfGhIjKlMnOpQrSt"),
    ("training: {run_name: sk-abc123DEF456ghi}", "abc123DEF456ghi"),
    ("model: {init_kwargs: {token: s3cr3tvalue}}", "s3cr3tvalue"),
    ("rlhf: {beta: sk-abc123DEF456ghi}", "abc123DEF456ghi"),
    ("rlhf: {beta: hf_AbCdEfGhIjKlMnOpQrSt", "AbCdEfGhIjKlMnOpQrSt"),
    ("password: [correct horse]", "correct horse"),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_a_secret_in_the_file_is_an_error_that_never_repeats_it(text: str, secret: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    result = check_config(path)
    assert result.errors
    findings = [*result.errors, *result.warnings]
    assert any(text[:6] in (finding.source_line or "") for finding in findings), "the line itself must be on show"
    shown = "\n".join(finding.render() for finding in findings) + json.dumps([f.to_dict() for f in findings])
    assert secret not in shown
    assert check_config({}, [text.replace(": ", "=", 1)]).errors


def test_a_value_wrong_in_itself_is_not_reported_as_missing_too(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {model: .nan}\ndata: {train: a.jsonl}\nrlhf: {llm_kd_weight: 0}\ntraining: {output_dir: x}\n"
    )
    (error,) = check_config(path).errors
    assert (error.path, error.line) == ("model.model", 1)


def test_names_that_only_sound_like_secrets_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rlhf:\n  max_new_tokens: -12\n")
    error = next(e for e in check_config(path).errors if e.path == "rlhf.max_new_tokens")
    assert "max_new_tokens: -12" in error.render()
