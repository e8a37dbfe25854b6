"""Which method pays, at the quickstart's size: one row for each, over five seeds, each against forward KL.

    python examples/arena/arena.py [--seeds 5 | --seeds 0,2,7] [--only ARM,ARM] [key.sub=value ...]

It runs these commands and prints each of them, so that any of them can be run again by hand:

    ../quickstart/prepare.py      rows, tokenizer and the untrained teacher
    kdtrain fit teacher.yaml      the quickstart's teacher, unless it is there
    kdtrain cache distill.yaml    its hidden states, from which targets are exact     -> build/hidden
    kdtrain fit distill.yaml      every arm with every seed                           -> runs/<arm>_<seed>

A seed stands for the student's first weights and the order of its rows; arms with the same seed begin alike. A run that
is there with the same options is kept, so that what was interrupted goes on. Options such as `training.max_steps=2` go
to every `fit`.

Writes `build/table.md` and `build/results.json`, and prints the table; `results.json` beside this file is that of the
page. CE, KL and agreement are the quickstart's
comparison, plain transformers in float64; the verdicts are those of `kdtrain evaluate` on pairs of runs with one seed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"
BUILD, RUNS = HERE / "build", HERE / "runs"
CACHE, TEACHER = BUILD / "hidden", QUICKSTART / "runs" / "teacher"
STEPS, ROWS = 300, 8  # of the quickstart
BASELINE = "forward_kl"


@dataclass(frozen=True)
class Arm:
    """One method."""

    what: str
    options: tuple[str, ...] = ()
    live: bool = False
    """Whether the teacher has to be in the process; the others read its hidden states from the cache."""
    budget: Literal["live", "cache"] | None = None
    """Takes as many steps as forward KL's FLOPs allow: with the teacher in the process, or from its cache."""
    own: float = 0.0
    """Share of steps whose answers the student writes."""

    @property
    def teaches(self) -> bool:
        return "rlhf.llm_kd_weight=0" not in self.options


def divergence(name: str, *more: str) -> tuple[str, ...]:
    return (f"rlhf.divergence={name}", *more)


ARMS = {
    BASELINE: Arm("forward KL (`beta: 0`)"),
    "ce": Arm("cross-entropy alone", ("rlhf.llm_kd_weight=0",)),
    "ce_cache_flops": Arm(
        "cross-entropy alone, the FLOPs of forward KL from the cache", ("rlhf.llm_kd_weight=0",), budget="cache"
    ),
    "ce_flops": Arm(
        "cross-entropy alone, the FLOPs of forward KL with the teacher", ("rlhf.llm_kd_weight=0",), budget="live"
    ),
    "kl_and_ce": Arm("0.7 forward KL + 0.3 cross-entropy", ("rlhf.llm_kd_weight=0.7", "rlhf.sft_alpha=0.3")),
    "jsd": Arm("Jensen-Shannon (`beta: 0.5`, the default)", ("rlhf.beta=0.5",)),
    "jsd_scaled": Arm("the same, `jsd_scaled`", divergence("jsd_scaled", "rlhf.beta=0.5")),
    "reverse_kl": Arm("reverse KL (`beta: 1`)", ("rlhf.beta=1",)),
    "skew_kl": Arm("`skew_kl`", divergence("skew_kl")),
    "skew_reverse_kl": Arm("`skew_reverse_kl`", divergence("skew_reverse_kl")),
    "alpha_beta": Arm("`alpha_beta`", divergence("alpha_beta")),
    "entropy_aware": Arm("`entropy_aware`", divergence("entropy_aware")),
    "tvd": Arm("`tvd`", divergence("tvd")),
    "half_by_entropy": Arm(
        "half of the tokens, by `student_entropy`", ("rlhf.token_selection={by: student_entropy, keep: 0.5}",)
    ),
    "half_by_disagreement": Arm(
        "half of the tokens, by `disagreement`", ("rlhf.token_selection={by: disagreement, keep: 0.5}",)
    ),
    "hidden_kd": Arm("and hidden states (`custom.hidden_kd`)", ("custom.hidden_kd.enabled=true",), live=True),
    "hidden_kd_cosine": Arm(
        "the same by `distance: cosine`", ("custom.hidden_kd={enabled: true, distance: cosine}",), live=True
    ),
    "on_policy": Arm(
        "half of the steps on own samples, reverse KL there",
        ("rlhf.lmbda=0.5", "rlhf.on_policy={beta: 1}", "rlhf.temperature=1", "rlhf.max_new_tokens=64"),
        live=True,
        budget="live",
        own=0.5,
    ),
    "temperature": Arm("forward KL at `kd_temperature: 2`", ("rlhf.kd_temperature=2",)),
}


def of_quickstart(name: str) -> ModuleType:
    """A module of the quickstart, under another name than that of this folder's."""
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


quickstart, compare, prepare = of_quickstart("demo"), of_quickstart("compare"), of_quickstart("prepare")


@dataclass(frozen=True)
class Cost:
    """FLOPs of a mean row of the student's data: multiplications and additions of products and of attention."""

    student: float
    """A forward; with its backward it is three."""
    teacher: float
    teacher_head: float
    """What is left of the teacher where its hidden states come from the cache."""
    rows: int

    def budget(self, teacher: Literal["live", "cache"]) -> float:
        """Of forward KL's steps."""
        return STEPS * ROWS * (3 * self.student + (self.teacher if teacher == "live" else self.teacher_head))

    @property
    def cache(self) -> float:
        """To fill the cache, once for all that read it."""
        return self.rows * self.teacher

    def of_step(self, arm: Arm) -> float:
        teacher = 0.0 if not arm.teaches else self.teacher if arm.live else self.teacher_head
        return ROWS * (3 * self.student + teacher + arm.own * self.student)  # to write a row takes a forward of it

    def steps(self, arm: Arm) -> int:
        return round(self.budget(arm.budget) / self.of_step(arm)) if arm.budget else STEPS


def cost() -> Cost:
    """By the sizes of the models' layers, for rows as long as the data's."""
    import torch
    from transformers import AutoModelForCausalLM

    from kdtrain.models.flops import forward_flops

    counts = json.loads((QUICKSTART / "build" / "stamp.json").read_text(encoding="utf-8"))["counts"]
    rows, tokens, supervised = (counts[f"train_400_{what}"] for what in ("rows", "tokens", "supervised"))
    of_models = []
    for name in ("student_init", "teacher_init"):
        flops = forward_flops(AutoModelForCausalLM.from_pretrained(QUICKSTART / "build" / name))
        assert flops is not None
        of_models.append((float(flops.of(torch.tensor([tokens / rows]), supervised / rows)), flops.per_supervised))
    (student, _), (teacher, head) = of_models
    return Cost(student, teacher, head * supervised / rows, rows)


def students(seeds: Sequence[int]) -> None:
    """The untrained students, one for each seed."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART / "build" / "student_init")
    for seed in seeds:
        prepare.save_model(BUILD / f"student_{seed}", prepare.STUDENT, tokenizer, prepare.SEED + 1 + seed)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cache() -> None:
    """The teacher's hidden states, unless those of this teacher and these rows are there."""
    stamp = BUILD / "hidden.json"
    inputs = {"teacher": sha(TEACHER / "model.safetensors"), "rows": sha(QUICKSTART / "build" / "train_400.jsonl")}
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == inputs and CACHE.exists():
        return
    stamp.unlink(missing_ok=True)
    shutil.rmtree(CACHE, ignore_errors=True)
    config = QUICKSTART / "distill.yaml"
    quickstart.run("-m", "kdtrain", "cache", config, "--mode", "hidden", "--out", CACHE)
    stamp.write_text(json.dumps(inputs), encoding="utf-8")


def train(name: str, seed: int, steps: int, overrides: Sequence[str]) -> None:
    """One run, unless it is there with the same options."""
    arm, folder = ARMS[name], RUNS / f"{name}_{seed}"
    options = [f"model.model={BUILD / f'student_{seed}'}", f"training.seed={seed}", f"training.max_steps={steps}"]
    options += [] if arm.live or not arm.teaches else ["rlhf.teacher.backend=cache", f"rlhf.teacher.path={CACHE}"]
    options += [*arm.options, *overrides]
    begun_with = [sha(TEACHER / "model.safetensors"), *options]
    stamp = RUNS / f"{name}_{seed}.json"
    if stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == begun_with:
        return
    stamp.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)  # `fit` refuses to write over an earlier run
    config = QUICKSTART / "distill.yaml" if arm.teaches else QUICKSTART / "ce.yaml"
    quickstart.run(
        "-m", "kdtrain", "fit", config, f"training.output_dir={folder}", "training.report=false", "--quiet", *options
    )
    stamp.write_text(json.dumps(begun_with), encoding="utf-8")


def scored(arms: Sequence[str], seeds: Sequence[int]) -> tuple[list[Any], int]:
    """How all runs, arm by arm and seed by seed, and at the end the teacher predict the held-out rows; their tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folders = [RUNS / f"{name}_{seed}" for name in arms for seed in seeds]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in [*folders, TEACHER]]
    rows = compare.read_rows(QUICKSTART / "build" / "heldout.jsonl")
    return compare.score(models, models[-1], rows, AutoTokenizer.from_pretrained(TEACHER))


def results_of(
    arms: Sequence[str], seeds: Sequence[int], costs: Cost, scores: Sequence[Any], tokens: int
) -> dict[str, Any]:
    """All that was measured, arm by arm and seed by seed; `scores` and `tokens` are those of `scored`."""
    from kdtrain.runs.verdict import verdict_of_pairs

    rows = compare.read_rows(QUICKSTART / "build" / "heldout.jsonl")
    found: dict[str, Any] = {}
    for i, name in enumerate(arms):
        own = scores[i * len(seeds) : (i + 1) * len(seeds)]
        steps = last_step(RUNS / f"{name}_{seeds[0]}")
        found[name] = {"steps": steps, "flops": steps * costs.of_step(ARMS[name])}
        found[name] |= {what: [getattr(one, what) for one in own] for what in ("ce", "kl", "agreement")}
    for name in arms:
        verdict = verdict_of_pairs(found[name]["ce"], found[BASELINE]["ce"])
        found[name] |= {"difference": verdict.difference, "interval": verdict.interval, "verdict": verdict.word}
    return {
        "heldout": {"rows": len(rows), "tokens": tokens},
        "seeds": list(seeds),
        "live_flops": costs.budget("live"),
        "cache_flops": costs.cache,
        "teacher": {"ce": scores[-1].ce},
        "arms": found,
    }


def last_step(run: Path) -> int:
    lines = (run / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    return max(json.loads(line).get("step", 0) for line in lines)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| method | steps | TFLOP | CE | against forward KL | verdict | KL from the teacher | agreement |",
        "|---|--:|--:|--:|--:|---|--:|--:|",
    ]
    for name, row in results["arms"].items():
        spread = f" ± {stdev(row['ce']):.3f}" if len(row["ce"]) > 1 else ""
        between = "" if row["interval"] is None else ", {:+.3f} to {:+.3f}".format(*row["interval"])
        against = "" if name == BASELINE else f"{row['difference']:+.3f}{between}"
        lines.append(
            f"| {ARMS[name].what} | {row['steps']} | {row['flops'] / 1e12:.2f} | {mean(row['ce']):.3f}{spread} "
            f"| {against} | {'' if name == BASELINE else row['verdict']} | {mean(row['kl']):.3f} "
            f"| {mean(row['agreement']):.1%} |"
        )
    heldout = results["heldout"]
    lines += [
        "",
        f"On {heldout['tokens']:,} tokens of {heldout['rows']:,} held-out rows, mean and standard deviation of "
        f"{len(results['seeds'])} seeds; intervals of 95 %, Student's t over pairs of runs with one seed. CE and KL in "
        f"nats per token; the teacher's CE is {results['teacher']['ce']:.3f}. FLOPs are those of the steps' products "
        f"and attention; forward KL with the teacher in the process takes {results['live_flops'] / 1e12:.2f} TFLOP, "
        f"and to fill the cache took {results['cache_flops'] / 1e12:.2f}, once.",
    ]
    return "\n".join(lines)


def as_json(results: dict[str, Any]) -> str:
    """The results with six digits, an arm on each line."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [rounded(one) for one in value]
        return round(value, 6) if isinstance(value, float) and abs(value) < 1e6 else value

    found = rounded(results)
    arms = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in found.pop("arms").items())
    head = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in found.items())
    return f'{{\n{head} "arms": {{\n{arms}\n }}\n}}\n'


def seeds_of(text: str) -> list[int]:
    """A number of seeds, or some of them."""
    numbers = [int(part) for part in text.split(",")]
    found = numbers if "," in text else [*range(numbers[0])]
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise ValueError("expected a number of seeds, or different ones: 0,2,7")
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="arena.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=seeds_of, default=[*range(5)], metavar="N", help="how many, or which: 0,2,7")
    parser.add_argument("--only", help=f"arms, separated by commas, beside {BASELINE}: {', '.join(ARMS)}")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args(arguments)
    only = list(ARMS) if options.only is None else options.only.split(",")
    if unknown := [name for name in only if name not in ARMS]:
        parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join(ARMS)}")
    fixed = ("training.output_dir=", "training.seed=", "model.model=", "rlhf.teacher")
    if wrong := [item for item in options.overrides if "=" not in item or item.startswith(fixed)]:
        parser.error(f"{wrong[0]}: key.sub=value is wanted, but for {' '.join(fixed)}")
    options.arms = [name for name in ARMS if name in only or name == BASELINE]
    return options


def main() -> None:
    options = parse(sys.argv[1:])
    started = time.perf_counter()
    quickstart.run(QUICKSTART / "prepare.py")
    quickstart.fit_teacher([])
    students(options.seeds)
    cache()
    RUNS.mkdir(exist_ok=True)
    costs = cost()
    for seed in options.seeds:
        for name in options.arms:
            train(name, seed, costs.steps(ARMS[name]), options.overrides)
    results = results_of(options.arms, options.seeds, costs, *scored(options.arms, options.seeds))
    (BUILD / "results.json").write_text(as_json(results), encoding="utf-8")
    (BUILD / "table.md").write_text(table(results) + "\n", encoding="utf-8")
    print(f"\n{table(results)}\n\nDone in {time.perf_counter() - started:.0f} s. The table is in {BUILD / 'table.md'}.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
