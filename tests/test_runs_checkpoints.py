"""Checkpoints: what the manifest says, what is taken and what is skipped, which line a run follows, what is removed."""

import os
import shutil
import stat

import pytest
import torch
from safetensors.torch import load_file

from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.runs import manifest, rotation
from kdtrain.runs.checkpoints import checkpoint_to_resume, newest_complete, why_not
from kdtrain.runs.manifest import read_manifest, write_manifest
from tests import test_cli, tiny
from tests.test_cli import edit

kdtrain = test_cli.kdtrain

EVERY = ["training.save_strategy=steps", "training.save_steps=1", "training.eval_strategy=no", "data.eval=null"]
KEEP_ALL = "training.save_total_limit=null"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """The checkpoints of a run of two steps."""
    from kdtrain.config import ConfigLoader
    from kdtrain.runs.fit import fit
    from tests.test_vision_fit import Silent

    project = tiny.make_project(tmp_path_factory.mktemp("saved"), tokenizer)
    options = [*EVERY, "training.max_steps=2", f"training.output_dir={project / 'run'}"]
    fit(ConfigLoader.load_training_config(project / "config.yaml", overrides=options), Silent())
    return project / "run"


@pytest.fixture
def run(saved, tmp_path):
    """A copy of them."""
    for step in (1, 2):
        shutil.copytree(saved / f"checkpoint-{step}", tmp_path / "copy" / f"checkpoint-{step}")
    return tmp_path / "copy"


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- the manifest ----------------------------------------------------------------------------------------------------


def test_the_manifest_holds_every_file_of_a_checkpoint(run):
    checkpoint = run / "checkpoint-2"
    found = read_manifest(checkpoint)
    assert found["files"].keys() == content(checkpoint).keys() - {"kdtrain_manifest.json"}
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "unlogged_0.safetensors"} <= found["files"].keys()
    facts = {key: found[key] for key in ("version", "step", "world_size", "finite", "resumed_from")}
    assert facts == {
        "version": 2, "step": 2, "world_size": 1, "finite": True, "resumed_from": None,
    }  # fmt: skip
    assert found["facts"].keys() == {"config", "training", "content", "data"}
    assert {"torch", "transformers", "trl"} <= found["versions"].keys()


def test_other_users_may_read_weights_as_they_may_other_files(saved):
    modes = {path.relative_to(saved): stat.S_IMODE(path.stat().st_mode) for path in saved.rglob("*") if path.is_file()}
    assert sum(path.suffix == ".safetensors" for path in modes) == 5  # the model, and two files of each checkpoint
    assert len(set(modes.values())) == 1, modes


def test_all_files_are_on_the_disk_before_the_manifest_is_and_it_before_its_name(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "global_step1").mkdir(parents=True)
    for name in ("model.safetensors", "global_step1/rank_0.pt"):  # in folders, as DeepSpeed writes
        (checkpoint / name).write_bytes(name.encode())
    done, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.readlink(f"/proc/self/fd/{number}")))
    monkeypatch.setattr(os, "replace", lambda new, old: (done.append("renamed"), replace(new, old)))
    write_manifest(checkpoint, step=1, world_size=1, finite=True)
    renamed = done.index("renamed")
    assert {str(checkpoint / name) for name in ("model.safetensors", "global_step1/rank_0.pt")} < set(done[:renamed])
    assert "kdtrain_manifest.json" in done[renamed - 1]
    assert {str(checkpoint), str(checkpoint / "global_step1"), str(tmp_path)} == set(done[renamed + 1 :])
    assert read_manifest(checkpoint)["files"].keys() == {"model.safetensors", "global_step1/rank_0.pt"}


# ---- damage ----------------------------------------------------------------------------------------------------------


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    os.truncate(path, 0)


DAMAGES = {"truncated": truncate, "zeroed": zero, "flipped": flip, "empty": empty, "missing": os.remove}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_any_kind_is_skipped_by_auto_and_refused_by_name(run, damage):
    checkpoint = run / "checkpoint-2"
    for name, before in content(checkpoint).items():
        if (name, damage) == ("kdtrain_manifest.json", "missing"):
            continue
        DAMAGES[damage](checkpoint / name)
        found = newest_complete(run)
        assert found.newest == run / "checkpoint-1", name
        assert name in found.skipped["checkpoint-2"]
        with pytest.raises(CheckpointError, match=rf"cannot be resumed from: it .*{name}.* Name another one, such as"):
            checkpoint_to_resume(run, str(checkpoint))
        (checkpoint / name).write_bytes(before)
    assert newest_complete(run).newest == checkpoint


def test_no_byte_of_a_manifest_changes_unseen(run):
    manifest = run / "checkpoint-2" / "kdtrain_manifest.json"
    before = manifest.read_bytes()
    for place in range(0, len(before) - 1, len(before) // 97):
        changed = bytearray(before)
        changed[place] ^= 1
        manifest.write_bytes(changed)
        assert read_manifest(run / "checkpoint-2") == {}, before[place - 20 : place + 20]
    assert '"version": 2' in before.decode()
    manifest.write_text(before.decode().replace('"xxh3_128"', '"other"'))
    assert read_manifest(run / "checkpoint-2") == {}


def test_where_all_are_damaged_the_run_ends_with_6_and_nothing_is_written_over(project, kdtrain):
    assert kdtrain("fit", "config.yaml", *EVERY)[0] == 0
    for checkpoint in (project / "run").glob("checkpoint-*"):
        flip(checkpoint / "model.safetensors")
    before = content(project / "run")
    code, _, err = kdtrain("fit", "config.yaml", *EVERY, "--resume", "auto")
    assert code == 6
    assert "checkpoint-4 has a damaged model.safetensors (its content is not what was saved); checkpoint-3 has" in err
    assert content(project / "run") == before


def test_sizes_alone_are_compared_where_that_is_asked_for(run, monkeypatch):
    flip(run / "checkpoint-2" / "optimizer.pt")
    monkeypatch.setenv("KDTRAIN_VERIFY", "sizes")
    assert newest_complete(run).newest == run / "checkpoint-2"
    truncate(run / "checkpoint-2" / "optimizer.pt")
    assert newest_complete(run).newest == run / "checkpoint-1"
    write_manifest(run / "checkpoint-2", step=2, world_size=1, finite=True)
    assert {facts["xxh3_128"] for facts in read_manifest(run / "checkpoint-2")["files"].values()} == {None}
    monkeypatch.delenv("KDTRAIN_VERIFY")
    assert newest_complete(run).newest == run / "checkpoint-2"
    monkeypatch.setenv("KDTRAIN_VERIFY", "none")
    with pytest.raises(ConfigError, match="must be hashes or sizes"):
        checkpoint_to_resume(run, "auto")


# ---- without a manifest ----------------------------------------------------------------------------------------------


def without_manifest(run):
    for step in (1, 2):
        (run / f"checkpoint-{step}" / "kdtrain_manifest.json").unlink(missing_ok=True)
    return run / "checkpoint-2"


def test_a_checkpoint_of_another_tool_is_taken_with_a_line_that_says_so(run, caplog):
    checkpoint = without_manifest(run)
    assert checkpoint_to_resume(run, "auto") == checkpoint
    assert "has no kdtrain_manifest.json (another tool or an earlier version has written it)" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_without_a_manifest_what_cannot_be_read_is_skipped(run, damage):
    checkpoint = without_manifest(run)
    for name, before in content(checkpoint).items():
        seen = name.endswith((".json", ".safetensors", ".pt", ".pth"))
        if damage == "flipped":  # these have a checksum, but for the gaps between their entries
            seen = name in ("optimizer.pt", "rng_state.pth")
        if damage == "missing":
            seen = name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
        if not seen:
            continue
        DAMAGES[damage](checkpoint / name)
        reason = why_not(checkpoint)
        assert reason is not None, name
        assert name in reason
        (checkpoint / name).write_bytes(before)
    assert why_not(checkpoint) is None


# ---- state that no run can go on from --------------------------------------------------------------------------------


def test_a_checkpoint_whose_optimizer_state_is_not_finite_is_not_taken(project, kdtrain, monkeypatch):
    from kdtrain.trainer import GKDTrainerWithMetrics

    original = GKDTrainerWithMetrics.create_optimizer

    def create_optimizer(trainer, *args):
        optimizer = original(trainer, *args)

        def overflow(*_):
            if trainer.state.global_step >= 1:  # of the second step on; its weights stay finite
                next(iter(optimizer.state.values()))["exp_avg_sq"].fill_(float("inf"))

        optimizer.register_step_post_hook(overflow)
        return optimizer

    monkeypatch.setattr(GKDTrainerWithMetrics, "create_optimizer", create_optimizer)
    code, _, err = kdtrain("fit", "config.yaml", *EVERY, "training.save_total_limit=2")
    assert code == 0, err
    assert "The optimizer's state is not finite after step 2" in err
    run = project / "run"
    assert {path.name: read_manifest(path)["finite"] for path in run.glob("checkpoint-*")} == {
        "checkpoint-1": True,  # the last that is finite stays
        "checkpoint-4": False,
    }
    assert newest_complete(run).newest == run / "checkpoint-1"
    code, _, err = kdtrain("fit", "config.yaml", *EVERY, "--resume", "run/checkpoint-4")
    assert code == 6
    assert "has an optimizer state that is not finite" in err


def test_a_model_alone_is_no_state_to_go_on_from_and_the_finished_model_stays(project, kdtrain):
    edit(project, training={"save_only_model": True})
    code, out, _ = kdtrain("validate", "config.yaml", *EVERY)
    assert code == 0
    assert "training.save_only_model: checkpoints hold the model alone: --resume cannot go on from them" in out
    assert kdtrain("fit", "config.yaml", *EVERY)[0] == 0
    before = content(project / "run")
    code, _, err = kdtrain("fit", "config.yaml", *EVERY, "--resume", "auto")
    assert code == 6
    assert "checkpoint-4 holds the model alone (training.save_only_model: true)" in err
    assert content(project / "run") == before


# ---- the line of a run -----------------------------------------------------------------------------------------------


def test_a_run_that_goes_on_from_an_older_checkpoint_leaves_a_branch_and_follows_its_own(project, kdtrain):
    run, other = project / "run", ["training.learning_rate=1e-3", "training.save_total_limit=2"]
    other += ["--allow-changes", "training.learning_rate"]
    assert kdtrain("fit", "config.yaml", *EVERY, KEEP_ALL)[0] == 0
    old = {step: content(run / f"checkpoint-{step}") for step in (2, 3, 4)}
    code, _, err = kdtrain(
        "fit", "config.yaml", *EVERY, *other, "--resume", "run/checkpoint-1", "training.max_steps=2",
        "--allow-changes", "training.learning_rate",
    )  # fmt: skip
    assert code == 0, err
    assert (
        "Going on from checkpoint-1 leaves another branch behind, kept as checkpoint-2.old-1, checkpoint-3.old-1,"
        in err
    )
    assert {path.name for path in run.glob("checkpoint-?")} == {"checkpoint-1", "checkpoint-2"}
    assert read_manifest(run / "checkpoint-2")["resumed_from"] == "checkpoint-1"
    code, _, err = kdtrain("fit", "config.yaml", *EVERY, *other, "--resume", "auto")
    assert code == 0, err
    assert f"Resuming from {run / 'checkpoint-2'}" in err.replace("\n", " ").replace("  ", " ")
    assert {path.name for path in run.glob("checkpoint-?")} == {"checkpoint-3", "checkpoint-4"}  # two are kept
    assert {step: content(run / f"checkpoint-{step}.old-1") for step in (2, 3, 4)} == old
    # Back to the branch that was left, at its third step: what the other line has made since is no part of it.
    code, _, err = kdtrain("fit", "config.yaml", *EVERY, "--resume", "run/checkpoint-3.old-1")
    assert code == 0, err
    assert {path.name for path in run.glob("checkpoint-?")} == {"checkpoint-4"}
    assert content(run / "checkpoint-4")["model.safetensors"] == old[4]["model.safetensors"]
    assert (run / "checkpoint-4.old-2").is_dir()


def test_a_run_that_ends_before_its_first_save_goes_on_from_where_it_went_on_from(project, kdtrain):
    assert kdtrain("fit", "config.yaml", *EVERY, KEEP_ALL)[0] == 0
    unsaved = ["training.eval_strategy=no", "data.eval=null", "training.max_steps=3"]
    here = ["--resume", "run/checkpoint-1"]
    assert kdtrain("fit", "config.yaml", *unsaved, *here)[0] == 0
    code, _, err = kdtrain("fit", "config.yaml", *unsaved, "--resume", "auto")
    assert code == 0, err
    assert "checkpoint-1." in err
    elsewhere = "training.output_dir=second"
    assert kdtrain("fit", "config.yaml", *unsaved, elsewhere, *here)[0] == 0
    code, _, err = kdtrain("fit", "config.yaml", *unsaved, elsewhere, "--resume", "auto")
    assert code == 0, err
    assert "which the run here went on from: it has saved no checkpoint since" in " ".join(err.split())
    shutil.rmtree(project / "run" / "checkpoint-1")
    code, _, err = kdtrain("fit", "config.yaml", *unsaved, elsewhere, "--resume", "auto")
    assert code == 6, err
    assert "That one is no folder" in " ".join(err.split())


# ---- rotation --------------------------------------------------------------------------------------------------------


def make(run, *names, finite=True):
    for name in names:
        folder = run / name
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        write_manifest(folder, step=int(name.partition("-")[2].partition(".")[0]), world_size=1, finite=finite)


def names(run):
    return {path.name for path in run.iterdir()}


def test_only_checkpoints_of_the_run_are_removed(tmp_path):
    make(tmp_path, *(f"checkpoint-{step}" for step in (2, 4, 6, 10, 12)), "checkpoint-1.old-1", "checkpoint-4.bak")
    for theirs in ("checkpoint-notes", "checkpoint-3", "checkpoint-010", "checkpoint-٣"):
        (tmp_path / theirs).mkdir()
        (tmp_path / theirs / "notes.txt").touch()
    (tmp_path / "checkpoint-5").symlink_to(tmp_path / "checkpoint-4.bak")
    before = names(tmp_path)
    rotation.rotate(tmp_path, tmp_path / "checkpoint-10", 2, best="checkpoint-2")  # 12 was skipped
    assert names(tmp_path) == before - {"checkpoint-4", "checkpoint-6"}
    rotation.rotate(tmp_path, tmp_path / "checkpoint-10", None, best=None)
    assert names(tmp_path) == before - {"checkpoint-4", "checkpoint-6"}


def test_the_newest_that_is_finite_stays_whatever_comes_after(tmp_path):
    make(tmp_path, "checkpoint-1", "checkpoint-2")
    make(tmp_path, "checkpoint-3", "checkpoint-4", finite=False)
    rotation.rotate(tmp_path, tmp_path / "checkpoint-4", 2, best=None)
    assert names(tmp_path) == {"checkpoint-2", "checkpoint-4"}


def keeper(run, tmp_path):
    from kdtrain.config import ConfigLoader

    tiny.make_project(tmp_path, tiny.make_tokenizer())
    override = [f"training.output_dir={run}"]
    args = ConfigLoader.load_training_config(tmp_path / "config.yaml", overrides=override).training_args
    return rotation.CheckpointKeeper(args)


def test_a_step_that_is_saved_again_replaces_the_one_before_only_when_it_is_complete(run, tmp_path):
    checkpoint, saver = run / "checkpoint-2", keeper(run, tmp_path)
    before = content(checkpoint)
    saver.begin(checkpoint)
    assert content(checkpoint).keys() == {"kdtrain_unfinished"}
    rotation.clean_up(run)  # killed there
    assert content(checkpoint) == before
    saver.begin(checkpoint)
    (checkpoint / "new").write_text("new")
    saver.finish(checkpoint, finite=True, best=None)
    assert content(checkpoint).keys() == {"new", "kdtrain_manifest.json"}
    assert names(run) == {"checkpoint-1", "checkpoint-2"}


def test_a_folder_that_a_user_has_put_in_the_place_of_a_checkpoint_is_kept(run, tmp_path, caplog):
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "notes.txt").write_text("mine")
    saver = keeper(run, tmp_path)
    saver.begin(run / "checkpoint-3")
    saver.finish(run / "checkpoint-3", finite=True, best=None)
    assert (run / "checkpoint-3.old-1" / "notes.txt").read_text() == "mine"
    assert "holds no checkpoint: it is checkpoint-3.old-1 now" in caplog.text


def test_what_a_killed_process_was_removing_is_removed_and_never_taken(run):
    (run / "checkpoint-1").rename(run / "checkpoint-1.kdtrain-removed")
    (run / "checkpoint-1.kdtrain-removed" / "model.safetensors").unlink()
    (run / "checkpoint-7.removed").mkdir()  # a user's
    assert newest_complete(run).skipped == {}
    rotation.clean_up(run)
    assert names(run) == {"checkpoint-2", "checkpoint-7.removed"}


def test_what_a_save_that_was_cut_off_has_left_is_removed_once_a_later_one_is_complete(run):
    for step in (0, 3):
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}" / "kdtrain_unfinished").touch()
    rotation.rotate(run, run / "checkpoint-2", None, best=None)
    assert names(run) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


# ---- a checkpoint as a model -----------------------------------------------------------------------------------------


def test_a_checkpoint_is_exported_without_its_manifest_unless_it_is_damaged_and_can_be_trained_on(project, kdtrain):
    assert kdtrain("fit", "config.yaml", *EVERY)[0] == 0
    code, _, err = kdtrain("export", "run", "student-3", "--checkpoint", "3")
    assert code == 0, err
    assert not [name for name in content(project / "student-3") if "kdtrain" in name]
    same, expected = (load_file(project / name / "model.safetensors") for name in ("student-3", "run/checkpoint-3"))
    assert all(torch.equal(same[name], value) for name, value in expected.items())
    code, _, err = kdtrain("fit", "config.yaml", "model.model=run/checkpoint-3", "training.output_dir=on", "--dry-run")
    assert code == 0, err
    flip(project / "run" / "checkpoint-3" / "model.safetensors")
    for command in (["export", "run", "other"], ["evaluate", "run"]):
        code, _, err = kdtrain(*command, "--checkpoint", "3")
        assert code == 6, err
        assert "has a damaged model.safetensors" in err


# ---- several ranks ---------------------------------------------------------------------------------------------------


def fit_two_ranks(project, broken):
    """Train in this rank; with a write that fails on one of them."""
    from kdtrain.config import ConfigLoader
    from kdtrain.ranks import rank
    from kdtrain.runs.fit import fit
    from kdtrain.trainer import trainer
    from tests.test_vision_fit import Silent

    def full(*_, **__):
        raise OSError(28, "No space left on device", "some file")

    places = {
        "the manifest": (0, rotation, "write_manifest"),
        "weights": (0, trainer.GKDTrainerWithMetrics, "_save_student"),
        "trainer_state.json": (0, trainer.TrainerState if hasattr(trainer, "TrainerState") else None, "save_to_json"),
        "the other rank's sums": (1, trainer, "save_unlogged"),
    }
    if broken is not None:
        number, owner, name = places[broken]
        if owner is None:
            from transformers import TrainerState as owner
        if rank() == number:
            setattr(owner, name, full)
    options = [*EVERY, "training.max_steps=1", f"training.output_dir={project / 'run'}"]
    try:
        fit(ConfigLoader.load_training_config(project / "config.yaml", overrides=options), Silent())
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("broken", ["the manifest", "weights", "trainer_state.json", "the other rank's sums"])
def test_where_one_rank_cannot_write_all_of_them_end(project, broken):
    first, second = tiny.run_ranks(fit_two_ranks, 2, project, broken, timeout=60)
    assert "No space left on device" in first
    assert "No space left on device" in second
    assert why_not(project / "run" / "checkpoint-1") == "is not complete: the run ended while it was written"


def fit_with_a_log_that_breaks(project, step):
    """Train two steps in this rank; the record of one of them cannot be written."""
    from kdtrain.config import ConfigLoader
    from kdtrain.runs import log
    from kdtrain.runs.fit import fit
    from tests.test_vision_fit import Silent

    real = log.JsonlLogger.on_log

    def on_log(self, args, state, *rest, **kwargs):
        if state.global_step == step:
            self._path = type(self._path)("/dev/full")
        return real(self, args, state, *rest, **kwargs)

    log.JsonlLogger.on_log = on_log
    options = ["training.max_steps=3", "training.save_strategy=no", "training.eval_strategy=no", "data.eval=null"]
    options += [f"training.output_dir={project / 'run'}", "training.logging_steps=1", "training.report=false"]
    try:
        fit(ConfigLoader.load_training_config(project / "config.yaml", overrides=options), Silent())
    except CheckpointError as error:
        return str(error)


@pytest.mark.parametrize(("step", "saved_at"), [(1, 2), pytest.param(3, 3, marks=pytest.mark.faults)])
def test_a_log_that_rank_0_cannot_write_stops_all_ranks_with_their_state_saved(project, step, saved_at):
    first, second = tiny.run_ranks(fit_with_a_log_that_breaks, 2, project, step, timeout=60)
    assert first == second
    assert "Writing /dev/full failed: No space left on device." in first
    assert f"The state of step {saved_at} is saved: go on with" in first
    assert why_not(project / "run" / f"checkpoint-{saved_at}") is None


def test_the_manifest_holds_the_files_of_all_ranks(project):
    assert tiny.run_ranks(fit_two_ranks, 2, project, None) == [None, None]
    found = read_manifest(project / "run" / "checkpoint-1")
    assert found["world_size"] == 2
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} < found["files"].keys()
    assert {f"unlogged_{rank}.safetensors" for rank in (0, 1)} < found["files"].keys()
    os.remove(project / "run" / "checkpoint-1" / "rng_state_1.pth")
    assert why_not(project / "run" / "checkpoint-1") == "lacks rng_state_1.pth"


def test_ranks_take_the_checkpoint_that_rank_0_has_found_and_fail_as_it_does(run):
    assert tiny.run_ranks(both_choose, 2, run, True) == [str(run / "checkpoint-1")] * 2
    shutil.rmtree(run / "checkpoint-1")
    first, second = tiny.run_ranks(both_choose, 2, run, True)
    assert first == second
    assert "no checkpoint in" in first


def both_choose(run, damage):
    """Rank 0 finds the newer one damaged; the other would not have."""
    torch.distributed.init_process_group("gloo")
    from kdtrain.ranks import is_main

    if damage and is_main():
        flip(run / "checkpoint-2" / "model.safetensors")
    try:
        return str(checkpoint_to_resume(run, "auto"))
    except CheckpointError as error:
        return str(error)
    finally:
        if damage and is_main():
            flip(run / "checkpoint-2" / "model.safetensors")


def test_a_manifest_that_cannot_be_written_leaves_none(run, monkeypatch):
    (run / "checkpoint-2" / "kdtrain_manifest.json").unlink()

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(run / "checkpoint-2", step=2, world_size=1, finite=True)
    assert not [name for name in content(run / "checkpoint-2") if "manifest" in name]
