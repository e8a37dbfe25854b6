"""The teacher that a run has made is closed on every way out of it."""

import os
import signal

import pytest
from transformers import TrainerCallback

import kdtrain
from kdtrain.errors import Interrupted, KdtrainError, NonFiniteError
from kdtrain.runs import build
from kdtrain.teachers import LocalTeacher

closed = []


class Recording(LocalTeacher):
    def close(self):
        closed.append(self)


@pytest.fixture
def made(monkeypatch):
    """The teachers that runs make; they note when they are closed."""
    found, original = [], build.build_teacher
    closed.clear()

    def build_teacher(*args, **kwargs):
        found.append(Recording(original(*args, **kwargs).module))
        return found[-1]

    monkeypatch.setattr(build, "build_teacher", build_teacher)
    return found


class At(TrainerCallback):
    """Does something at the beginning of the second step."""

    def __init__(self, action):
        self.action = action

    def on_step_begin(self, args, state, control, **_):
        assert not closed
        if state.global_step == 1:
            self.action()


def fail():
    raise NonFiniteError("as a loss that is not finite")


WAYS = {
    "finished": ({}, None),
    "dry run": ({"dry_run": True}, None),
    "error": ({"callbacks": [At(fail)]}, NonFiniteError),
    "bug": ({"callbacks": [At(lambda: 1 / 0)]}, ZeroDivisionError),
    "SIGINT": ({"callbacks": [At(lambda: os.kill(os.getpid(), signal.SIGINT))]}, Interrupted),
    "SIGTERM": ({"callbacks": [At(lambda: os.kill(os.getpid(), signal.SIGTERM))]}, Interrupted),
    "a trainer that cannot be built": ({"overrides": ["training.lr_scheduler_kwargs={nothing: 1}"]}, KdtrainError),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_that_the_run_has_made_is_closed(project, made, way):
    arguments, error = WAYS[way]
    if error is None:
        kdtrain.fit(project / "config.yaml", quiet=True, **arguments)
    else:
        with pytest.raises(error):
            kdtrain.fit(project / "config.yaml", quiet=True, **arguments)
    assert len(made) == 1
    assert closed == made


def test_one_that_was_handed_over_is_left_to_who_made_it(project, made, teacher):
    mine = Recording(teacher)
    kdtrain.fit(project / "config.yaml", ["training.max_steps=1"], teacher=mine, quiet=True)
    kdtrain.fit(project / "config.yaml", ["training.output_dir=again"], teacher=mine, dry_run=True, quiet=True)
    assert (made, closed) == ([], [])
