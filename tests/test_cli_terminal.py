"""What a user sees while a run goes: on a terminal, in a log, as JSON, and where the traceback of a failure is."""

import datetime
import io
import json
import os
import pty
import re
import socket
import sys
import termios
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from kdtrain.cli.history import Lines, Table, number
from kdtrain.cli.terminal import is_live
from tests import test_cli
from tests.test_cli import edit

kdtrain = test_cli.kdtrain

RECORD = {"loss": 2.21, "llm_kd_loss": 0.28, "sft_loss": 1.93, "on_policy_fraction": 0.4, "token_accuracy": 0.31,
          "teacher_agreement": 0.44, "grad_norm": 1.5, "completion_length": 60.0, "cut_fraction": 0.1,
          "tokens_per_second": 12345.6, "remaining_s": 3725.0}  # fmt: skip
EVALUATION = {"eval_loss": 2.1, "eval_llm_kd_loss": 0.25, "eval_sft_loss": 1.85, "eval_token_accuracy": 0.33}


# ---- the table -------------------------------------------------------------------------------------------------------


def test_a_row_fits_80_and_120_columns_and_what_matters_most_is_in_it():
    titles = {}
    for width in (80, 120):
        header, row = Table(lambda width=width: width, 1000).training(10, RECORD)
        assert max(len(header), len(row)) <= width
        titles[width] = header.split()
        assert len(row.split()) == len(titles[width])
    assert titles[80] == ["step", "loss", "llm_kd", "sft", "on-policy", "accuracy", "agreement", "left"]
    assert titles[120] == [*titles[80][:-1], "grad", "tokens", "cut", "tok/s", "left"]


def test_a_line_names_the_share_of_own_answers_from_the_first_of_them_on():
    lines, state = [], SimpleNamespace(global_step=1, max_steps=3)
    shown = Lines(lines.append, as_json=False)
    for share in (0.0, 0.5, 0.0):
        shown.on_log(None, state, None, {**RECORD, "on_policy_fraction": share})
    assert ["on-policy" in line for line in lines] == [False, True, True]
    assert "on-policy 50%" in lines[1]


def test_evaluations_stand_in_the_columns_of_their_terms_and_the_best_is_marked():
    table = Table(lambda: 80, 1000)
    header, row = table.training(10, RECORD)
    (evaluation,) = table.evaluation(10, EVALUATION, is_best=True)
    for title in ("loss", "llm_kd", "sft", "accuracy"):
        end = header.index(f" {title} ") + len(title) + 1
        assert (
            evaluation[:end].split()[-1]
            == {"loss": "2.1000", "llm_kd": "0.2500", "sft": "1.8500", "accuracy": "33%"}[title]
        )
    assert evaluation.split()[:2] == ["eval", "10"]
    assert evaluation.endswith("best")
    assert row.endswith("1:02:05")


def test_the_header_comes_again_on_every_screen_and_with_a_new_column():
    table = Table(lambda: 120, 100)
    assert [len(table.training(step, {"loss": 1.0})) for step in range(60)] == [2, *[1] * 24, 2, *[1] * 24, 2, *[1] * 9]
    header, _ = table.training(60, {"loss": 1.0, "vision_kd_loss": 0.5})
    assert "vision" in header


@pytest.mark.parametrize(
    "value", [0.0, 1e-9, 0.00123, 2.2129, -3.5, 9.99999, 99.99999, 9999.9, 1e12, float("nan"), float("inf")]
)
def test_no_number_breaks_a_column(value):
    assert len(number(value)) <= 8
    assert number(value).strip() == number(value)


# ---- a real terminal -------------------------------------------------------------------------------------------------


@contextmanager
def terminal(columns):
    """A file that is a terminal, and what was written to it."""
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, (40, columns)) if hasattr(termios, "tcsetwinsize") else None
    written = []

    def drain():
        while True:
            try:
                part = os.read(reading, 65536)
            except OSError:
                return
            if not part:
                return
            written.append(part)

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    with os.fdopen(writing, "w", encoding="utf-8") as file:
        yield file, lambda: b"".join(written).decode()
    thread.join(timeout=5)
    os.close(reading)


def lines_of(text):
    """What stays on the screen, without the bar."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_each_record_stays_and_no_word_is_cut(project, kdtrain, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    with terminal(columns) as (file, written):
        monkeypatch.setattr(sys, "stderr", file)
        code, out, _ = kdtrain("fit", "config.yaml", "training.eval_steps=2", "rlhf.lmbda=0.5", "rlhf.max_new_tokens=4")
        file.flush()
    assert code == 0, written()
    lines = lines_of(written())
    assert max(map(len, lines)) <= columns
    rows = [line.split()[0] for line in lines if re.match(r" *(\d/4|eval \d) ", line)]
    assert rows == ["1/4", "2/4", "eval", "3/4", "4/4", "eval"]
    (header,) = (line for line in lines if line.split()[:2] == ["step", "loss"])
    assert {"on-policy", "left"} <= set(header.split())
    told = " ".join(" ".join(lines).split())
    assert (
        "warning: The teacher's targets fit the tokens that they are for hardly better than the tokens beside" in told
    )
    assert out.startswith("4 steps; best eval_loss ")


def test_colours_that_are_forced_make_no_terminal_of_a_file(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(file=io.StringIO())
    assert console.is_terminal
    assert not is_live(console)


def test_no_color_is_honoured(project, kdtrain, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    with terminal(80) as (file, written):
        monkeypatch.setattr(sys, "stderr", file)
        assert (
            kdtrain("fit", "config.yaml", "training.max_steps=1", "training.eval_strategy=no", "data.eval=null")[0] == 0
        )
        file.flush()
    assert re.findall(r"\x1b\[[0-9;]*?[34][0-9][0-9;]*m", written()) == []


# ---- JSON ------------------------------------------------------------------------------------------------------------


def test_every_json_event_has_its_time_and_the_last_line_is_what_came_of_it(project, kdtrain):
    code, out, err = kdtrain("fit", "config.yaml", "--log-format", "json")
    assert code == 0, err
    events = [json.loads(line) for line in err.splitlines()]
    times = [datetime.datetime.fromisoformat(event["time"].replace("Z", "+00:00")) for event in events]
    assert times == sorted(times)
    record = [event for event in events if event["event"] == "log" and "loss" in event][-1]
    assert record["elapsed_s"] >= record["step_time_s"] > 0
    assert (record["remaining_s"], record["step"], record["max_steps"]) == (0, 4, 4)
    (line,) = out.splitlines()
    result = json.loads(line)
    assert (result["event"], result["steps"], result["model_step"]) == ("finished", 4, 4)
    assert result["best"]["metric"] == "eval_loss"
    code, _, err = kdtrain("fit", "config.yaml", "--log-format", "json")  # the folder holds a run
    last = json.loads(err.splitlines()[-1])
    assert (code, last["level"], last["exit_code"]) == (3, "CRITICAL", 3)


# ---- failures --------------------------------------------------------------------------------------------------------


def fails(*args, **kwargs):
    raise KeyError("the cause")


def test_the_traceback_of_a_run_that_fails_is_in_its_error_log(project, kdtrain, monkeypatch):
    monkeypatch.setattr("kdtrain.runs.fit._train_and_save", fails)
    (project / "run").mkdir()
    (project / "run" / "status.json").write_text(json.dumps({"state": "failed", "exit_code": 1, "rank": 0}))
    code, _, err = kdtrain("fit", "config.yaml", "--resume", "auto")
    assert code == 1
    assert "Traceback" not in err
    assert f"the traceback in {project / 'run' / 'error.log'}" in err
    text = (project / "run" / "error.log").read_text()
    assert "KeyError: 'the cause'" in text
    assert "in fails" in text
    assert not (project / "run" / "run.lock").exists()


def test_a_bug_is_exit_code_1_and_its_traceback_is_kept(project, kdtrain, monkeypatch):
    monkeypatch.setattr("kdtrain.runs.fit.fit", fails)
    code, _, err = kdtrain("fit", "config.yaml")
    assert code == 1
    assert "Traceback" not in err
    assert "this is a bug (KeyError('the cause'))" in err
    assert "in fails" in Path(re.search(r"traceback in (\S+)", err)[1]).read_text()
    code, _, err = kdtrain("fit", "config.yaml", "--debug")
    assert "Traceback" in err
    assert "in fails" in err
    code, _, err = kdtrain("fit", "config.yaml", "--log-format", "json")
    last = json.loads(err.splitlines()[-1])
    assert (code, last["exit_code"]) == (1, 1)
    assert "in fails" in last["traceback"]


# ---- the run folder --------------------------------------------------------------------------------------------------


def test_status_says_which_process_goes_on_and_where_it_is(project, kdtrain):
    edit(project, training={"save_strategy": "steps", "save_steps": 2})
    assert kdtrain("fit", "config.yaml")[0] == 0
    status = json.loads((project / "run" / "status.json").read_text())
    assert {key: status[key] for key in ("state", "exit_code", "rank", "pid", "host", "step", "last_checkpoint")} == {
        "state": "finished", "exit_code": 0, "rank": 0, "pid": os.getpid(), "host": socket.gethostname(), "step": 4,
        "last_checkpoint": "checkpoint-4",
    }  # fmt: skip
    assert status["best"]["step"] == 4


def test_a_resumed_run_evaluates_as_often_as_its_config_says(project, kdtrain):
    edit(project, training={"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "eval_steps": 2})
    assert kdtrain("fit", "config.yaml")[0] == 0
    arguments = ("--resume", "auto", "training.max_steps=4", "training.eval_steps=1")
    assert kdtrain("fit", "config.yaml", *arguments)[0] == 0
    records = [json.loads(line) for line in (project / "run" / "logging.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 3, 4]


def test_tensorboard_has_one_run_under_its_own_name(project, kdtrain):
    pytest.importorskip("tensorboard")
    edit(project, training={"report_to": "tensorboard", "save_strategy": "steps", "save_steps": 1, "max_steps": 1})
    assert kdtrain("fit", "config.yaml", "training.output_dir=kd")[0] == 0
    assert kdtrain("fit", "config.yaml", "training.output_dir=kd", "--resume", "auto", "training.max_steps=2")[0] == 0
    assert {path.parent.relative_to(project) for path in (project / "kd").rglob("events.*")} == {
        (project / "kd" / "kd").relative_to(project)
    }
