"""The fault table: what kdtrain does about each fault, and the tests that show it. `make faults` runs all of them.

Run it as `python -m tests.faults [ROW …]`. It prints a row per fault with its tests and their time.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    fault: str
    expected: str
    tests: tuple[str, ...] = ()
    """As `file.py::test_name`, all its parameters; in this folder."""


TABLE: dict[int, Fault] = {
    1: Fault("same config twice", "identical losses and weights"),
    2: Fault("resume from every saved step", "bitwise equal to the uninterrupted run"),
    3: Fault("kill -9 at nine points inside a save", "newest complete checkpoint used, skipped ones named"),
    4: Fault("kill -9 at random times", "resumes or starts clean, never a traceback"),
    5: Fault("damaged file in the newest checkpoint", "skipped with its reason, older one used; none left: exit 6"),
    6: Fault("--resume PATH of an incomplete checkpoint", "refused: which file and why, exit 6"),
    7: Fault("resume with changed model, tokenizer, loss or data", "refused with a key-by-key difference"),
    8: Fault(
        "SIGTERM in forward, accumulation, generation, save",
        "checkpoint complete, exit 143, resume bitwise",
        tests=(
            "test_signals.py::test_while_training_the_first_signal_is_noted_and_a_later_one_ends_at_once",
            "test_runs_launch.py::test_a_signal_saves_and_the_run_goes_on_from_there",
            "test_runs_stopping.py::test_an_evaluation_is_left_after_its_batch_and_made_by_the_resumed_run",
        ),
    ),
    9: Fault(
        "SIGINT once; twice",
        "as 8 with 130; at once, older checkpoint intact",
        tests=(
            "test_signals.py::test_while_training_the_first_signal_is_noted_and_a_later_one_ends_at_once",
            "test_runs_launch.py::test_ctrl_c_stops_both_of_two_launched_ranks",
        ),
    ),
    10: Fault(
        "SIGTERM to one of two ranks",
        "both stop at the same step",
        tests=(
            "test_runs_launch.py::test_sigterm_to_one_rank_stops_both_at_the_same_step",
            "test_runs_stopping.py::test_a_signal_to_one_of_two_ranks_in_an_evaluation_stops_both_after_the_same_batch",
        ),
    ),
    11: Fault(
        "one rank raises or is killed",
        "status.json says failed, last complete checkpoint intact",
        tests=(
            "test_runs_launch.py::test_a_rank_that_is_killed_ends_the_run_and_that_is_said",
            "test_runs_launch.py::test_a_worker_that_fails_gives_the_launcher_its_exit_code",
            "test_runs_stopping.py::test_a_rank_whose_connection_breaks_says_that_another_one_has_ended",
        ),
    ),
    12: Fault("NaN or inf in loss, gradient, targets", "stop before the step, exit 5, origin named"),
    13: Fault("every token of a batch masked; of the data", "loss 0 with a gradient path; error before training"),
    14: Fault("disk full while saving", "exit 6 with path and bytes; older checkpoint intact"),
    15: Fault("output folder read-only, a file, not empty", "refused, nothing written, both ways out named"),
    16: Fault("checkpoints larger than the free disk", "a finding with the numbers"),
    17: Fault("teacher 429 with Retry-After, 503, reset, then fine", "same result as without; counted"),
    18: Fault("teacher slow or silent", "limits per request and in total, exit 4, state saved"),
    19: Fault("teacher 400, 401, 403, 404", "no retry, exit 4 (3 before training), key not shown"),
    20: Fault("teacher answers truncated JSON, HTML, another shape", "one retry, then an error with its beginning"),
    21: Fault("teacher's positions, ids or numbers are wrong", "refused with position and reason"),
    22: Fault("server restarts with another model", "noticed on reconnect"),
    23: Fault("redirects, other schemes, userinfo, plain http", "refused; the key goes to its origin only"),
    24: Fault("API key in the environment, in YAML, in a URL", "in no output and no file of the run"),
    25: Fault("YAML: tags, alias bomb, depth, size, duplicates", "exit 2, one line, under 1 s and 200 MB"),
    26: Fault("wrong types, unknown keys, conflicts", "all of them in one run, each with place and fix"),
    27: Fault("path traversal, symlinks in names", "the resolved path stays inside"),
    28: Fault("model folder with code or pickled weights", "refused without opt-in, payload never runs"),
    29: Fault("cache or data set with pickle or a script", "refused"),
    30: Fault("vocabulary or special tokens differ", "an error before training with sizes and first ids"),
    31: Fault("bad rows", "counted, first three shown; over the limit stops"),
    32: Fault("offline, broken hub cache", "file and variable named, no endless retry"),
    33: Fault("memory exhausted", "peak, batch, length and three remedies"),
    34: Fault("tracker fails", "training goes on, one warning, logging.jsonl complete"),
    35: Fault("push fails at the end", "model is saved first; retry command printed"),
    36: Fault("control characters in data, names, server errors", "shown escaped"),
    37: Fault("--help, validate, schema, env", "no torch imported, under 1 s"),
    38: Fault(
        "two runs in one run directory",
        "second refused; a stale lock recognised",
        tests=(
            "test_runs_lock.py::test_a_second_run_in_a_folder_is_refused_at_once_with_who_holds_it_and_leaves_it_alone",
            "test_runs_lock.py::test_the_lock_of_a_killed_process_is_taken_over_and_gone_at_the_end",
            "test_runs_lock.py::test_one_that_gives_none_is_taken_over_whatever_its_clock_says",
            "test_runs_lock.py::test_of_a_run_that_cannot_be_seen_from_here_one_waits_for_a_sign_of_life",
        ),
    ),
    39: Fault("resume into, or output_dir at, a model or data folder", "refused before anything is written"),
    40: Fault("model folder lacks or renames a weight", "exit 3 with the keys"),
    41: Fault("resume from an older checkpoint, stop, --resume auto", "the newest of the current line"),
    42: Fault(
        "SIGHUP, SIGUSR1, SIGXCPU",
        "as 8",
        tests=(
            "test_signals.py::test_every_command_ends_with_the_code_of_the_signal_and_a_line",
            "test_signals.py::test_what_announces_the_end_comes_again_while_the_state_is_saved",
            "test_signals.py::test_a_signal_that_is_ignored_from_the_beginning_stays_ignored",
        ),
    ),
    43: Fault(
        "launcher killed with -9",
        "workers end within 30 s, lock freed",
        tests=(
            "test_runs_launch.py::test_ranks_end_with_their_launcher_and_leave_a_checkpoint",
            "test_runs_parent.py::test_a_process_that_hangs_is_killed_with_what_it_has_started",
        ),
    ),
    44: Fault("stdout or stderr closed or full", "training goes on, model saved, exit 0"),
    45: Fault("data file's content changed before a resume", "refused, or allowed by name"),
    46: Fault("NaN teacher writes answers or samples", "exit 5"),
    47: Fault(
        "read-only HOME, few files, umask, C locale, odd paths",
        "runs; a temporary cache is said",
        tests=("test_runs_stopping.py::test_a_locale_that_is_not_utf_8_and_odd_names_do_no_harm",),
    ),
    48: Fault("run folder moved or deleted meanwhile", "exit 6, nothing written elsewhere"),
    49: Fault(
        "WORLD_SIZE set without a launcher",
        "a message within 20 s",
        tests=(
            "test_cli_meeting.py::test_a_process_that_nobody_comes_to_ends_and_says_so",
            "test_cli_meeting.py::test_left_over_variables_are_named_before_anything_is_waited_for",
        ),
    ),
    50: Fault("two processes encode the same data", "both succeed"),
    51: Fault("processor with matrix units, other call orders", "same numbers"),
}


def run(rows: Sequence[int]) -> int:
    """Run the tests of some rows, and print the table.

    Returns:
        pytest's exit status.
    """
    wanted = sorted({str(TESTS / test) for row in rows for test in TABLE[row].tests})
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", f"--junit-xml={found}", "-o", "junit_family=xunit1"]
        status = subprocess.run([*command, *wanted], check=False).returncode
        cases = list(ElementTree.parse(found).iter("testcase"))
    print(f"\n{'':>3} {'fault':<58} {'tests':>5} {'s':>7}  result")
    for row in rows:
        names = {tuple(test.split("::")) for test in TABLE[row].tests}
        mine = [case for case in cases if (Path(case.get("file", "")).name, _function(case)) in names]
        failed = [case for case in mine if case.find("failure") is not None or case.find("error") is not None]
        skipped = [case for case in mine if case.find("skipped") is not None]
        result = f"{len(failed)} FAILED" if failed else f"{len(skipped)} skipped" if skipped else "holds"
        seconds = sum(float(case.get("time", 0)) for case in mine)
        print(f"{row:>3} {TABLE[row].fault:<58} {len(mine):>5} {seconds:>7.1f}  {result if mine else 'no test'}")
        for file, function in sorted(names):
            print(f"{'':>3}   {file}::{function}")
    return status


def _function(case: ElementTree.Element) -> str:
    return case.get("name", "").partition("[")[0]


if __name__ == "__main__":
    sys.exit(run([int(row) for row in sys.argv[1:]] or list(TABLE)))
