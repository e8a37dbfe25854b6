"""Whatever is written into a config, checking it ends with a verdict and never with an exception."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdtrain.config import CheckResult, InvalidConfigError, check_config
from kdtrain.config.suggest import known_keys
from kdtrain.preflight.files import all_files
from tests.tiny import slow

START = """\
model: {model: org/student}
data:
  train: [rows.jsonl, {path: org/rows, weight: 2}]
rlhf:
  teacher_model: org/teacher
  teacher: {backend: hf, dtype: auto}
  beta: 0.5
tuner: {train_type: lora, target_modules: [q_proj]}
custom: {visual_kd: {enabled: false}}
training:
  output_dir: runs/x
  learning_rate: 1e-5
"""
VALUES = [None, True, 0, -1, "", "x", "~x/y", "a\0b", "{", [], [[]], [None], {}, {"path": 1}, float("nan"), 10**30]
FRAGMENTS = [
    *"[]{}:,-|>'\"?#&*\t\n",
    "- ",
    ": ",
    "&a ",
    "*a",
    "<<",
    "!!str ",
    "null",
    ".nan",
    "1e999",
    "sk-a1b2c3d4e5f6g7",
]


def assert_verdict(result: CheckResult) -> None:
    assert (result.config is None) == bool(result.errors)
    for finding in (*result.errors, *result.warnings):
        assert finding.message
        assert finding.render().isprintable() or "\n" in finding.render()
        json.dumps(finding.to_dict(), allow_nan=False)


SECTIONS = [*((section, 1) for section in known_keys() if section != "training"), ("training", 4), slow("training", 1)]


@pytest.mark.parametrize(("section", "every"), SECTIONS)
def test_any_value_for_any_option_ends_with_a_verdict(section: str, every: int) -> None:
    """Each option gets one in `every` values, and the next option others."""
    start = yaml.safe_load(START)
    for number, key in enumerate(known_keys()[section]):
        for value in VALUES[number % every :: every]:
            config = copy.deepcopy(start)
            holder = config
            for part in filter(None, section.split(".")):
                if part in ("train", "eval"):
                    holder[part] = {"path": "x.jsonl"}
                elif part == "targets":
                    holder[part] = {"vit": {}}
                holder = holder.setdefault(part, {})
                holder = holder.setdefault("vit", {}) if part == "targets" else holder
            holder[key] = value
            result = check_config(config)
            assert_verdict(result)
            if isinstance(value, float):
                assert result.errors, f"NaN was accepted for {section}.{key}"


def test_any_damage_to_a_file_ends_with_a_verdict(tmp_path: Path) -> None:
    generator = random.Random(0)
    path = tmp_path / "run.yaml"
    for _ in range(300):
        text = START
        for _ in range(generator.randint(1, 4)):
            start = generator.randrange(len(text))
            text = text[:start] + generator.choice(FRAGMENTS) + text[start + generator.choice([0, 1, 5, 30]) :]
        path.write_text(text)
        assert_verdict(check_config(path))


@pytest.mark.parametrize("source", ["a\0b", "", "/dev/null", "~nobody-of-that-name/x.yaml", "x" * 5000])
def test_any_name_of_a_file_ends_with_a_verdict(source: str) -> None:
    assert check_config(source).errors
    assert check_config({"extends": source}).errors


@pytest.mark.parametrize("key", ["data.train", "data.train.0", "data.eval.0"])
@pytest.mark.parametrize("value", ["1e-5", "[1", "{a: b}", "{? [a]\na: b}"])
def test_a_lone_source_is_replaced_as_a_whole_with_a_verdict(key: str, value: str) -> None:
    """Found by `fuzz.py`."""
    config = yaml.safe_load(START) | {"data": {"train": "a.jsonl", "eval": "b.jsonl"}}
    assert check_config(config, [f"{key}={value}"]).errors


def test_a_name_that_no_file_can_have_is_an_error(tmp_path: Path) -> None:
    """Found by `fuzz.py`."""
    config = yaml.safe_load(START)
    config["training"]["learning_rate"] = 1e-5
    config["launch"] = {"config_file": "x" * 5000}
    errors = {one.path: one.message for one in check_config(config, files=all_files).errors}
    assert "too long for a file system: 5,000 bytes" in errors["launch.config_file"]


def test_an_error_survives_the_way_to_another_process() -> None:
    error = InvalidConfigError(check_config({"tunr": {}}).errors)
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.diagnostics) == (str(error), error.diagnostics)


@pytest.mark.parametrize("name", ["sk-learn-baseline", "bearer of news", "hf_trainer_run", "risk-aversion-study"])
def test_a_name_that_only_looks_a_little_like_a_key_is_accepted(name: str) -> None:
    config: dict[str, Any] = yaml.safe_load(START)
    config["training"]["run_name"] = name
    config["training"]["learning_rate"] = 1e-5
    assert not check_config(config).errors
