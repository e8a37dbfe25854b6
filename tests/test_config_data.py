"""What the static check says about `data`: shares, splits, paths, and rows that are trained and evaluated on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdtrain.config import ConfigLoader, check_config
from tests.test_config_rules import config, errors, warnings

EVALUATED = {"training__eval_strategy": "steps"}


def write(tmp_path: Path, data: str) -> Path:
    """A config file with this section."""
    rest = "model: {model: org/s}\nrlhf: {teacher_model: org/t}\ntraining: {output_dir: run, eval_strategy: steps}\n"
    (tmp_path / "config.yaml").write_text(f"{rest}data:\n{data}")
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.5%", 0.005), ("12.5 %", 0.125), ("99%", 0.99)])
def test_a_share_of_the_training_rows_stands_for_data_to_evaluate_on(text: str, share: float, tmp_path: Path) -> None:
    loaded = ConfigLoader.load(write(tmp_path, f"  train: rows.jsonl\n  eval: {text}\n"))
    assert loaded.data.eval_share == pytest.approx(share)
    assert (loaded.data.eval, loaded.data.eval_sources) == (text, ())
    assert ConfigLoader.load(json.loads(loaded.model_dump_json())).data.eval == text  # as a run folder keeps it
    assert warnings(config(data__eval=text, **EVALUATED)) == []


WRONG_SHARES: list[tuple[Any, str, str]] = [
    ("0%", "data.eval", "must be above 0% and below 100%"),
    ("100%", "data.eval", "must be above 0% and below 100%"),
    ("-5%", "data.eval", "must be above 0% and below 100%"),
    (0.05, "data.eval", "percent sign: 5%"),
    (5, "data.eval", "such as 5%"),
    (["5%", "a.jsonl"], "data.eval", "data.eval: 5%, beside no other source"),
    ({"path": "5%"}, "data.eval", "data.eval: 5%, beside no other source"),
    ("", "data.eval[0].path", "must not be empty"),
]


@pytest.mark.parametrize(("value", "path", "message"), WRONG_SHARES)
def test_what_is_no_share_is_refused_where_it_stands(value: Any, path: str, message: str) -> None:
    assert message in errors(config(data__eval=value, **EVALUATED))[path]


def test_a_share_has_its_place_in_the_file_and_none_in_training(tmp_path: Path) -> None:
    (error,) = check_config(write(tmp_path, "  train: 95%\n  eval: 100%\n")).errors[1:]
    assert (error.location.rpartition("config.yaml:")[2], error.path) == ("6:9", "data.eval")
    assert "beside no other source" in errors(config(data__train="95%"))["data.train"]


def test_mistakes_in_sources_to_evaluate_on_keep_their_paths() -> None:
    found = errors(
        config(data__eval=[{"path": "a.jsonl", "limitt": 1}, {"path": "b.jsonl", "weight": -1}], **EVALUATED)
    )
    assert list(found) == ["data.eval[0].limitt", "data.eval[1].weight"]
    assert "did you mean data.eval.limit" in found["data.eval[0].limitt"]


@pytest.mark.parametrize(
    "split", ["train", "test_sft", "train[:90%]", "[90%:]", "train[10:20]+test[-5:]", "validation.a"]
)
def test_splits_and_their_slices(split: str) -> None:
    assert warnings(config(data__train={"path": "a.jsonl", "split": split})) == []


@pytest.mark.parametrize(
    "split", ["train[:90%", "train[a:]", "train[10:20%]", "train[0.5%:]", "train[]", "train+", "a b"]
)
def test_a_split_that_cannot_be_read_is_an_error_with_examples(split: str, tmp_path: Path) -> None:
    quoted = json.dumps(split)
    (error,) = check_config(write(tmp_path, f"  train:\n    path: a.jsonl\n    split: {quoted}\n")).errors
    assert (error.path, error.line, error.col) == ("data.train[0].split", 7, 12)
    assert "train[:90%], train[100:200]" in error.message


SAME: list[tuple[Any, Any, bool]] = [
    ("a.jsonl", "a.jsonl", True),
    ("a.jsonl", "b.jsonl", False),
    ("./a.jsonl", ["b.jsonl", "a.jsonl"], True),
    ("org/rows", {"path": "org/rows", "split": "test"}, False),
    ({"path": "org/rows", "name": "a"}, {"path": "org/rows", "name": "b"}, False),
    ({"path": "a.jsonl", "split": "train[:90%]"}, {"path": "a.jsonl", "split": "train[90%:]"}, False),
    ({"path": "a.jsonl", "split": "train[:90%]"}, {"path": "a.jsonl", "split": "train[:90%]"}, True),
    ({"path": "a.jsonl", "split": "train[:90%]"}, "a.jsonl", True),
    ("a.jsonl", {"path": "a.jsonl", "limit": 5}, True),
    ({"path": "a.jsonl", "split": "train[:90%]"}, {"path": "a.jsonl", "split": "[-15%:]"}, True),
    ({"path": "a.jsonl", "split": "train[:85%]"}, {"path": "a.jsonl", "split": "[-15%:]"}, False),
    ({"path": "a.jsonl", "split": "train[:100]"}, {"path": "a.jsonl", "split": "train[99:]"}, True),
    ({"path": "a.jsonl", "split": "train[:100]"}, {"path": "a.jsonl", "split": "train[100:]"}, False),
    ({"path": "a.jsonl", "split": "train[:-100]"}, {"path": "a.jsonl", "split": "train[-100:]"}, False),
    ({"path": "d", "split": "train+test"}, {"path": "d", "split": "test[:50%]"}, True),
]


@pytest.mark.parametrize(("train", "evaluation", "same"), SAME)
def test_evaluation_on_rows_that_are_trained_on_is_a_warning(train: Any, evaluation: Any, same: bool) -> None:
    found = warnings(config(data__train=train, data__eval=evaluation, **EVALUATED))
    assert ["evaluation would be on what was trained on" in one.message for one in found] == [True] * same
    assert not same or ("data.eval: 5%" in found[0].hint and found[0].path.startswith("data.eval["))


PATHS: list[tuple[str, str, str]] = [
    ("https://host/a.jsonl", "an address", "download it, and name the file or folder, or give its id on the hub"),
    ("s3://bucket/a", "an address", "download it"),
    ("hf://datasets/org/name", "an address", "org/name"),
    ("org/name:test", "it has a split behind it", "write {path: org/name, split: test}"),
    ("rows.jsonl[:90%]", "a slice belongs to the split", "write {path: rows.jsonl, split: train[:90%]}"),
    ("./rows[100:200]", "a slice belongs to the split", "write {path: ./rows, split: train[100:200]}"),
    ("org/name@v2", "it has a revision behind it", "clone org/name at that revision"),
]


@pytest.mark.parametrize(("text", "message", "hint"), PATHS)
def test_addresses_and_ids_with_more_behind_them_say_what_to_write(text: str, message: str, hint: str) -> None:
    for part in ("train", "eval"):
        (found,) = [
            e for e in check_config(config(**{f"data__{part}": [text], **EVALUATED})).errors if "data" in e.path
        ]
        assert message in found.message
        assert hint in found.hint


def test_a_folder_that_is_missing_is_not_looked_up_on_the_hub_in_silence(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    path = write(tmp_path, "  train: [data/train, rows/*.jsonl, a.tsv, a.jsonl.gz, org/rows]\n  eval: corpus/trian\n")
    result = check_config(path)
    assert result.config is not None
    assert [source.is_local for source in result.config.data.train] == [True, True, True, True, False]
    assert not result.config.data.eval_sources[0].is_local
    (warning,) = result.warnings
    assert (warning.path, warning.hint) == ("data.eval[0]", "write ./corpus/trian for a folder")
    assert "looked up on the hub, for the folder corpus has no trian" in warning.message


def test_the_cache_folder_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    loaded = ConfigLoader.load(write(tmp_path, "  train: rows.jsonl\n  eval: 5%\n  cache_dir: cache\n"))
    assert loaded.data.cache_dir == str(tmp_path / "cache")
