"""Distils a teacher into a student on real text, from nothing, offline, in a few minutes on a CPU.

    python examples/quickstart/demo.py [key.sub=value ...]

It runs five commands and prints each of them, so that any of them can be run again by hand:

    prepare.py                  rows, tokenizer and untrained models                       -> build/
    kdtrain fit teacher.yaml    the teacher, on all rows                                   -> runs/teacher
    kdtrain fit ce.yaml         the student, on 400 rows, from the text alone              -> runs/ce
    kdtrain fit distill.yaml    the same student, rows and steps, taught by the teacher    -> runs/distill
    compare.py                  all of them on held-out rows                               -> build/table.md

Options such as `rlhf.beta=0.5` or `training.max_steps=2` go to every `fit`. The students are trained afresh each time
and replace those of the last demo. The teacher is kept as long as its config and its data are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"
TEACHER_STAMP = RUNS / "teacher.json"


def run(*command: str | Path) -> float:
    """Runs a Python command, and returns the seconds it took; ends the demo with its exit code if it fails."""
    arguments = [_shown(part) for part in (Path(sys.executable), *command)]
    print(f"\n$ {shlex.join(arguments)}", flush=True)
    env = {
        # Models this small gain little from a second thread, and lose everything if something else wants the cores.
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",  # nothing here is to be downloaded
        **os.environ,
    }
    started = time.perf_counter()
    code = subprocess.run(arguments, env=env, check=False).returncode
    if code:
        print(f"\nStopped: exit code {code} from {shlex.join(arguments)}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)  # negative: ended by that signal
    return time.perf_counter() - started


def _shown(part: str | Path) -> str:
    """A path as one would type it from here."""
    if isinstance(part, Path) and part.is_relative_to(Path.cwd()):
        part = part.relative_to(Path.cwd())
    return str(part)


def fit(name: str, overrides: list[str]) -> float:
    shutil.rmtree(RUNS / name, ignore_errors=True)  # `fit` refuses to write over an earlier run
    return run("-m", "kdtrain", "fit", HERE / f"{name}.yaml", *overrides)


def teacher_stamp(overrides: list[str]) -> dict[str, str]:
    """What decides how the teacher turns out, and what it turned out to be; both as hashes."""
    inputs = [HERE / "base.yaml", HERE / "teacher.yaml", HERE / "build" / "stamp.json"]
    digest = hashlib.sha256(repr(overrides).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    weights = RUNS / "teacher" / "model.safetensors"
    return {
        "inputs": digest.hexdigest(),
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else "",
    }


def fit_teacher(overrides: list[str]) -> float:
    """Trains the teacher, unless one that finished with the same config and data is there."""
    stamp = teacher_stamp(overrides)
    if TEACHER_STAMP.exists() and json.loads(TEACHER_STAMP.read_text(encoding="utf-8")) == stamp and stamp["weights"]:
        print(f"\n{_shown(RUNS / 'teacher')}: kept, its config and data have not changed (remove it to train it again)")
        return 0.0
    TEACHER_STAMP.unlink(missing_ok=True)
    seconds = fit("teacher", overrides)
    TEACHER_STAMP.write_text(json.dumps(teacher_stamp(overrides), indent=1) + "\n", encoding="utf-8")
    return seconds


def main() -> None:
    overrides = sys.argv[1:]
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return
    if any(item.startswith(("-", "training.output_dir=")) or "=" not in item for item in overrides):
        sys.exit(
            "usage: demo.py [key.sub=value ...], training.output_dir excepted: compare.py reads the runs from runs/"
        )
    seconds = {
        "data": run(HERE / "prepare.py"),
        "teacher": fit_teacher(overrides),
        "CE only": fit("ce", overrides),
        "distillation": fit("distill", overrides),
        "comparison": run(HERE / "compare.py"),
    }
    parts = ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items())
    print(f"\nDone in {sum(seconds.values()):.0f} s: {parts}. The table is in {_shown(HERE / 'build' / 'table.md')}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
