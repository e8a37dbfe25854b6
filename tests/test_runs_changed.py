"""A resumed run is compared with the one that made its checkpoint, as a user does it: options, models and data."""

import pytest

from tests.test_cli import edit, kdtrain  # noqa: F401 - a fixture

SAVE = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "eval_strategy": "no", "report": False}


@pytest.fixture
def begun(project, kdtrain):  # noqa: F811
    """A run of two steps with a checkpoint, and a command that goes on to the third."""
    edit(project, training=SAVE, data={"eval": None})
    code, _, err = kdtrain("fit", "config.yaml")
    assert code == 0, err

    def resume(*options):
        return kdtrain("fit", "config.yaml", "training.max_steps=3", "--resume", "auto", *options)

    return resume


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_that_is_the_same_goes_on_without_a_word(project, begun):
    code, _, err = begun()
    assert code == 0, err
    assert "otherwise" not in err


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("rlhf.beta=0.25", "rlhf.beta: 0.5 -> 0.25"),
        ("training.learning_rate=0.003", "training.learning_rate: "),
        ("data.max_length=900", "data.max_length: 64 -> 900"),
    ],
)
def test_a_changed_option_is_refused_and_the_command_that_insists_goes_on(project, begun, option, line):
    before = snapshot(project / "run")
    code, _, err = begun(option)
    assert code == 6, err
    assert f"  {line}" in err
    assert snapshot(project / "run") == before
    command = err.strip().splitlines()[-1].split()
    assert command[:2] == ["kdtrain", "fit"]
    code, _, err = begun(option, *command[command.index("--allow-changes") :])
    assert code == 0, err
    assert f"Going on otherwise than checkpoint-2 was made: {line}" in err
