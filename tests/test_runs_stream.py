"""Whole runs on a stream: gone on with, from a cache of the teacher's targets, and with another number of processes."""

import json
import logging
import shutil

import pytest
import torch
import yaml
from typer.testing import CliRunner

import kdtrain
from kdtrain.cli.app import app
from kdtrain.config import ConfigLoader
from kdtrain.errors import CheckpointError, ConfigError, TeacherError
from kdtrain.runs import read_data
from kdtrain.runs.world_size import check_world_size
from tests import tiny
from tests.test_runs_cached import chat, fit, from_cache


@pytest.fixture
def config(project, monkeypatch):
    """Six steps of four rows, of 40 in three files and one more that is bad."""
    monkeypatch.chdir(project)
    (project / "rows").mkdir()
    for number, rows in enumerate((range(15), range(15, 30), range(30, 40))):
        lines = [json.dumps(chat(i)) for i in rows] + ["{broken"] * (number == 1)
        (project / f"rows/{number}.jsonl").write_text("\n".join(lines))
    content = yaml.safe_load((project / "config.yaml").read_text())
    content["data"] = {"train": {"path": "rows", "streaming": True}, "max_length": 64, "max_bad_rows": 1}
    content["rlhf"]["lmbda"] = 0.0
    content["training"] |= {"max_steps": 6, "eval_strategy": "no", "save_strategy": "steps", "save_steps": 3}
    del content["training"]["train_sampling_strategy"], content["training"]["eval_steps"]
    (project / "config.yaml").write_text(yaml.safe_dump(content))
    return project / "config.yaml"


def test_a_run_goes_on_bit_for_bit_and_says_what_it_left_out(config, caplog):
    with caplog.at_level(logging.WARNING):
        records, whole = fit(config, "training.max_steps=11")
    assert "of the stream, 1 were bad and 0 too long" in caplog.text
    assert [record["epoch"] for record in records if "loss" in record] == pytest.approx([i / 11 for i in range(1, 12)])
    (other := config.parent / "other").mkdir()
    shutil.copytree(config.parent / "run/checkpoint-9", other / "checkpoint-9")
    shutil.copy(config.parent / "run/run_config.json", other)
    _, rest = fit(config, "training.max_steps=11", output="other", resume="auto")
    assert torch.equal(rest, whole)


def test_other_files_cannot_be_gone_on_in(config):
    fit(config)
    (config.parent / "rows/3.jsonl").write_text(json.dumps(chat(50)))
    with pytest.raises(CheckpointError, match=r"data.content"):
        fit(config, "training.max_steps=9", resume="auto")
    with pytest.raises(CheckpointError, match=r"files of data.train are others"):
        fit(config, "training.max_steps=9", resume="auto", allow_changes=["data.content"])


def test_a_stream_trains_from_a_cache_of_all_its_rows_and_stops_at_one_that_is_not_there(config, monkeypatch):
    monkeypatch.setattr(read_data, "_FIRST_ROWS", 5)
    _, of_teacher = fit(config, output="own")
    cache = config.parent / "cache"
    written = CliRunner().invoke(app, ["cache", str(config), "--out", str(cache), "--mode", "hidden"])
    assert written.exit_code == 0, written.output
    _, of_cache = fit(config, *from_cache(cache), output="cached")
    torch.testing.assert_close(of_cache, of_teacher, rtol=1e-4, atol=1e-5)
    rows = config.parent / "rows/2.jsonl"
    rows.write_text("\n".join(json.dumps(chat(i)) for i in range(1000, 1040)))
    # Behind the first rows, which are looked at before: it ends the run when its turn comes.
    with pytest.raises(TeacherError, match=r"no targets for row 0:2.jsonl:\d+"):
        fit(config, *from_cache(cache), output="more")


def test_rows_handed_over_are_not_streamed(config):
    with pytest.raises(ConfigError, match=r"kdtrain.fit streams the files"):
        kdtrain.fit(config, train_dataset=tiny.CHATS)


def test_another_number_of_processes_is_asked_for(config, tmp_path):
    loaded = ConfigLoader.load(config)
    (checkpoint := tmp_path / "checkpoint-3").mkdir()
    for rank in range(2):
        (checkpoint / f"rng_state_{rank}.pth").touch()
    with pytest.raises(CheckpointError, match=r"written by 2 processes, and there is 1") as raised:
        check_world_size(loaded, checkpoint, 1, allowed=False)
    assert raised.value.exit_code == 6
    assert "allow_world_size_change" in str(raised.value)
    check_world_size(loaded, checkpoint, 1, allowed=True)
    check_world_size(loaded, checkpoint, 2, allowed=False)
    found = CliRunner().invoke(app, ["fit", str(config), "--allow-world-size-change"])
    assert "is of a run that is resumed" in str(found.exception)


def test_the_first_rows_are_shown_and_checked_and_no_others(config):
    with (config.parent / "rows/2.jsonl").open("w") as file:
        file.write(json.dumps(chat(0)) + "\n{broken\n{broken\n")
    path = f"data.train={{path: {config.parent / 'rows'}, streaming: true, limit: 20}}"
    found = CliRunner().invoke(app, ["preview", str(config), path, "--rows", "2"])
    assert found.exit_code == 0, found.output
    assert "20 rows" in found.output or "20 of 20" in found.output
