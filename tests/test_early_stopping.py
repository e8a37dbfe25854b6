"""The best step, early stopping, and which model is saved: from the command line, and after a resume."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from kdtrain.config import check_config
from kdtrain.errors import PreflightError
from tests import test_cli
from tests.test_cli import edit
from tests.test_runs_checkpoints import flip
from tests.test_trainer import make_trainer

kdtrain = test_cli.kdtrain

# Steps that jump: an evaluation is better than the one before it by chance, and the same chance every time.
JUMPING = {"learning_rate": 0.6, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4, "max_steps": 30,
           "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "early_stopping_patience": 2}  # fmt: skip


def evaluations(run):
    records = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    return {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}


def status(run):
    return json.loads((run / "status.json").read_text())


def same_weights(a, b):
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return all(torch.equal(value, second[name]) for name, value in first.items())


def steps_of_checkpoints(run):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*"))


@pytest.mark.parametrize("keeps_best", [True, False])
def test_it_stops_where_patience_ends_and_says_which_step_won(project, kdtrain, keeps_best):
    edit(project, training={**JUMPING, "load_best_model_at_end": keeps_best})
    code, out, err = kdtrain("fit", "config.yaml")
    assert code == 0, err
    run = project / "run"
    losses = evaluations(run)
    best = min(losses, key=losses.get)
    assert best > 1
    assert max(losses) == best + 2 < 30
    assert status(run)["best"] == {"step": best, "metric": "eval_loss", "value": losses[best]}
    assert (status(run)["step"], status(run)["last_checkpoint"]) == (best + 2, f"checkpoint-{best + 2}")
    (last_line,) = out.splitlines()
    assert f"stopped early at step {best + 2} of 30" in last_line
    assert f"best eval_loss {losses[best]:.4g} at step {best}" in last_line
    model = f"model of step {best} (best)" if keeps_best else f"model of step {best + 2} (last)"
    assert model in last_line
    assert steps_of_checkpoints(run) == [best, best + 2]  # two are kept, and the best is one of them
    assert same_weights(run, run / f"checkpoint-{best if keeps_best else best + 2}")


@pytest.mark.slow
def test_a_resumed_run_stops_where_the_uninterrupted_one_does_bit_for_bit(project, kdtrain):
    edit(project, training={**JUMPING, "load_best_model_at_end": True, "save_total_limit": None})
    assert kdtrain("fit", "config.yaml")[0] == 0
    run, whole = project / "run", project / "whole"
    losses = evaluations(run)
    best = min(losses, key=losses.get)
    shutil.move(run, whole)
    for step in (best - 1, best, best + 1):
        run.mkdir()
        shutil.copytree(whole / f"checkpoint-{step}", run / f"checkpoint-{step}")
        if step > best:
            shutil.copytree(whole / f"checkpoint-{best}", run / f"checkpoint-{best}")
        code, out, err = kdtrain("fit", "config.yaml", "--resume", "auto")
        assert code == 0, err
        assert f"model of step {best} (best)" in out
        assert {step: loss for step, loss in losses.items() if step in evaluations(run)} == evaluations(run)
        assert max(evaluations(run)) == max(losses)
        assert same_weights(run, whole)
        assert status(run)["best"] == status(whole)["best"]
        shutil.rmtree(run)


def test_a_run_that_stopped_early_has_nothing_left_and_goes_on_with_more_patience(project, kdtrain):
    edit(project, training={**JUMPING, "load_best_model_at_end": True})
    assert kdtrain("fit", "config.yaml")[0] == 0
    run = project / "run"
    before, stopped_at = load_file(run / "model.safetensors"), status(run)["step"]
    (run / "model.safetensors").unlink()  # as where it was killed before it was saved
    best = run / f"checkpoint-{status(run)['best']['step']}" / "model.safetensors"
    flip(best)
    code, _, err = kdtrain("fit", "config.yaml", "--resume", "auto")
    assert code == 6, err
    assert "the best checkpoint (training.load_best_model_at_end), has a damaged model.safetensors" in err
    assert not (run / "model.safetensors").exists()
    flip(best)
    code, out, err = kdtrain("fit", "config.yaml", "--resume", "auto")
    assert code == 0, err
    assert f"stopped early, at step {stopped_at} of 30: nothing is left to train" in err
    assert "(best)" in out
    after = load_file(run / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    arguments = ("--resume", "auto", "training.early_stopping_patience=3")
    assert kdtrain("fit", "config.yaml", *arguments)[0] == 0
    assert status(run)["step"] > stopped_at


def test_equal_evaluations_are_no_better_and_without_patience_the_run_goes_to_its_end(
    project,
    kdtrain,
):
    edit(project, training={"learning_rate": 0.0, "eval_steps": 1})
    assert kdtrain("fit", "config.yaml")[0] == 0
    assert status(project / "run")["best"]["step"] == 1
    assert status(project / "run")["step"] == 4


def test_more_of_an_accuracy_is_better(project, kdtrain):
    edit(project, training={**JUMPING, "save_strategy": "no", "metric_for_best_model": "token_accuracy"})
    assert kdtrain("fit", "config.yaml")[0] == 0
    run = project / "run"
    records = [json.loads(line) for line in (run / "logging.jsonl").read_text().splitlines()]
    found = {record["step"]: record for record in records if "eval_loss" in record}
    best = max(found, key=lambda step: found[step]["eval_token_accuracy"])
    assert status(run)["best"] == {
        "step": best, "metric": "eval_token_accuracy", "value": found[best]["eval_token_accuracy"]
    }  # fmt: skip
    assert max(found) == best + 2
    assert all(record["eval_early_stop_metric"] == record["eval_token_accuracy"] for record in found.values())


def test_without_evaluation_there_is_no_best_step_and_patience_is_an_error(
    project, kdtrain, tmp_path, student, teacher
):
    edit(project, data={"eval": None}, training={"eval_strategy": "no", "eval_steps": None})
    assert kdtrain("fit", "config.yaml", "training.max_steps=1")[0] == 0
    assert status(project / "run")["best"] is None
    result = check_config(project / "config.yaml", ["training.early_stopping_patience=2"])
    assert [(error.path, error.message) for error in result.errors] == [
        ("training.early_stopping_patience", "needs evaluation")
    ]
    with pytest.raises(PreflightError, match="early_stopping_patience needs evaluation"):
        make_trainer(tmp_path, student, teacher, early_stopping_patience=2).train()
