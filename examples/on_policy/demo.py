"""Teaches a student to sort digits from given answers, from its own, and from both, and compares what comes of it.

    python examples/on_policy/demo.py [--seeds 3] [key.sub=value ...]

It runs these commands and prints each of them, so that any of them can be run again by hand:

    prepare.py                 rows, tokenizer and untrained models
    kdtrain fit teacher.yaml   the teacher
    kdtrain fit start.yaml     the students' start: some steps on the data's answers, once for each seed
    kdtrain fit on.yaml        on-policy, then mixed.yaml and off.yaml for as many tokens
    kdtrain fit off.yaml       again, and mixed.yaml, for as much processor time as on-policy took
    kdtrain evaluate …         verdicts: each against off-policy

Options such as `rlhf.beta=0.5` go to every `fit` of the three arms. Writes `build/table.md`, `build/results.json` and
`build/results.png`, and prints the table.
"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import compare

HERE = Path(__file__).resolve().parent
BUILD, RUNS = HERE / "build", HERE / "runs"
RESERVED = ("training.output_dir=", "training.seed=", "training.max_steps=", "model.model=")
USAGE = f"usage: demo.py [--seeds 1, 2 or 3] [key.sub=value ...], except for {' '.join(RESERVED)}"
ROWS, ANSWER = 32, 48  # rows of a step, and tokens of each of the data's answers


def run(*command: str | Path, output: bool = False) -> str:
    """Runs a Python command, and returns what it wrote to stdout if asked; ends the demo if it fails."""
    arguments = [shown(part) for part in (Path(sys.executable), *command)]
    print(f"\n$ {shlex.join(arguments)}", flush=True)
    env = {"HF_HUB_OFFLINE": "1", **os.environ}  # nothing here is to be downloaded
    done = subprocess.run(arguments, env=env, check=False, text=True, stdout=subprocess.PIPE if output else None)
    if done.returncode:
        print(f"\nStopped: exit code {done.returncode} from {shlex.join(arguments)}", file=sys.stderr)
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)  # negative: ended by that signal
    return done.stdout or ""


def shown(part: str | Path) -> str:
    """A path as one would type it from here."""
    if isinstance(part, Path) and part.is_relative_to(Path.cwd()):
        part = part.relative_to(Path.cwd())
    return str(part)


def cpu_seconds() -> float:
    """Of all commands so far: unlike the clock, it is about the same on a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def fit(config: str, name: str, *options: str) -> float:
    """One run, into `runs/<name>`; the processor seconds it took, its start included."""
    shutil.rmtree(RUNS / name, ignore_errors=True)  # `fit` refuses to write over an earlier run
    before = cpu_seconds()
    run("-m", "kdtrain", "fit", HERE / f"{config}.yaml", f"training.output_dir={shown(RUNS / name)}", *options)
    return cpu_seconds() - before


def records(name: str) -> list[dict[str, Any]]:
    lines = (RUNS / name / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def tokens(name: str) -> int:
    """Supervised tokens that a run was trained on, out of its log: what students wrote is measured, not assumed."""
    total, last = 0.0, 0
    for record in records(name):
        own = record["on_policy_fraction"]
        length = own * record.get("completion_length", 0) + (1 - own) * ANSWER
        total, last = total + (record["step"] - last) * ROWS * length, record["step"]
    return round(total)


class Arms:
    """The runs of all seeds."""

    def __init__(self, seeds: int, overrides: list[str]) -> None:
        self.seeds, self.overrides = range(seeds), overrides
        self.found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in compare.ARMS}

    def train(self, arm: str, seed: int, *options: str) -> None:
        start, name = RUNS / f"start_{seed}", f"{arm}_{seed}"
        own = [f"model.model={shown(start)}", f"training.seed={seed}", *options, *self.overrides]
        seconds = fit(arm.removesuffix("_time"), name, *own)
        steps = records(name)[-1]["step"]
        self.found[arm].append({"seed": seed, "steps": steps, "tokens": tokens(name), "cpu_seconds": seconds})

    def equal_tokens(self) -> None:
        """On-policy as its config says; the others in as many steps as give the same number of tokens."""
        for seed in self.seeds:
            self.train("on", seed)
            on = self.found["on"][-1]
            own, given = on["tokens"] / on["steps"], ROWS * ANSWER
            self.train("mixed", seed, f"training.max_steps={round(on['tokens'] / ((own + given) / 2))}")
            self.train("off", seed, f"training.max_steps={round(on['tokens'] / given)}")

    def equal_time(self, start: float) -> None:
        """Off-policy and mixed in as many steps as the time of on-policy allows, `start` seconds of a run left out."""
        for arm in ("off", "mixed"):
            steps = sum(of["steps"] for of in self.found[arm])
            ratio = self.seconds("on", start) / self.seconds(arm, start)
            for seed in self.seeds:
                self.train(f"{arm}_time", seed, f"training.max_steps={round(ratio * steps / len(self.seeds))}")

    def seconds(self, arm: str, start: float) -> float:
        return sum(of["cpu_seconds"] - start for of in self.found[arm])


def verdict(arm: str, other: str, seeds: range) -> dict[str, Any]:
    """What `kdtrain evaluate` says of an arm's runs against those of another, by CE on the data's answers."""
    command: list[str | Path] = ["-m", "kdtrain", "evaluate", *(RUNS / f"{arm}_{seed}" for seed in seeds), "--json"]
    command.append(f"data.eval={shown(BUILD / 'heldout.jsonl')}")
    for seed in seeds:
        command += ["--against", RUNS / f"{other}_{seed}"]
    found = json.loads(run(*command, output=True))
    print(f"CE {found['against']['difference']:+.4f}, {found['verdict']}")
    interval, method = found["intervals"]["difference"], found["against"]["method"]
    return {"word": found["verdict"], "ce": found["against"]["difference"], "interval": interval, "method": method}


def results_of(arms: Arms) -> dict[str, Any]:
    """All that was measured; figures of the curves are on a part of the held-out rows."""
    measure = compare.Measure(RUNS / "teacher", BUILD / "heldout.jsonl")
    starts = [measure(RUNS / f"start_{seed}") for seed in arms.seeds]
    for arm, found in arms.found.items():
        for one in found:
            folder = RUNS / f"{arm}_{one['seed']}"
            one |= measure(folder)
            if not arm.endswith("_time"):
                one["curve"] = measure.curve(folder, RUNS / f"start_{one['seed']}", one["tokens"] / one["steps"])
    verdicts = [
        {"arm": arm, "against": other, "equal": equal, **verdict(arm, other, arms.seeds)}
        for arm, other, equal in compare.PAIRS
    ]
    return {
        "heldout": len(measure.rows),
        "teacher": measure(RUNS / "teacher"),
        "start": starts,
        "arms": arms.found,
        "verdicts": verdicts,
    }


def options(arguments: list[str]) -> tuple[int, list[str]]:
    """The number of seeds, and what goes to `fit`."""
    seeds = 1
    if arguments[:1] == ["--seeds"]:
        if arguments[1:2] not in (["1"], ["2"], ["3"]):
            sys.exit(USAGE)
        seeds, arguments = int(arguments[1]), arguments[2:]
    if any(item.startswith(("-", *RESERVED)) or "=" not in item for item in arguments):
        sys.exit(USAGE)
    return seeds, arguments


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    seeds, overrides = options(sys.argv[1:])
    started = time.perf_counter()
    run(HERE / "prepare.py")
    fit("teacher", "teacher")
    for seed in range(seeds):
        student = f"model.model={shown(BUILD / f'student_{seed}')}"
        fit("start", f"start_{seed}", student, f"training.seed={seed}")
    arms = Arms(seeds, overrides)
    arms.equal_tokens()
    first_step = fit("off", "first_step", "training.max_steps=1")
    arms.equal_time(first_step)
    results = results_of(arms)
    (BUILD / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (BUILD / "table.md").write_text(compare.table(results) + "\n", encoding="utf-8")
    compare.plot(results, BUILD / "results.png")
    print(f"\n{compare.table(results)}")
    spent = f"{time.perf_counter() - started:.0f} s ({cpu_seconds():.0f} s of processor time in its commands)"
    print(f"\nDone in {spent}. Table and plot are in {shown(BUILD)}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
