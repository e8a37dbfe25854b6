"""A disk that is full, read-only or broken, wherever a command writes: exit code 6, the path, the bytes, a way out."""

import errno
import json
import re
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from kdtrain.disk import failure_of, free_bytes, writing
from kdtrain.errors import CheckpointError, PreflightError
from kdtrain.runs import log
from kdtrain.trainer import GKDTrainerWithMetrics
from tests import test_cli
from tests.small_disk import fill, largest_file, mounted

kdtrain = test_cli.kdtrain
STEPS = ["training.max_steps=4", "training.save_strategy=steps", "training.save_steps=2", "training.report=false"]
MIB = 2**20


def steps(run):
    return [json.loads(line)["step"] for line in (run / "logging.jsonl").read_text().splitlines()]


def at_step(step, action, monkeypatch):
    """Do something as a step of training begins, once."""
    done, real = [], GKDTrainerWithMetrics.training_step

    def training_step(trainer, *args, **kwargs):
        if trainer.state.global_step == step - 1 and not done:
            done.append(action())
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(GKDTrainerWithMetrics, "training_step", training_step)
    return done


# ---- what libraries say ----------------------------------------------------------------------------------------------


def torch_writes(path):
    torch.save({"a": torch.zeros(100_000)}, path)


def safetensors_writes(path):
    save_file({"a": torch.zeros(100_000)}, path)


def python_writes(path):
    path.write_bytes(bytes(400_000))


@pytest.mark.parametrize("write", [torch_writes, safetensors_writes, python_writes])
@pytest.mark.parametrize("kind", ["a limit", "a disk"])
def test_a_file_that_does_not_fit_is_one_error_whoever_writes_it(tmp_path, write, kind):
    small = largest_file(65_536) if kind == "a limit" else mounted(tmp_path / "disk", 65_536)
    path = tmp_path / ("model" if kind == "a limit" else "disk/model")
    said = writing(path, "Then go on.", lambda: "it takes 0.4 MiB")
    with small, pytest.raises(CheckpointError) as caught, said:
        write(path)
    message = str(caught.value)
    assert message.startswith(f"Writing {path} failed: ")
    assert re.search(r"\d [MG]iB are free there, and it takes 0\.4 MiB\. ", message)
    assert message.endswith(("Make room there. Then go on.", "see ulimit -f. Then go on."))
    assert caught.value.exit_code == 6


def test_the_way_out_is_that_of_the_reason(tmp_path):
    for code, way_out in (
        (errno.EROFS, "Let this user write there."),
        (errno.EIO, "look at it (dmesg)"),
        (errno.ENOENT, "was moved or deleted"),
        (errno.EMFILE, "ulimit -n"),
    ):
        with pytest.raises(CheckpointError) as caught, writing(tmp_path / "file"):
            raise OSError(code, "said by the system")
        assert way_out in str(caught.value)
        assert "free" not in str(caught.value)


def around(error):
    """As `datasets` raises it."""
    outer = RuntimeError("An error occurred while generating the dataset")
    outer.__cause__ = error
    return outer


def test_an_error_around_it_is_seen_through_and_others_pass(tmp_path):
    with pytest.raises(CheckpointError, match="No space left"), writing(tmp_path):
        raise around(OSError(errno.ENOSPC, "No space left on device"))
    said = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert failure_of(said).code == errno.ENOSPC
    for other in (ConnectionResetError(104, "reset"), OSError(errno.ENOMEM, "no memory"), ValueError("x")):
        assert failure_of(other) is None
        with pytest.raises(type(other)), writing(tmp_path):
            raise other
    assert free_bytes(tmp_path / "not" / "there") > 0


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_while_a_checkpoint_is_saved_leaves_the_older_one_and_the_run_goes_on(
    project, kdtrain, monkeypatch
):
    with mounted(project / "disk", 4 * MIB) as disk:
        with monkeypatch.context() as patched:
            at_step(4, lambda: fill(disk, leave=100_000), patched)
            code, _, err = kdtrain("fit", "config.yaml", "training.output_dir=disk/run", *STEPS)
        assert code == 6, err
        assert re.search(r"Writing \S+/disk/run\S* failed: .*MiB are free there, and a checkpoint takes about", err)
        lost = (
            "newest checkpoint is checkpoint-2: what was trained since, up to step 4, is lost. Then go on with kdtrain"
        )
        assert lost in " ".join(err.split())
        assert "--resume auto" in err
        assert "Traceback" not in err
        run = disk / "run"
        assert not (run / "model.safetensors").exists()
        assert json.loads((run / "status.json").read_text())["state"] == "failed"
        (disk / "filler").unlink()
        code, _, err = kdtrain("fit", "config.yaml", "training.output_dir=disk/run", *STEPS, "--resume", "auto")
        assert code == 0, err
        assert "checkpoint-2" in err
        assert steps(run) == [1, 2, 3, 4, 4]
        assert (run / "model.safetensors").exists()


@pytest.mark.parametrize("saving", ["no", "steps"])
def test_a_file_that_may_not_be_as_large_as_the_model_ends_the_run_where_nothing_is_mounted(project, kdtrain, saving):
    with largest_file(100_000):  # below the model's size, above those of logs
        code, _, err = kdtrain("fit", "config.yaml", *STEPS, f"training.save_strategy={saving}")
    assert code == 6, err
    assert re.search(r"Writing \S+/run\S* failed: .*ulimit -f", err)
    step, strategy = {"no": (4, "no"), "steps": (2, "steps")}[saving]
    lost = f"No checkpoint was saved (training.save_strategy: {strategy}): all {step} steps are lost. Then go on with"
    assert lost in " ".join(err.split())
    assert not list((project / "run").glob("*.safetensors"))
    assert not (project / "run" / ".model.tmp").exists()


def test_a_log_that_cannot_be_written_ends_the_run_with_its_state_saved(project, kdtrain, monkeypatch):
    real = log.JsonlLogger.on_log

    def on_log(self, args, state, *rest, **kwargs):
        if state.global_step == 3:
            monkeypatch.setattr(self, "_path", type(self._path)("/dev/full"))
        return real(self, args, state, *rest, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(log.JsonlLogger, "on_log", on_log)
        code, _, err = kdtrain("fit", "config.yaml", *STEPS)
    assert code == 6, err
    assert "Writing /dev/full failed: No space left on device." in err
    assert "The state of step 3 is saved: go on with kdtrain fit config.yaml" in " ".join(err.split())
    assert json.loads((project / "run" / "status.json").read_text())["last_checkpoint"] == "checkpoint-3"
    code, _, err = kdtrain("fit", "config.yaml", *STEPS, "--resume", "auto")
    assert code == 0, err


def test_the_error_is_not_hidden_by_a_status_that_cannot_be_written_either(project, kdtrain, monkeypatch):
    with mounted(project / "disk", 4 * MIB) as disk:
        at_step(3, lambda: fill(disk), monkeypatch)
        code, _, err = kdtrain("fit", "config.yaml", "training.output_dir=disk/run", *STEPS)
    assert code == 6, err
    assert re.search(r"(logging\.jsonl|status\.json) failed: No space left on device\. 0\.0 MiB are free there\.", err)


def test_encoded_rows_that_do_not_fit_are_exit_code_6(project, kdtrain):
    with mounted(project / "disk", 16_384):
        code, _, err = kdtrain("fit", "config.yaml", "data.cache_dir=disk")
    assert code == 6, err
    assert re.search(r"Writing \S+/disk failed: No space left on device\. 0\.0 MiB are free", err)
    assert "data.cache_dir" in err
    assert not (project / "run").exists()


def test_a_table_that_datasets_cannot_copy_for_want_of_room_is_no_broken_table(tmp_path):
    from kdtrain.data.files import cannot_read

    error = around(OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(cannot_read("data.parquet", error), CheckpointError)
    assert isinstance(cannot_read("data.parquet", ValueError("not a table")), PreflightError)


def test_answers_of_the_teacher_that_do_not_fit_are_exit_code_6(project, kdtrain, monkeypatch):
    from kdtrain.generation import answers

    rows = "data.train=[{path: train.jsonl, answers: teacher}]"
    options = [rows, "rlhf.max_new_tokens=4", "training.max_steps=1", "training.report=false"]
    with mounted(project / "disk", 4 * MIB) as disk:
        real = answers._line

        def line(*args):
            if not (disk / "filler").exists():
                fill(disk)
            return real(*args)

        with monkeypatch.context() as patched:
            patched.setattr(answers, "_line", line)
            code, _, err = kdtrain("fit", "config.yaml", "training.output_dir=disk/run", *options)
        assert code == 6, err
        assert re.search(r"Writing \S+/disk/run\S* failed: No space left on device\.", err)
        assert "Traceback" not in err


# ---- other commands --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["export", "report", "init", "cache"])
def test_other_commands_say_it_too(project, kdtrain, command):
    if command in ("export", "report"):
        assert kdtrain("fit", "config.yaml", "training.max_steps=1", "training.report=false")[0] == 0
    with mounted(project / "disk", 4 * MIB) as disk:
        arguments = {
            "export": ("export", "disk/run", "disk/out"),
            "report": ("report", "disk/run"),
            "init": ("init", "lora-chats", "disk"),
            "cache": ("cache", "config.yaml", "--out", "disk/cache"),
        }[command]
        if (project / "run").exists():
            shutil.copytree(project / "run", disk / "run")
        fill(disk)
        code, _, err = kdtrain(*arguments)
    assert "disk" in err
    assert re.search(r"No space left on device|0\.0 MiB are free|0 bytes left|has 0 bytes", err), err
    seen_before = command in ("export", "cache") and "failed" not in err
    assert code == (3 if seen_before else 6), err


def test_a_read_only_disk_in_the_middle_of_a_run(project, kdtrain, monkeypatch):
    import subprocess

    with mounted(project / "disk", 4 * MIB) as disk:
        read_only = ["mount", "-o", "remount,ro", str(disk)]
        at_step(2, lambda: subprocess.run(read_only, check=False).returncode, monkeypatch)
        code, _, err = kdtrain("fit", "config.yaml", "training.output_dir=disk/run", *STEPS)
    assert code == 6, err
    assert re.search(r"Writing \S+ failed: Read-only file system\. Let this user write there\.", err)
    assert "Traceback" not in err


# ---- a run folder that goes away -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["moved", "deleted", "another in its place"])
def test_a_run_whose_folder_goes_away_writes_nothing_elsewhere(project, kdtrain, monkeypatch, kind):
    run, moved = project / "run", project / "moved"

    def go_away():
        run.rename(moved)
        if kind == "deleted":
            shutil.rmtree(moved)
        elif kind == "another in its place":
            run.mkdir()
        return True

    at_step(2, go_away, monkeypatch)
    code, _, err = kdtrain("fit", "config.yaml", *STEPS, "training.logging_steps=10")
    assert code == 6, err
    assert "training.output_dir" in err
    assert "was moved, deleted or replaced while the run went on. Nothing was written elsewhere." in err
    assert not run.exists() or not list(run.iterdir())
    assert moved.exists() == (kind != "deleted")


def test_a_log_is_not_begun_anew_in_a_folder_that_has_taken_the_place_of_the_run_s(project, kdtrain, monkeypatch):
    run = project / "run"
    at_step(2, lambda: (run.rename(project / "moved"), run.mkdir()), monkeypatch)
    code, _, err = kdtrain("fit", "config.yaml", "training.report=false")
    assert code == 6, err
    assert not list(run.iterdir())
