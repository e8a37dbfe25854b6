import json

import pytest

from kdtrain.errors import PreflightError
from kdtrain.runs.status import tracked_status, write_status


def read(folder):
    return json.loads((folder / "status.json").read_text())


def test_the_first_failure_is_the_one_that_stays(tmp_path):
    write_status(tmp_path, "running", None, "")
    write_status(tmp_path, "failed", 3, "the cause")
    write_status(tmp_path, "failed", 1, "what followed")
    assert (read(tmp_path)["exit_code"], read(tmp_path)["message"]) == (3, "the cause")
    write_status(tmp_path, "running", None, "")  # the next attempt
    write_status(tmp_path, "failed", 5, "another cause")
    assert read(tmp_path)["exit_code"] == 5


def test_a_run_that_never_began_leaves_no_folder(tmp_path):
    @tracked_status(tmp_path / "run")
    def build():
        (tmp_path / "run").mkdir()  # as the Trainer does when it is built
        raise PreflightError("no")

    with pytest.raises(PreflightError):
        build()
    assert not (tmp_path / "run").exists()


def test_only_rank_0_says_that_a_run_has_finished(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    write_status(tmp_path, "finished", 0, "")
    assert not (tmp_path / "status.json").exists()
    write_status(tmp_path, "failed", 5, "")
    assert read(tmp_path)["rank"] == 1
