"""Distils a vision-language model on real handwritten digits, offline, in some minutes on two cores.

    python examples/visual_digits/demo.py [--one-seed] [key.sub=value ...]

    prepare.py                   images, rows, processor and untrained models            -> build/
    kdtrain fit teacher.yaml     the teacher                                             -> runs/teacher
    kdtrain fit ARM.yaml ...     the student: five arms (ce, seq, lm, visual, both), each from three seeds
                                                                                         -> runs/ARM_SEED
    compare.py                   all of them on held-out images                          -> build/table.md, results.png

Every command is printed, so that any of them can be run again by hand. Two runs go on at a time, each in one thread;
what they say is in `runs/NAME.log`. Options such as `training.max_steps=2` go to every `fit`. All runs are trained
afresh, and replace those of the last demo. `--one-seed` takes a third of the time and shows no differences.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"
ARMS = ("ce", "seq", "lm", "visual", "both")
SEEDS = (0, 1, 2)
ONE_SEED = "--one-seed"
AT_A_TIME = 2


def call(arguments: list[str], log: Path | None = None) -> float:
    """Runs a Python command, its output into `log`, and returns the seconds it took; ends the demo if it fails."""
    command = [sys.executable, *arguments]
    print(f"$ {shlex.join(command)}", flush=True)
    env = {
        "OMP_NUM_THREADS": "1",  # models this small gain nothing from a second thread, and the other core is in use
        "HF_HUB_OFFLINE": "1",  # nothing here is to be downloaded
        **os.environ,
    }
    started = time.perf_counter()
    if log is None:
        code = subprocess.run(command, env=env, check=False).returncode
    else:
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(command, env=env, check=False, stdout=file, stderr=file).returncode
    if code:
        said = "" if log is None else "\n" + "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise SystemExit(f"Stopped: exit code {code} from {shlex.join(command)}{said}")
    return time.perf_counter() - started


def shown(path: Path) -> str:
    """A path as one would type it from here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def fit(config: str, name: str, *overrides: str) -> None:
    """One run of `config`, into runs/NAME."""
    arguments = ["-m", "kdtrain", "fit", shown(HERE / f"{config}.yaml"), *overrides]
    if config != name:
        arguments.append(f"training.output_dir={shown(RUNS / name)}")
    print(f"{name}: {call(arguments, RUNS / f'{name}.log'):.0f} s", flush=True)


def fit_student(arm: str, seed: int, overrides: list[str]) -> None:
    """The weights that a student begins with, the order of its rows and its projector are the seed's."""
    student = f"model.model={shown(HERE / 'build' / f'student_{seed}')}"
    fit(arm, f"{arm}_{seed}", student, f"training.seed={seed}", *overrides)


def fit_all(seeds: Sequence[int], overrides: list[str]) -> None:
    """The teacher, and beside it the students that need none; then the others."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        teacher = pool.submit(fit, "teacher", "teacher", *overrides)
        students = [pool.submit(fit_student, "ce", seed, overrides) for seed in seeds]
        _finish(pool, [teacher])
        students += [pool.submit(fit_student, arm, seed, overrides) for seed in seeds for arm in ARMS[1:]]
        _finish(pool, students)


def _finish(pool: ThreadPoolExecutor, runs: list[Future[None]]) -> None:
    """Wait for the runs; when one fails, those that have not begun are given up."""
    try:
        for run in runs:
            run.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def main() -> None:
    overrides = sys.argv[1:]
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return
    one_seed = overrides[:1] == [ONE_SEED]
    if one_seed:
        overrides = overrides[1:]
    taken = ("training.output_dir=", "training.seed=", "model.model=")
    if any(item.startswith(("-", *taken)) or "=" not in item for item in overrides):
        usage = f"usage: demo.py [{ONE_SEED}] [key.sub=value ...]"
        sys.exit(f"{usage}, without {', '.join(taken)} which differ from run to run")
    started = time.perf_counter()
    call([shown(HERE / "prepare.py")])
    shutil.rmtree(RUNS, ignore_errors=True)  # `fit` refuses to write over an earlier run
    RUNS.mkdir()
    fit_all(SEEDS[:1] if one_seed else SEEDS, overrides)
    call([shown(HERE / "compare.py"), *([ONE_SEED] if one_seed else [])])
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Table and picture are in {shown(HERE / 'build')}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
