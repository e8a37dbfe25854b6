"""Trackers that fail: one warning, training goes on, every record is in logging.jsonl, and the model is saved."""

import json
import time

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from kdtrain.runs.signals import time_limit
from kdtrain.trainer import trackers
from tests import test_cli, tiny
from tests.small_disk import fill, mounted
from tests.test_cli import edit

kdtrain = test_cli.kdtrain
EVENTS = ("on_init_end", "on_train_begin", "on_log", "on_save", "on_evaluate", "on_step_end", "on_train_end")
RUN = ["training.max_steps=4", "training.save_strategy=steps", "training.save_steps=2", "training.report=false"]


@pytest.fixture
def wandb(project, monkeypatch):
    """In place of wandb: what its hooks do is decided by the test. Calls are noted as (event, step)."""
    calls, actions = [], {}

    class Tracker(TrainerCallback):
        pass

    def hook(event):
        def called(self, args, state, control, **kwargs):
            calls.append((event, state.global_step))
            assert kwargs["model"] is not None
            if event in actions:
                actions[event]()

        return called

    for event in EVENTS:
        setattr(Tracker, event, hook(event))
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    (project / "wandb.py").write_text("")  # the package is installed
    monkeypatch.syspath_prepend(project)
    edit(project, training={"report_to": "wandb"})
    return calls, actions


def raises(error):
    def action():
        raise error

    return action


def assert_complete(project, code, err):
    assert code == 0, err
    steps = [json.loads(line)["step"] for line in (project / "run" / "logging.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4]
    assert (project / "run" / "model.safetensors").exists()
    assert (project / "run" / "checkpoint-4").is_dir()
    assert json.loads((project / "run" / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize("event", tiny.one_in(3, EVENTS))
def test_a_tracker_that_fails_in_any_of_its_hooks_is_one_warning(project, kdtrain, wandb, event):
    calls, actions = wandb
    actions[event] = raises(ConnectionError("api.wandb.ai is \x1b[31mdown"))
    code, _, err = kdtrain("fit", "config.yaml", *RUN)
    assert_complete(project, code, err)
    warning = r"The tracker wandb has failed (ConnectionError: api.wandb.ai is \x1b[31mdown). Training goes on"
    assert err.count("The tracker") == err.count(warning) == 1
    # What cannot begin is not tried again; what fails now and then is, but not for ever.
    times = {"on_log": 3, "on_save": 2, "on_step_end": 3}  # of six, two and four
    assert [called for called, _ in calls].count(event) == times.get(event, 1)


def test_a_tracker_that_ends_the_process_for_want_of_a_login_does_not(project, kdtrain, wandb):
    wandb[1]["on_train_begin"] = raises(SystemExit(1))
    code, _, err = kdtrain("fit", "config.yaml", *RUN)
    assert_complete(project, code, err)
    assert wandb[0] == [("on_init_end", 0), ("on_train_begin", 0)]


def test_the_model_is_saved_before_a_tracker_comes_to_its_end_and_one_that_hangs_is_left(
    project, kdtrain, wandb, monkeypatch
):
    seen = []

    def hang():
        seen.append((project / "run" / "model.safetensors").exists())
        time.sleep(60)

    wandb[1]["on_train_end"] = hang
    monkeypatch.setitem(trackers.LONGEST_S, "on_train_end", 0.3)
    began = time.monotonic()
    code, _, err = kdtrain("fit", "config.yaml", *RUN)
    assert_complete(project, code, err)
    assert seen == [True]
    assert time.monotonic() - began < 50
    assert "The tracker wandb has failed (TimeoutError: no answer within 0 s)" in err


def test_what_a_caller_s_own_callback_raises_is_raised(project, monkeypatch):
    import kdtrain as package

    class Mine(TrainerCallback):
        def on_log(self, *_, **__):
            raise ValueError("mine")

    monkeypatch.chdir(project)
    with pytest.raises(ValueError, match="mine"):
        package.fit("config.yaml", ["training.report=false"], callbacks=[Mine()])


@pytest.mark.parametrize("kind", ["a file in the place of its folder", "a full disk", "a read-only disk"])
def test_tensorboard_without_a_place_to_write_to(project, kdtrain, monkeypatch, kind):
    pytest.importorskip("tensorboard")
    edit(project, training={"report_to": "tensorboard"})
    place = project / "board"
    if kind == "a file in the place of its folder":
        place.write_text("")
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(place))
        code, _, err = kdtrain("fit", "config.yaml", *RUN)
    else:
        with mounted(place, 65_536, ",ro" if "only" in kind else ""):
            monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(place))
            if kind == "a full disk":
                fill(place)
            code, _, err = kdtrain("fit", "config.yaml", *RUN)
    assert_complete(project, code, err)
    assert err.count("The tracker tensorboard has failed") == 1
    assert "Traceback" not in err


def test_a_package_that_is_missing_is_said_before_anything_is_loaded(project, kdtrain):
    code, _, err = kdtrain("fit", "config.yaml", "training.report_to=comet_ml")
    assert code == 2
    assert "comet_ml needs the package comet-ml, which is not installed" in err


def test_a_time_limit_lets_the_timer_go_on_that_was_there(monkeypatch):
    import signal

    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(True))
    previous = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with time_limit(30):
            pass
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        with pytest.raises(TimeoutError, match="no answer within"), time_limit(0.05):
            time.sleep(10)
        time.sleep(0.3)
        assert rang == [True]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *previous)
