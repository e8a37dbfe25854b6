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
    8: Fault("SIGTERM in forward, accumulation, generation, save", "checkpoint complete, exit 143, resume bitwise"),
    9: Fault("SIGINT once; twice", "as 8 with 130; at once, older checkpoint intact"),
    10: Fault("SIGTERM to one of two ranks", "both stop at the same step"),
    11: Fault("one rank raises or is killed", "status.json says failed, last complete checkpoint intact"),
    12: Fault("NaN or inf in loss, gradient, targets", "stop before the step, exit 5, origin named"),
    13: Fault("every token of a batch masked; of the data", "loss 0 with a gradient path; error before training"),
    14: Fault(
        "disk full while saving",
        "exit 6 with path and bytes; older checkpoint intact",
        tests=(
            "test_disk.py::test_a_file_that_does_not_fit_is_one_error_whoever_writes_it",
            "test_disk.py::test_a_disk_that_fills_up_while_a_checkpoint_is_saved_leaves_the_older_one_and_the_run_goes_on",
            "test_disk.py::test_a_file_that_may_not_be_as_large_as_the_model_ends_the_run_where_nothing_is_mounted",
            "test_disk.py::test_a_log_that_cannot_be_written_ends_the_run_with_its_state_saved",
            "test_disk.py::test_the_error_is_not_hidden_by_a_status_that_cannot_be_written_either",
            "test_disk.py::test_encoded_rows_that_do_not_fit_are_exit_code_6",
            "test_disk.py::test_answers_of_the_teacher_that_do_not_fit_are_exit_code_6",
            "test_disk.py::test_other_commands_say_it_too",
            "test_disk.py::test_a_read_only_disk_in_the_middle_of_a_run",
            "test_runs_final_model.py::test_a_model_that_cannot_be_written_whole_leaves_the_one_before_it",
        ),
    ),
    15: Fault(
        "output folder read-only, a file, not empty",
        "refused, nothing written, both ways out named",
        tests=(
            "test_no_bug.py::test_what_can_be_no_name_of_a_file_is_an_error_of_the_config",
            "test_no_bug.py::test_names_that_are_odd_are_names",
            "test_cli.py::test_a_world_that_does_not_fit_is_exit_code_2_or_3_and_nothing_is_written",
        ),
    ),
    16: Fault(
        "checkpoints larger than the free disk",
        "a finding with the numbers",
        tests=("test_preflight_memory.py::test_disk_for_checkpoints_is_compared_with_what_is_free",),
    ),
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
    28: Fault(
        "model folder with code or pickled weights",
        "refused without opt-in, payload never runs",
        tests=(
            "test_cli.py::test_weights_as_a_pickle_are_refused_and_never_loaded",
            "test_no_bug.py::test_a_damaged_model_is_named",
            "test_no_bug.py::test_a_damaged_adapter_is_named",
        ),
    ),
    29: Fault("cache or data set with pickle or a script", "refused"),
    30: Fault("vocabulary or special tokens differ", "an error before training with sizes and first ids"),
    31: Fault(
        "bad rows",
        "counted, first three shown; over the limit stops",
        tests=("test_no_bug.py::test_damaged_data_is_named",),
    ),
    32: Fault("offline, broken hub cache", "file and variable named, no endless retry"),
    33: Fault(
        "memory exhausted",
        "peak, batch, length and three remedies",
        tests=(
            "test_memory.py::test_a_step_that_finds_no_memory_says_the_peak_rows_length_and_three_ways_out",
            "test_memory.py::test_a_model_that_finds_no_memory_while_it_is_loaded_is_named",
            "test_memory.py::test_memory_that_really_runs_out_in_a_step",
            "test_memory.py::test_memory_that_runs_out_anywhere_else_is_no_bug_either",
        ),
    ),
    34: Fault(
        "tracker fails",
        "training goes on, one warning, logging.jsonl complete",
        tests=(
            "test_trackers.py::test_a_tracker_that_fails_in_any_of_its_hooks_is_one_warning",
            "test_trackers.py::test_the_model_is_saved_before_a_tracker_comes_to_its_end_and_one_that_hangs_is_left",
            "test_trackers.py::test_tensorboard_without_a_place_to_write_to",
            "test_trackers.py::test_what_a_caller_s_own_callback_raises_is_raised",
        ),
    ),
    35: Fault(
        "push fails at the end",
        "model is saved first; retry command printed",
        tests=(
            "test_runs_final_model.py::test_a_push_that_fails_at_the_end_leaves_the_saved_model_and_says_the_command",
            "test_runs_final_model.py::test_a_push_that_fails_in_the_middle_is_a_warning",
            "test_runs_export.py::test_a_push_that_fails_keeps_the_folder_and_says_how_to_go_on",
        ),
    ),
    36: Fault(
        "control characters in data, names, server errors",
        "shown escaped",
        tests=("test_cli_streams.py::test_control_characters_of_a_server_or_the_hub_are_shown_escaped",),
    ),
    37: Fault("--help, validate, schema, env", "no torch imported, under 1 s"),
    38: Fault("two runs in one run directory", "second refused; a stale lock recognised"),
    39: Fault("resume into, or output_dir at, a model or data folder", "refused before anything is written"),
    40: Fault(
        "model folder lacks or renames a weight",
        "exit 3 with the keys",
        tests=(
            "test_no_bug.py::test_a_damaged_model_is_named",
            "test_models_load_report.py::test_weights_that_do_not_fit_the_architecture_are_refused_by_name",
        ),
    ),
    41: Fault("resume from an older checkpoint, stop, --resume auto", "the newest of the current line"),
    42: Fault("SIGHUP, SIGUSR1, SIGXCPU", "as 8"),
    43: Fault("launcher killed with -9", "workers end within 30 s, lock freed"),
    44: Fault(
        "stdout or stderr closed or full",
        "training goes on, model saved, exit 0",
        tests=(
            "test_cli_streams.py::test_a_process_outlives_its_streams",
            "test_cli_streams.py::test_training_goes_on_and_the_model_is_saved",
            "test_cli_streams.py::test_a_run_of_its_own_outlives_its_streams",
            "test_cli_streams.py::test_a_run_outlives_its_terminal",
            "test_cli_streams.py::test_a_command_that_only_prints_ends_silently_without_a_reader_and_not_on_a_full_disk",
        ),
    ),
    45: Fault("data file's content changed before a resume", "refused, or allowed by name"),
    46: Fault("NaN teacher writes answers or samples", "exit 5"),
    47: Fault("read-only HOME, few files, umask, C locale, odd paths", "runs; a temporary cache is said"),
    48: Fault(
        "run folder moved or deleted meanwhile",
        "exit 6, nothing written elsewhere",
        tests=(
            "test_disk.py::test_a_run_whose_folder_goes_away_writes_nothing_elsewhere",
            "test_disk.py::test_a_log_is_not_begun_anew_in_a_folder_that_has_taken_the_place_of_the_run_s",
        ),
    ),
    49: Fault("WORLD_SIZE set without a launcher", "a message within 20 s"),
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
