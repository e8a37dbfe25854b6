"""Distils a system prompt into an adapter of a real model on a CPU, from questions alone.

    python examples/context_distillation/demo.py [--seeds 3] [key.sub=value ...]

It runs these commands and prints each of them, so that any of them can be run again by hand:

    prepare.py                  SmolLM2-135M-Instruct as a model folder       -> build/smollm2
    kdtrain fit distill.yaml    the run, once for each seed: 0, 1, 2, …       -> runs/distill-<seed>
    compare.py                  answers side by side, and what was measured   -> build/table.md, build/results.json

Options such as `rlhf.beta=0.5` or `training.max_steps=2` go to every `fit`. Runs replace those of the last demo.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
USAGE = "usage: demo.py [--seeds N] [key.sub=value ...], training.output_dir and training.seed excepted"


def run(*command: str | Path) -> float:
    """Runs a Python command, and returns the seconds it took; ends the demo with its exit code if it fails."""
    arguments = [_shown(part) for part in (Path(sys.executable), *command)]
    print(f"\n$ {shlex.join(arguments)}", flush=True)
    env = {"HF_HUB_OFFLINE": "1", **os.environ}  # nothing here is to be downloaded
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


def options(arguments: list[str]) -> tuple[int, list[str]]:
    """The number of seeds, and what goes to `fit`."""
    seeds = 1
    if arguments[:1] == ["--seeds"]:
        if len(arguments) < 2 or not arguments[1].isdigit() or arguments[1] == "0":
            sys.exit(USAGE)
        seeds, arguments = int(arguments[1]), arguments[2:]
    reserved = ("-", "training.output_dir=", "training.seed=")
    if any(item.startswith(reserved) or "=" not in item for item in arguments):
        sys.exit(USAGE)
    return seeds, arguments


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    seeds, overrides = options(sys.argv[1:])
    seconds = {"model": run(HERE / "prepare.py")}
    runs = [HERE / "runs" / f"distill-{seed}" for seed in range(seeds)]
    for seed, folder in enumerate(runs):
        shutil.rmtree(folder, ignore_errors=True)  # `fit` refuses to write over an earlier run
        own = [f"training.output_dir={_shown(folder)}", f"training.seed={seed}"]
        seconds[f"run {seed}"] = run("-m", "kdtrain", "fit", HERE / "distill.yaml", *own, *overrides)
    seconds["comparison"] = run(HERE / "compare.py", *runs)
    parts = ", ".join(f"{name} {spent:.0f}" for name, spent in seconds.items())
    print(f"\nDone in {sum(seconds.values()):.0f} s: {parts}. The table is in {_shown(HERE / 'build' / 'table.md')}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
