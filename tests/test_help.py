"""`--help` of every command: on one screen, in one second, with a word to everything; and what the shell completes."""

import pytest
from click.testing import CliRunner
from typer.main import get_command

from kdtrain.cli.app import app
from kdtrain.cli.complete import option

LINES, COLUMNS = 24, 80
COMMANDS = get_command(app).commands


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_the_help_of_a_command_fits_a_screen_and_leaves_no_option_out(name):
    shown = CliRunner().invoke(get_command(app), [*filter(None, [name]), "--help"], terminal_width=COLUMNS - 2).output
    lines = shown.splitlines()
    assert len(lines) <= LINES, shown
    assert max(map(len, lines)) <= COLUMNS, shown
    assert "not available yet" not in shown.lower()
    for parameter in COMMANDS[name].params if name else ():
        assert parameter.help, parameter.name
        assert parameter.metavar in shown if parameter.metavar else parameter.opts[0] in shown


@pytest.mark.parametrize(
    ("begun", "expected"),
    [
        ("rlhf.llm", ["rlhf.llm_kd_weight="]),
        ("rlhf.teacher.back", ["rlhf.teacher.backend="]),
        ("training.early", ["training.early_stopping_patience="]),
        ("rlhf.divergence=j", ["rlhf.divergence=jsd", "rlhf.divergence=jsd_scaled"]),
        ("rlhf.seq_kd=", ["rlhf.seq_kd=true", "rlhf.seq_kd=false"]),
        ("nonsense", []),
    ],
)
def test_options_of_the_config_and_their_values_are_completed(begun, expected):
    assert option(begun) == expected


def test_the_shell_is_told_of_them(monkeypatch):
    environment = {"_KDTRAIN_COMPLETE": "complete_bash", "COMP_WORDS": "kdtrain fit c.yaml rlhf.lm", "COMP_CWORD": "3"}
    shown = CliRunner().invoke(get_command(app), [], prog_name="kdtrain", env=environment)
    assert shown.output.split() == ["rlhf.lmbda="]
